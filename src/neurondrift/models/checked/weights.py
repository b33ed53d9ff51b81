"""A model out of its files, of which every tensor is accounted for.

Owns what transformers reports when it loads: parameters that no file holds (which it fills with random numbers),
tensors that the model has no place for, sizes that differ, packages that are missing. All of it is an error here.
Knows nothing of references, tokenizers and adapters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from neurondrift.base.errors import ArtifactError, ModelError, UserError
from neurondrift.base.names import plain
from neurondrift.models.architecture.classes import auto_class, first_line, model_class
from neurondrift.models.architecture.complete import check_complete
from neurondrift.models.disk.checkpoints import stored_tensors, weight_files
from neurondrift.models.disk.keys import plain_names
from neurondrift.models.disk.references import cached

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def load_weights(reference: str, config: Any, **settings: Any) -> PreTrainedModel:
    """The causal language model of a folder or hub id, in safetensors, with nothing made up and nothing left out.

    Tied weights, buffers, and what a model's class declares to be ignored need not be in the files. Names that carry
    the wrappers of a training run (`_orig_mod.`, `module.`) are taken without them.

    Parameters
    ----------
    reference
        A folder that `save_pretrained` wrote, or a hub id.
    config
        Its configuration.
    settings
        What `from_pretrained` takes.

    Raises
    ------
    ModelError
        Parameters that are in no file, tensors without a place, sizes that differ; a package that is missing; anything
        else that transformers cannot load.
    ArtifactError
        A file that is missing or cut off.
    """
    folder = Path(reference)
    renamed = _renamed(folder, reference) if folder.is_dir() else {}
    settings = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, **settings}
    with as_errors(reference, config):
        if renamed:
            model, found = _load_renamed(folder, renamed, settings)
        else:
            model, found = auto_class(config, reference).from_pretrained(reference, use_safetensors=True, **settings)
        fetched = None if folder.is_dir() or not found["missing_keys"] else cached(reference, settings.get("revision"))
        if fetched is not None and (renamed := _renamed(fetched, reference)):
            model, found = _load_renamed(fetched, renamed, settings)
            model.config._name_or_path = model.name_or_path = reference
    check_complete(model, found, reference)
    return model


def _renamed(folder: Path, reference: str) -> Mapping[str, str]:
    """Tensor name -> the same without wrappers; empty where none has any."""
    renamed = plain_names(stored_tensors(folder, reference))
    return renamed if any(name != own for name, own in renamed.items()) else {}


def _load_renamed(folder: Path, renamed: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """As `from_pretrained`, with other names; tensors are read where they are needed, as it does itself."""
    from safetensors import safe_open

    state: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for file in weight_files(folder, str(folder))[0]:
            opened = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
            state |= {renamed[name]: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        others = {name: value for name, value in settings.items() if name not in ("revision", "trust_remote_code")}
        kind, others["config"] = model_class(settings["config"], str(folder))
        model, found = kind.from_pretrained(None, state_dict=state, **others)
    model.config._name_or_path = model.name_or_path = str(folder)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(folder))
    return model, found


@contextlib.contextmanager
def as_errors(reference: str, config: Any = None) -> Iterator[None]:
    """Whatever transformers raises within the block about a model's files, as one `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except ImportError as error:
        quantised = getattr(config, "quantization_config", None)
        method = (
            quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", "")
        )
        named = re.search(r"pip install (?:-\w+ |--[\w-]+ )*['\"`]?([\w.-]+)", str(error))
        raise ModelError(
            f"{reference} needs a package that is not installed ({first_line(error)})",
            received=f"quantised by {getattr(method, 'value', method)}" if method else None,
            fix=f"pip install {named[1]}" if named else "install it, or use a model that is not quantised",
        ) from error
    except SafetensorError as error:
        raise ArtifactError(
            f"A file of {reference} is truncated or no safetensors file ({first_line(error)})",
            fix="copy or download it again",
        ) from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers fails in as many ways as there are files that it cannot read
        raise ModelError(f"The model cannot be loaded ({first_line(error)})", received=reference) from error


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Raise `ModelError` where weights of a model or of its adapters are NaN or infinite, with how many."""
    bad: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if values.dtype not in FLOATS or not values.numel() or values.is_meta:
            continue
        if not all(bool(end.isfinite()) for end in torch.aminmax(values)):
            bad[name] = int((~values.isfinite()).sum())
    if bad:
        first = next(iter(bad))
        raise ModelError(
            f"The model has weights that are no numbers, first in {plain(first)}",
            received=f"{sum(bad.values())} values of {len(bad)} tensors are NaN or infinite",
            fix="its training has diverged, or a file is damaged: use an earlier checkpoint",
        )
