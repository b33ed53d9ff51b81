"""Which weights of which site a group means, as rows, columns and single entries; and what tells two weights apart.

Owns the way from a group (neurons, weights, hidden units) to indices of matrices. Knows nothing of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from neurondrift.errors import GroupError
from neurondrift.groups import Group, Indices
from neurondrift.sites import Site, fingerprint, mlp_units

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
