"""Which class of transformers a configuration makes, and the model of it without numbers.

Owns the choice that `load_model` and everything that reads a checkpoint's files share, so that both know one model:
the causal language model of a configuration, or, of types that have none and of files that hold it, the one that also
takes images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from neurondrift.base.errors import ModelError


def configuration(reference: str, *, called: str = "", **settings: Any) -> Any:
    """The configuration of a folder or hub id, which messages call `called`.

    Raises `ModelError` where it is missing or does not say what is needed.
    """
    try:
        return AutoConfig.from_pretrained(reference, **settings)
    except Exception as error:  # classes of configurations check their fields each in its own way
        where = "" if Path(reference).exists() else ", or the hub cannot be reached"
        raise ModelError(
            f"The model cannot be found or read{where} ({first_line(error)})",
            received=called or reference,
            allowed="pypi:NAME, a GGUF file, tiny:llama, a folder that save_pretrained wrote, or a hub id",
        ) from error


def auto_class(config: Any, reference: str) -> Any:
    """What makes the language model of a configuration: an `AutoModel...`, or a class of transformers' own that has
    none for its configuration alone (text models that come with images, saved without them).

    Where the files are those of the class that also takes images (`config.architectures`), it is that one, unless the
    text model's class says which tensors of such files it leaves alone.

    Raises `ModelError` where transformers has none, and none comes with it (`auto_map`).
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    kind = type(config)
    with_images = kind in AutoModelForImageTextToText._model_mapping
    if kind in AutoModelForCausalLM._model_mapping and not (with_images and _is_whole(config)):
        return AutoModelForCausalLM
    if with_images:
        return AutoModelForImageTextToText
    for name in sorted(_named(config) & _causal_names()):
        found = getattr(transformers, name, None)
        if getattr(found, "config_class", None) is kind:
            return found
    raise ModelError("This is no causal language model", received=f"{reference} ({kind.__name__})")


def _is_whole(config: Any) -> bool:
    """Whether files of a configuration that makes two classes hold parts that the text model knows nothing of."""
    text, whole = (auto._model_mapping[type(config)] for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    if text is whole or isinstance(text, tuple | list) or isinstance(whole, tuple | list):
        return False
    left = [set(getattr(one, "_keys_to_ignore_on_load_unexpected", None) or ()) for one in (text, whole)]
    return whole.__name__ in _named(config) and left[0] <= left[1]


def _named(config: Any) -> set[str]:
    return set(getattr(config, "architectures", None) or ())


def _causal_names() -> set[str]:
    """Names of the classes that transformers has for causal language modelling."""
    found: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found |= {names} if isinstance(names, str) else set(names)
    return found


def model_class(config: Any, reference: str) -> tuple[Any, Any]:
    """The class of transformers' own that `auto_class` makes of a configuration, and the configuration that it takes:
    that of the text model, where the class is a text model's."""
    found = auto_class(config, reference)
    if issubclass(found, PreTrainedModel):
        return found, config
    found = found._model_mapping[type(config)]
    if isinstance(found, tuple | list):
        found = next((one for one in found if one.__name__ in _named(config)), found[0])
    text = (getattr(config, "sub_configs", None) or {}).get("text_config")
    return found, config.get_text_config() if text is not None and found.config_class is text else config


def skeleton(config: Any, reference: str) -> PreTrainedModel:
    """The model of a configuration with all its modules and shapes and no numbers: nothing is read or computed.

    Raises `ModelError` where transformers cannot make it.
    """
    try:
        kind, own = model_class(config, reference)
        with torch.device("meta"):
            model: PreTrainedModel = kind._from_config(own)
        return model.eval()
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(f"{reference} needs a package that is not installed ({first_line(error)})") from error
    except Exception as error:  # each class of models checks its configuration in its own way
        raise ModelError(f"The model cannot be made ({first_line(error)})", received=reference) from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters; its type where it has none."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
