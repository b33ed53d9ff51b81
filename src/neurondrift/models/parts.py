"""Which rows, columns and entries of which site a group means, and what tells two weights apart.

Owns the way from a group (neurons, weights, hidden units) to indices of matrices. A hidden unit of an MLP is its
gate and up rows and its down column; which ones, `sites.mlp_units` tells. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from neurondrift.base.errors import GroupError
from neurondrift.groups.group import Group, Indices
from neurondrift.models.sites import Site, Units, fingerprint, mlp_units

Index = tuple[Any, ...]

# Elements of a weight whose bits are looked at at a time.
BLOCK = 1 << 22


class Selection(NamedTuple):
    """The frozen weights of one site: whole rows, whole columns, and single entries (flat) outside both; int64."""

    rows: Indices
    columns: Indices
    entries: Indices

    def indices(self, width: int, device: torch.device) -> list[Index]:
        """What to index a matrix `[out, in]` with to see (or set) them, part by part; no weight of a row twice but
        where it crosses a column."""
        at = lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device)  # noqa: E731
        parts: list[Index] = []
        if len(self.rows):
            parts.append((at(self.rows),))
        if len(self.columns):
            parts.append((slice(None), at(self.columns)))
        if len(self.entries):
            parts.append((at(self.entries // width), at(self.entries % width)))
        return parts

    def count(self, shape: tuple[int, int]) -> int:
        """How many weights of a site of this shape are frozen."""
        out_features, in_features = shape
        crossing = len(self.columns) * (out_features - len(self.rows))
        return len(self.rows) * in_features + crossing + len(self.entries)


def selections(model: nn.Module, group: Group, sites: Mapping[str, Site]) -> dict[str, Selection]:
    """The weights that a group names, site by site, with whole rows and columns recognised as such.

    Raises `GroupError` for a group of another model, of other shapes or without members.
    """
    if not len(group):
        raise GroupError("The group has no members, so there is nothing to freeze")
    own = group.provenance.get("model")
    if own is not None and own != (name := fingerprint(model)):
        group.check_model(name, {})
    if group.granularity == "unit":
        return _of_units(group, sites)
    shapes = {name: site.shape for name, site in sites.items()}
    group.check_model(str(own), shapes)
    found = {}
    for name, members in group.members.items():
        shape = shapes[name]
        if name in group.shapes and tuple(group.shapes[name]) != tuple(shape):
            raise GroupError(
                f"The group was made for another shape of {name}", received=group.shapes[name], allowed=str(shape)
            )
        if group.granularity == "neuron":
            found[name] = Selection(members, _NONE, _NONE)
        else:
            found[name] = _of_weights(members, shape)
    return found


_NONE = np.empty(0, dtype=np.int64)


def _of_weights(members: Indices, shape: tuple[int, int]) -> Selection:
    out_features, in_features = shape
    row_of, column_of = np.divmod(members, in_features)
    rows = np.flatnonzero(np.bincount(row_of, minlength=out_features) == in_features)
    rest = ~np.isin(row_of, rows)
    free_rows = out_features - len(rows)
    counts = np.bincount(column_of[rest], minlength=in_features)
    columns = np.flatnonzero(counts == free_rows) if free_rows else _NONE
    rest &= ~np.isin(column_of, columns)
    return Selection(rows, columns, members[rest])


def _of_units(group: Group, sites: Mapping[str, Site]) -> dict[str, Selection]:
    units = mlp_units(dict(sites))
    rows: dict[str, list[Indices]] = {}
    columns: dict[str, Indices] = {}
    for name, members in group.members.items():
        if name not in units:
            raise GroupError(f"The model has no MLP {name}, which the group names")
        unit = units[name]
        if len(members) and members[-1] >= unit.count:
            raise GroupError(
                f"The group names a hidden unit beyond the end of {name}",
                received=int(members[-1]),
                allowed=f"below {unit.count}",
            )
        for up, offset in unit.ups:
            rows.setdefault(up, []).append(members + offset)
        columns[unit.down] = members
    return {
        name: Selection(np.sort(np.concatenate(rows[name])) if name in rows else _NONE, columns.get(name, _NONE), _NONE)
        for name in sites
        if name in rows or name in columns
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers: NaN equals NaN, and -0 is not 0."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def row_marks(weight_OI: torch.Tensor) -> torch.Tensor:
    """A 64-bit checksum of each row's bits, int64 `[out]`, that differs where any entry does (but for 1 in 2⁶⁴)."""
    generator = torch.Generator().manual_seed(0)
    factors_I = torch.randint(-(1 << 62), 1 << 62, (weight_OI.shape[1],), generator=generator) * 2 + 1
    factors_I = factors_I.to(weight_OI.device)
    size = max(1, BLOCK // max(1, weight_OI.shape[1]))
    return torch.cat([(bits(block).long() * factors_I).sum(dim=1) for block in weight_OI.split(size)])


Kind = Literal["rows", "columns", "entries"]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of one site: whole rows or columns (int64 indices), or single entries (bool `[out, in]`)."""

    kind: Kind
    index: torch.Tensor

    def complement(self, shape: tuple[int, int]) -> Part:
        """The rest of a site of this shape, of the same kind."""
        if self.kind == "entries":
            return Part("entries", ~self.index)
        rest = torch.ones(shape[0 if self.kind == "rows" else 1], dtype=torch.bool)
        rest[self.index] = False
        return Part(self.kind, rest.nonzero()[:, 0])

    def of(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The part's values, a copy."""
        if self.kind == "rows":
            return weight_OI[self.index]
        return weight_OI[:, self.index] if self.kind == "columns" else weight_OI[self.index]

    def put(self, weight_OI: torch.Tensor, values: torch.Tensor | float) -> None:
        """Write the part's values into a weight."""
        if self.kind == "rows":
            weight_OI[self.index] = values
        elif self.kind == "columns":
            weight_OI[:, self.index] = values
        else:
            weight_OI[self.index] = values


def parts_of(group: Group, sites: Mapping[str, Site]) -> dict[str, Part]:
    """The group as parts of sites. Weights that are whole rows, or whole columns, of a site become such.

    Raises `GroupError` where the group names a site (an MLP) or a member that the model does not have.
    """
    if group.granularity == "unit":
        return _parts_of_units(group, sites)
    parts = {}
    for name, indices in group.members.items():
        if not len(indices):
            continue
        if name not in sites:
            raise GroupError(f"The model has no site {name}, which the group names")
        rows, columns = sites[name].shape
        _check_end(name, int(indices[-1]), rows * (columns if group.granularity == "weight" else 1))
        members = torch.from_numpy(np.array(indices, dtype=np.int64))
        parts[name] = Part("rows", members) if group.granularity == "neuron" else _structured(members, (rows, columns))
    return parts


def _structured(flat: torch.Tensor, shape: tuple[int, int]) -> Part:
    rows, columns = shape
    mask = torch.zeros(shape, dtype=torch.bool)
    mask.view(-1)[flat] = True
    for kind, dimension, length in (("rows", 1, columns), ("columns", 0, rows)):
        counts = mask.sum(dim=dimension)
        if ((counts == 0) | (counts == length)).all():
            return Part(kind, counts.nonzero()[:, 0])  # type: ignore[arg-type]
    return Part("entries", mask)


def _parts_of_units(group: Group, sites: Mapping[str, Site]) -> dict[str, Part]:
    units = mlp_units(dict(sites))
    rows: dict[str, list[torch.Tensor]] = {}
    parts: dict[str, Part] = {}
    for name, indices in group.members.items():
        if name not in units:
            raise GroupError(f"The model has no MLP {name}, which the group names")
        unit = units[name]
        _check_end(name, int(indices[-1]), unit.count)
        members = torch.from_numpy(np.array(indices, dtype=np.int64))
        for site, offset in unit.ups:
            rows.setdefault(site, []).append(members + offset)
        parts[unit.down] = Part("columns", members)
    return parts | {site: Part("rows", torch.cat(own).unique()) for site, own in rows.items()}


def _check_end(name: str, last: int, limit: int) -> None:
    if last >= limit:
        raise GroupError(f"The group names a member beyond the end of {name}", received=last, allowed=f"below {limit}")


def unit_scores(scores: Mapping[str, Any], units: Mapping[str, Units]) -> dict[str, npt.NDArray[np.float32]]:
    """Importance of every hidden unit: the sum over all weights of its rows and its column.

    Parameters
    ----------
    scores
        Site name -> `[out, in]`.
    units
        From `mlp_units`.

    Returns
    -------
    MLP name -> float32 `[units]`, for `select_top(..., granularity="unit")`.

    Raises
    ------
    GroupError
        Scores of whole neurons: a unit's column has none.
    """
    result = {}
    for name, unit in units.items():
        down = np.asarray(scores[unit.down])
        if down.ndim != 2:
            raise GroupError(f"The scores of {unit.down} are of neurons: a unit needs those of weights")
        total = down.sum(axis=0, dtype=np.float64)
        for site, offset in unit.ups:
            total += np.asarray(scores[site])[offset : offset + unit.count].sum(axis=1, dtype=np.float64)
        result[name] = total.astype(np.float32)
    return result


def weights_of_units(group: Group, units: Mapping[str, Units], shapes: Mapping[str, tuple[int, int]]) -> Group:
    """The same group as single weights: every entry of each unit's rows and column.

    `shapes` are those of the model's sites. Raises `GroupError` for a group that is not of units.
    """
    if group.granularity != "unit":
        raise GroupError("Only a group of hidden units has unit weights", received=group.granularity)
    parts: dict[str, list[Indices]] = {}
    for name, chosen in group.members.items():
        unit = units[name]
        for site, offset in unit.ups:
            width = shapes[site][1]
            parts.setdefault(site, []).append(((chosen + offset)[:, None] * width + np.arange(width)).reshape(-1))
        rows, width = shapes[unit.down]
        parts.setdefault(unit.down, []).append((np.arange(rows)[:, None] * width + chosen).reshape(-1))
    members = {site: np.unique(np.concatenate(parts[site])) for site in shapes if site in parts}
    provenance = {"rule": "weights of units", "of": dict(group.provenance)}
    if "model" in group.provenance:
        provenance["model"] = group.provenance["model"]
    return Group(granularity="weight", members=members, shapes=dict(shapes), provenance=provenance)


def as_weights(group: Group, sites: Mapping[str, Site]) -> Group:
    """A group of weights as it is, one of hidden units as the weights of their rows and columns."""
    if group.granularity != "unit":
        return group
    return weights_of_units(group, mlp_units(dict(sites)), {name: site.shape for name, site in sites.items()})
