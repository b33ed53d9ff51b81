"""Where the decoder blocks of a language model lie, also where a vision or audio model lies beside it.

The text model is told by structure: by transformers' own `get_decoder`, and by the list of blocks that is nearest to
the embedding of the tokens. The number of blocks alone would not do: a vision model may have as many.
"""

from __future__ import annotations

import re
import sys
from typing import Any, NamedTuple

from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.base.names import WRAPPERS, plain

# Names of parts that are no text model. An encoder's blocks are none either, unless they are the decoder's own
# (`bert.encoder.layer`).
OTHER = r"vision|visual|audio|speech|image|sam_model|vit\b"
OTHER_OUTSIDE = rf"{OTHER}|encoder\."


class Blocks(NamedTuple):
    """The name of the list of decoder blocks, and the list."""

    name: str
    modules: nn.ModuleList

    def named(self) -> list[tuple[str, nn.Module]]:
        """Each block with its name, without wrappers."""
        return [(f"{plain(self.name)}.{number}", block) for number, block in enumerate(self.modules)]


def decoder_blocks(model: nn.Module) -> list[Blocks]:
    """Name and list of the decoder blocks of an (unwrapped) causal language model: one list, or several of one kind of
    block that make the decoder together, in the order of its modules.

    Raises `ModelError` where no list of blocks is found.
    """
    depths = _depths(model)
    scope = _decoder_name(model)
    lists = _outermost_lists(model)
    near = _name_of(model, _embedding(model)).rpartition(".")[0]
    inner = [block for block in lists if scope and _is_within(block.name, scope)]
    within = [block for block in inner if not re.search(OTHER, block.name[len(scope) :])]
    outside = [block for block in lists if not re.search(OTHER_OUTSIDE, block.name)]
    for candidates in (within, outside):
        of_depth = [block for block in candidates if len(block.modules) in depths]
        if of_depth:
            return [max(of_depth, key=lambda block: _nearness(block.name, near))]  # the first of equals
    for candidates in (within, outside):  # the depth is told otherwise: the list that holds the most weights
        holding = [block for block in candidates if _size(block.modules)]
        if holding and depths:
            largest = max(holding, key=lambda block: _size(block.modules))
            return [block for block in holding if _kinds(block.modules) == _kinds(largest.modules)]
    raise ModelError(
        "The decoder blocks of this model were not found",
        received=type(model).__name__,
        allowed="a causal language model of transformers whose blocks are one list of num_hidden_layers modules",
    )


def _depths(model: nn.Module) -> set[int]:
    """How many blocks the configuration of the text model names."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    except ValueError:  # several text models
        text = config
    known = {getattr(text, key, None) for key in ("num_hidden_layers", "num_layers")}
    named = getattr(text, "num_hidden_layers", None)
    return {named} if isinstance(named, int) and named in known else {n for n in known if isinstance(n, int)}


def _decoder_name(model: Any) -> str:
    """The name of the text decoder by transformers' own rule; empty where it is the model itself or unknown."""
    if not hasattr(model, "get_decoder"):
        return ""
    try:
        decoder = model.get_decoder()
    except (AttributeError, NotImplementedError, TypeError, ValueError):
        return ""
    return _name_of(model, decoder)


def _embedding(model: Any) -> nn.Module | None:
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return embedding if isinstance(embedding, nn.Module) else None


def _name_of(model: nn.Module, wanted: Any) -> str:
    return next((name for name, module in model.named_modules() if module is wanted), "")


def _outermost_lists(model: nn.Module) -> list[Blocks]:
    """Every list of modules that is not within another one."""
    found: list[Blocks] = []
    for name, module in model.named_modules():
        inside = any(_is_within(name, outer.name) for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            found.append(Blocks(name, module))
    return found


def _is_within(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _nearness(name: str, near: str) -> tuple[int, int]:
    """How many parts of two names are the same from the beginning, and how few come after those."""
    count = 0
    for one, other in zip(name.split("."), near.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count, -len(name.split("."))


def _size(modules: nn.ModuleList) -> int:
    return sum(parameter.numel() for parameter in modules.parameters() if parameter.ndim > 1)


def _kinds(modules: nn.ModuleList) -> set[type[nn.Module]]:
    return {type(within_wrappers(module)) for module in modules}


def within_wrappers(module: nn.Module) -> nn.Module:
    """What a module wraps whose name `plain` leaves out, however often; the module itself where it wraps nothing."""
    while (inner := next((module._modules[key] for key in WRAPPERS if key in module._modules), None)) is not None:
        module = inner
    return module


def peft_kinds() -> tuple[Any, Any]:
    """PEFT's wrappers of a module that is trained as a copy, and of an adapted layer; nothing that a module could be
    where PEFT has not been imported, which takes seconds."""
    if "peft" not in sys.modules:
        return (), ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return AuxiliaryTrainingWrapper, BaseTunerLayer
