"""A model out of its files, of which every tensor is accounted for.

Owns what transformers reports when it loads: parameters that no file holds (which it fills with random numbers),
tensors that the model has no place for, sizes that differ, packages that are missing. All of it is an error here.
Knows nothing of references, tokenizers and adapters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from neurondrift.base.errors import ArtifactError, ModelError, UserError
from neurondrift.base.names import plain
from neurondrift.models.disk.checkpoints import stored_tensors, weight_files
from neurondrift.models.disk.keys import plain_names

# Tensors that older versions of transformers saved and newer ones compute.
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$")
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
    renamed: Mapping[str, str] = {}
    if folder.is_dir():
        renamed = plain_names(stored_tensors(folder, reference))
        renamed = renamed if any(name != own for name, own in renamed.items()) else {}
    settings = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True, **settings}
    with as_errors(reference, config):
        if renamed:
            model, found = _load_renamed(folder, renamed, settings)
        else:
            model, found = AutoModelForCausalLM.from_pretrained(reference, use_safetensors=True, **settings)
    check_complete(model, found, reference)
    return model


def _load_renamed(folder: Path, renamed: Mapping[str, str], settings: Mapping[str, Any]) -> tuple[Any, Any]:
    """As `from_pretrained`, with other names; tensors are read where they are needed, as it does itself."""
    from safetensors import safe_open

    state: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for file in weight_files(folder, str(folder))[0]:
            opened = stack.enter_context(safe_open(str(file), framework="pt", device="cpu"))
            state |= {renamed[name]: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        others = {name: value for name, value in settings.items() if name not in ("revision", "trust_remote_code")}
        kind = AutoModelForCausalLM._model_mapping[type(settings["config"])]
        kind = kind[0] if isinstance(kind, tuple) else kind
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


def check_complete(model: PreTrainedModel, found: Mapping[str, Any], reference: str) -> None:
    """Raise `ModelError` where transformers' loading info tells of anything missing, left over, or of another size."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    missing = sorted(set(found["missing_keys"]) & parameters, key=_by_number)
    unexpected = sorted((name for name in found["unexpected_keys"] if not COMPUTED.search(name)), key=_by_number)
    sizes = sorted(found["mismatched_keys"])
    if found.get("error_msgs"):
        raise ModelError(f"The model cannot be loaded ({found['error_msgs'][0]})", received=reference)
    if sizes:
        name, stored, wanted = sizes[0]
        raise ModelError(
            f"{name} of {reference} has another size than its config.json says",
            received=f"{list(stored)}, and {len(sizes) - 1} others",
            allowed=str(list(wanted)),
            fix="use the config.json that belongs to these files",
        )
    if missing:
        raise ModelError(
            f"The files of {reference} lack {missing[0]}",
            received=f"{len(missing)} of {len(parameters)} parameters are in no file: {_some(missing)}",
            fix=_cause(missing, unexpected, parameters),
        )
    if unexpected:
        raise ModelError(
            f"The model has no place for {unexpected[0]} of {reference}",
            received=f"{len(unexpected)} tensors of its files are left over: {_some(unexpected)}",
            fix="use the config.json that belongs to these files: this one is of another model, or names fewer blocks",
        )


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


def _cause(missing: Sequence[str], unexpected: Sequence[str], parameters: set[str]) -> str:
    """The likely cause, and what to do."""
    if unexpected:
        return f"the files have other names, such as {unexpected[0]}: use the config.json that belongs to them"
    blocks = {match[0] for name in missing if (match := re.match(r".*?\.\d+\.", name))}
    whole = all(name in missing for name in parameters if any(name.startswith(block) for block in blocks))
    if blocks and whole and all(any(name.startswith(block) for block in blocks) for name in missing):
        return (
            f"config.json names more blocks than the files hold ({', '.join(sorted(blocks)[:3])}), or a file is lost: "
            "copy or download the folder again"
        )
    if all("lm_head" in name or "embed_out" in name for name in missing):
        return "config.json says that the LM head is not tied to the embeddings: set tie_word_embeddings, or save it"
    return "the files are incomplete: copy or download the folder again"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type where it has none."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
