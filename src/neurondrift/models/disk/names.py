"""Which tensors of a checkpoint make which site: transformers' own way of loading, told by the model without numbers.

Owns the way from the names on disk to the sites of `sites.linear_sites(load_model(folder))`: names, order, shapes and
orientation are those of the very class that `load_model` makes (`architecture.classes.skeleton`), and what renames,
fuses and splits tensors is transformers' own table. Reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from neurondrift.base.errors import ModelError
from neurondrift.models.architecture.complete import check_complete
from neurondrift.models.sites import Site, Sites


class Part(NamedTuple):
    """Rows of a site: a slice of one tensor of a checkpoint.

    `expert` picks from the first axis of a 3-D tensor; `rows` (start, stop) is a range of a 2-D tensor's first axis,
    None for all of it; `transposed` says that the tensor is stored `[in, out]`.
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False


class SiteName(NamedTuple):
    """A site of a checkpoint: its name, decoder block, module type, and the tensors that make it, row after row."""

    name: str
    layer: int
    module_type: str
    parts: tuple[Part, ...]


def find_sites(shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel, reference: str) -> list[SiteName]:
    """The sites of a checkpoint, named and ordered as those of the model that `load_model` would make of it.

    Parameters
    ----------
    shapes
        Tensor name on disk -> shape.
    model
        The model without numbers.
    reference
        What messages call the checkpoint.

    Raises
    ------
    ModelError
        Weights of sites that are in no file, tensors that the model has no place for, sizes that differ: as
        `load_model` says it; a conversion that cannot be read site by site.
    """
    sites = Sites(model)
    named: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named.setdefault(id(parameter), []).append(name)
    loaded, unexpected = as_loaded(shapes, model)
    wanted = {name: named.get(id(site.tensor), [f"{name}.weight"]) for name, site in sites.items()}
    state = model.state_dict()
    info = {
        "missing_keys": {keys[0] for keys in wanted.values() if not any(key in loaded for key in keys)},
        "unexpected_keys": unexpected,
        "mismatched_keys": {
            (name, tensor.shape, tuple(state[name].shape))
            for name, tensor in loaded.items()
            if tensor.shape is not None and tensor.shape != tuple(state[name].shape)
        },
    }
    check_complete(model, info, reference)
    return [
        SiteName(
            name, site.layer, site.module_type, _parts(site, next(key for key in wanted[name] if key in loaded), loaded)
        )
        for name, site in sites.items()
    ]


class Loaded(NamedTuple):
    """A parameter of the loaded model: its shape, and the tensors on disk that make it.

    `sources` holds for each stacked piece the tensors of that piece: one tensor, or one for each expert. `transposed`:
    its last two axes are stored the other way round. `unknown` names a conversion that cannot be read in parts; the
    shape is None then.
    """

    shape: tuple[int, ...] | None
    sources: tuple[tuple[str, ...], ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False
    unknown: str = ""

    def parts(self, expert: int | None) -> tuple[Part, ...]:
        """The tensors that make this parameter, or one expert of it."""
        if expert is None:
            return tuple(Part(piece[0], None, self.rows, self.transposed) for piece in self.sources)
        if any(len(piece) > 1 for piece in self.sources):
            return tuple(Part(piece[expert], transposed=self.transposed) for piece in self.sources)
        return tuple(Part(piece[0], expert, None, self.transposed) for piece in self.sources)


def _parts(site: Site, key: str, loaded: Mapping[str, Loaded]) -> tuple[Part, ...]:
    """The tensors that make a site, out of the parameter that holds it."""
    stored = loaded[key]
    if stored.unknown or (site.transposed and (len(stored.sources) > 1 or stored.rows is not None)):
        raise ModelError(
            f"transformers converts the tensors of {key} in a way that cannot be read site by site",
            received=stored.unknown or "rows of a weight that is stored [in, out]",
            fix="load both models and call nd.compare_models(before, after)",
        )
    return tuple(part._replace(transposed=part.transposed != site.transposed) for part in stored.parts(site.expert))


def as_loaded(shapes: Mapping[str, tuple[int, ...]], model: PreTrainedModel) -> tuple[dict[str, Loaded], set[str]]:
    """The parameters of the loaded model, by transformers' own renamings and conversions; and what is left over."""
    from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

    renamings, converters = conversions(model)
    state = model.state_dict()
    found: dict[str, Loaded] = {}
    collected: dict[str, dict[str, list[str]]] = {}
    used: dict[str, WeightConverter] = {}
    unexpected: set[str] = set()
    for key in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as transformers does: it should not have been renamed
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, state)
        if name not in state:
            unexpected.add(name if pattern is not None else key)
        elif pattern is None:
            found[name] = Loaded(shapes[key], ((key,),))
        else:
            collected.setdefault(name, {}).setdefault(pattern, []).append(key)
            used[name] = next(entry for entry in converters if pattern in entry.source_patterns)
    for name, tensors in collected.items():
        made = _convert(name, used[name], tensors, shapes, tuple(state[name].shape))
        found |= {one: loaded for one, loaded in made.items() if one in state}
    return found, _not_ignored(unexpected, model)


def conversions(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings and its conversions for a model and for the models nested in it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    entries = get_model_conversion_mapping(model)
    return (
        [entry for entry in entries if not isinstance(entry, WeightConverter)],
        [entry for entry in entries if isinstance(entry, WeightConverter)],
    )


def _not_ignored(unexpected: Iterable[str], model: PreTrainedModel) -> set[str]:
    """Without what the model's class says that its files may hold beside it, such as blocks that predict further."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {name for name in unexpected if not any(re.search(pattern, name) for pattern in patterns)}


def _convert(
    name: str,
    converter: Any,
    collected: Mapping[str, list[str]],
    shapes: Mapping[str, tuple[int, ...]],
    wanted: tuple[int, ...],
) -> dict[str, Loaded]:
    """The parameters that one conversion makes, the first of shape `wanted`.

    Reading is by rows, so only conversions of rows are known: stacking experts, joining along the rows, splitting
    rows, and turning the two axes of every expert.
    """
    operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in converter.operations]
    pieces = tuple(tuple(collected[pattern]) for pattern in converter.source_patterns if pattern in collected)
    first = shapes[pieces[0][0]]
    whole = len(pieces) == len(converter.source_patterns)
    targets = [name.replace(converter.target_patterns[0], target) for target in converter.target_patterns]
    if operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        counts = {len(piece) for piece in pieces}
        if not whole or len(counts) != 1:
            raise ModelError(f"Experts of {name} are missing in the checkpoint", received=f"{sorted(counts)} tensors")
        rows = sum(shapes[piece[0]][0] for piece in pieces)
        return {name: Loaded((counts.pop(), rows, *first[1:]), pieces)}
    if whole and (operations == [("Concatenate", 0)] or (operations == [("Concatenate", 1)] and len(first) == 3)):
        flat = tuple((tensor,) for piece in pieces for tensor in piece)
        axis = 0 if operations == [("Concatenate", 0)] else 1
        size = sum(shapes[piece[0]][axis] for piece in flat)
        return {name: Loaded((*first[:axis], size, *first[axis + 1 :]), flat)}
    if operations == [("Chunk", 0)] and getattr(converter.operations[0], "num_shards_attribute", None) is None:
        size = -(-first[0] // len(targets))
        ranges = [(start, min(start + size, first[0])) for start in range(0, first[0], size)]
        return {
            target: Loaded((stop - start, *first[1:]), pieces, (start, stop))
            for target, (start, stop) in zip(targets, ranges, strict=True)
        }
    if [kind for kind, _ in operations] == ["Transpose"] and len(first) == 3 and len(pieces) == 1:
        turn = converter.operations[0]
        if turn.check_dims and first == wanted:
            return {name: Loaded(first, pieces)}
        if sorted((turn.dim0, turn.dim1)) == [1, 2]:
            return {name: Loaded((first[0], first[2], first[1]), pieces, transposed=True)}
    unknown = " then ".join(kind for kind, _ in operations)
    return {target: Loaded(None, pieces, unknown=unknown) for target in targets}
