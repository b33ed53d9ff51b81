"""One mapping of names: what a file calls a tensor or module -> what the model calls it.

Owns the text model's place within a multimodal one, older names of experts, and the prefixes of other trainers; what
wraps a module is `base/names.py`'s. Checkpoints and adapters, read from their files or loaded, all ask here, so that
they cannot disagree. Knows no file and no number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from neurondrift.base.errors import ModelError
from neurondrift.base.names import plain
from neurondrift.models.disk.names import conversions
from neurondrift.models.sites import linear_sites

# What may stand before the decoder's own names, in one trainer's or version's files and not in another's.
LEADING = ("model", "language_model", "text_model", "base_model", "transformer", "decoder", "backbone", "llm")
# Names for one and the same, in older and newer versions of transformers and of its families.
SAME = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj", "block_sparse_moe": "mlp", "feed_forward": "mlp"}
# How transformers makes one parameter of a layer's experts: one after the other, and gate before up.
STACKED = ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name of each tensor of a full model in a file -> its plain name.

    A trainer that keeps the model as its own attribute `model` (Lightning) puts `model.` before every name.

    Raises `ModelError` where two names are the same without their wrappers.
    """
    found = {name: plain(name) for name in names}
    inner = [name.removeprefix("model.") for name in found.values()]
    if (
        found
        and all(name.startswith("model.") for name in found.values())
        and any(name.startswith(("model.", "transformer.")) for name in inner)
        and not any(name.startswith(("layers.", "language_model.", "embed_tokens.")) for name in inner)
    ):
        found = dict(zip(found, inner, strict=True))
    if len(set(found.values())) != len(found):
        twice = next(name for name in found.values() if list(found.values()).count(name) > 1)
        raise ModelError(
            f"Two tensors of the files are both {twice}",
            received=[name for name, own in found.items() if own == twice],
            fix="keep one of them",
        )
    return found


class Place(NamedTuple):
    """Where something belongs in the model: a module, or part `piece` of `pieces` (rows) of one expert of a stacked
    parameter."""

    module: str
    expert: int | None = None
    piece: int = 0
    pieces: int = 1


def names_of(model: PreTrainedModel) -> Names:
    """The names of a model, with or without its numbers, its sites among them where they are found."""
    try:
        shapes: Mapping[str, tuple[int, int]] = linear_sites(model).shapes
    except ModelError:  # an adapter can be run on a model whose drift cannot be measured
        shapes = {}
    return Names(shapes, (plain(name) for name, _ in model.named_modules() if name), conversions(model))


class Names:
    """The names of one model.

    Parameters
    ----------
    shapes
        Site name -> `(out, in)`.
    modules
        Names of all modules that hold tensors.
    conversions
        transformers' own renamings and conversions for the model.

    Attributes
    ----------
    experts
        Name of a parameter that stacks experts -> how many.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        modules: Iterable[str],
        conversions: tuple[Sequence[Any], Sequence[Any]],
    ) -> None:
        self.shapes = shapes
        self._conversions = conversions
        self.experts: dict[str, int] = {}
        cores = {_core(site) for site in shapes}  # a tensor on disk may lack the prefix that its site has
        own = {name for name in modules if name in shapes or _core(name) not in cores}
        for site in shapes:
            stack, _, last = site.rpartition(".")
            if last.isdigit() and site not in own:
                self.experts[stack] = self.experts.get(stack, 0) + 1
        holders = {stack.rpartition(".")[0] for stack in self.experts}
        self.modules = own | holders | {site for site in shapes if site.rpartition(".")[0] not in self.experts}

    def find(self, name: str) -> Place | None:
        """Where a module of an adapter or checkpoint belongs; None where the model has nothing of that name."""
        if name in self.modules:
            return Place(name)
        bare = plain(name)
        if bare in self.modules:
            return Place(bare)
        for candidate in dict.fromkeys(_same(bare)):
            place = self._converted(candidate) or self._by_core(candidate)
            if place is not None:
                return place
        return None

    def key(self, name: str) -> str | None:
        """A tensor's plain name with its module as the model calls it; None where no module fits."""
        parts = plain(name).split(".")
        for wanted in (self._exact, self.find):
            for stop in range(len(parts) - 1, 0, -1):
                place = wanted(".".join(parts[:stop]))
                if place is not None and place.expert is None:
                    return ".".join([place.module, *parts[stop:]])
        return None

    def _exact(self, name: str) -> Place | None:
        return Place(name) if name in self.modules else None

    def _converted(self, module: str) -> Place | None:
        """By transformers' own renamings, and its ways of stacking experts."""
        from transformers.core_model_loading import rename_source_key

        renamings, converters = self._conversions
        if not renamings and not converters:
            return None
        name, pattern = rename_source_key(f"{module}.weight", renamings, converters)
        if pattern is None:
            return self._by_core(name.removesuffix(".weight"))
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
        number = re.search(r"\.experts\.(\d+)\.", f"{module}.")
        stack = self._cores_of_stacks.get(_core(name.removesuffix(".weight")))
        if operations not in STACKED or number is None or stack is None or int(number[1]) >= self.experts[stack]:
            return None
        sources = list(converter.source_patterns)
        return Place(stack, int(number[1]), sources.index(pattern), len(sources))

    def _by_core(self, name: str) -> Place | None:
        found = self._cores.get(_core(name), ())
        return Place(found[0]) if len(found) == 1 else None

    @cached_property
    def _cores(self) -> dict[str, list[str]]:
        cores: dict[str, list[str]] = {}
        for name in self.modules:
            cores.setdefault(_core(name), []).append(name)
        return cores

    @cached_property
    def _cores_of_stacks(self) -> dict[str, str]:
        return {_core(stack): stack for stack in self.experts}


def _core(name: str) -> str:
    """What is left of a name behind the modules that may stand before the decoder's own."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in LEADING:
        parts = parts[1:]
    return ".".join(parts)


def _same(name: str) -> Iterator[str]:
    """A name, and what other versions call the same."""
    yield name
    if ".experts." not in name and ".block_sparse_moe." not in name:
        return
    parts = name.split(".")
    backwards = {new: old for old, new in SAME.items() if old.startswith("w")}
    for of_leaf in (SAME, backwards, {}):
        leaf = of_leaf.get(parts[-1], parts[-1])
        for holder in ("mlp", "block_sparse_moe", "feed_forward"):
            inner = [holder if part in ("mlp", "block_sparse_moe", "feed_forward") else part for part in parts[:-1]]
            yield ".".join([*inner, leaf])
