"""Which rows, columns and entries of which site a group means, and what tells two weights apart.

Owns the way from a group (neurons, weights, hidden units) to indices of matrices: `parts`, of which the other forms are
views. A hidden unit of an MLP is its gate and up rows and its down column; which ones, `Sites.units` tells. Knows
nothing of training.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from neurondrift.base.errors import GroupError, ModelError
from neurondrift.groups.group import Group, Indices
from neurondrift.models.architecture.heads import attention_heads
from neurondrift.models.sites import Sites, Units, unwrap

Index = tuple[Any, ...]
Kind = Literal["rows", "columns", "entries"]
#: What is scored as one: an output row of a site, a hidden unit of an MLP, a head of an attention.
Unit = Literal["row", "hidden_unit", "head"]

# Elements of a weight whose bits are looked at at a time.
BLOCK = 1 << 22

_NONE: Indices = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """What a group means in one site: whole rows, whole columns, and single entries (flat) outside both; int64,
    ascending. `shape` is that of the site."""

    shape: tuple[int, int]
    rows: Indices = field(default_factory=lambda: _NONE)
    columns: Indices = field(default_factory=lambda: _NONE)
    entries: Indices = field(default_factory=lambda: _NONE)

    @property
    def weights(self) -> int:
        """How many single weights these are."""
        out_features, in_features = self.shape
        crossing = len(self.columns) * (out_features - len(self.rows))
        return len(self.rows) * in_features + crossing + len(self.entries)

    def indices(self, device: torch.device) -> list[Index]:
        """What to index a matrix `[out, in]` with to see (or set) them, piece by piece; no weight of a row twice but
        where it crosses a column."""
        pieces: list[Index] = []
        if len(self.rows):
            pieces.append((_on(self.rows, device),))
        if len(self.columns):
            pieces.append((slice(None), _on(self.columns, device)))
        if len(self.entries):
            width = self.shape[1]
            pieces.append((_on(self.entries // width, device), _on(self.entries % width, device)))
        return pieces

    def mask(self) -> npt.NDArray[np.bool_]:
        """Which weights of the site these are, `[out, in]`."""
        mask = np.zeros(self.shape, dtype=bool)
        mask[self.rows] = True
        mask[:, self.columns] = True
        mask.reshape(-1)[self.entries] = True
        return mask

    def flat(self) -> Indices:
        """Each weight once, as `row * in + column`, ascending."""
        return np.flatnonzero(self.mask())

    def region(self) -> Region:
        """The same as rows alone, as columns alone, or else as entries."""
        if not len(self.columns) and not len(self.entries):
            return Region("rows", _on(self.rows))
        if not len(self.rows) and not len(self.entries):
            return Region("columns", _on(self.columns))
        return Region("entries", torch.from_numpy(self.mask()))


def _on(indices: Indices, device: torch.device | None = None) -> torch.Tensor:
    """The indices as a tensor, a copy."""
    return torch.from_numpy(np.array(indices, dtype=np.int64)).to(device)


@dataclass(frozen=True, eq=False)
class Region:
    """Weights of one site that are all of one kind: whole rows or columns (int64 indices), or single entries (bool
    `[out, in]`)."""

    kind: Kind
    index: torch.Tensor

    def complement(self, shape: tuple[int, int]) -> Region:
        """The rest of a site of this shape, of the same kind."""
        if self.kind == "entries":
            return Region("entries", ~self.index)
        rest = torch.ones(shape[0 if self.kind == "rows" else 1], dtype=torch.bool)
        rest[self.index] = False
        return Region(self.kind, rest.nonzero()[:, 0])

    def of(self, weight_OI: torch.Tensor) -> torch.Tensor:
        """The region's values, a copy."""
        if self.kind == "rows":
            return weight_OI[self.index]
        return weight_OI[:, self.index] if self.kind == "columns" else weight_OI[self.index]

    def put(self, weight_OI: torch.Tensor, values: torch.Tensor | float) -> None:
        """Write the region's values into a weight."""
        if self.kind == "rows":
            weight_OI[self.index] = values
        elif self.kind == "columns":
            weight_OI[:, self.index] = values
        else:
            weight_OI[self.index] = values


@dataclass(frozen=True, kw_only=True)
class Compound:
    """The hidden units of an MLP, or the heads of an attention: rows of some sites and columns of one.

    Member m has rows `offset + step * m` and the `size - 1` next ones of each of `ups` (site, offset, step), and
    columns `size * m` to `size * (m + 1)` of the site `down`.
    """

    count: int
    size: int
    ups: tuple[tuple[str, int, int], ...]
    down: str

    @property
    def sites(self) -> set[str]:
        """Names of the sites in which a member has weights."""
        return {self.down, *(site for site, _, _ in self.ups)}

    def rows(self, offset: int, step: int) -> torch.Tensor:
        """The rows of all members in a site of `ups`, int64 `[count, size]`."""
        return offset + step * torch.arange(self.count)[:, None] + torch.arange(self.size)

    def parts(self, members: Indices, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Part]:
        """Site -> the rows and columns of some members; `shapes` are those of the model's sites."""
        rows: dict[str, list[Indices]] = {}
        for site, offset, step in self.ups:
            rows.setdefault(site, []).append(self.rows(offset, step)[members].flatten().numpy())
        columns = (self.size * np.asarray(members)[:, None] + np.arange(self.size)).flatten()
        return {
            site: Part(
                shape=shapes[site],
                rows=np.sort(np.concatenate(rows[site])) if site in rows else _NONE,
                columns=np.sort(columns) if site == self.down else _NONE,
            )
            for site in sorted(self.sites)
        }

    def sums(
        self, rows: Mapping[str, torch.Tensor], columns: Mapping[str, torch.Tensor], *, cut: bool = False
    ) -> torch.Tensor | None:
        """What is known of rows and columns `[n, ...]`, added up over each member, `[count, ...]`; None where nothing
        is. With `cut` what is given of columns is `[count, ...]` already."""
        found = [rows[site][self.rows(offset, step)].sum(dim=1) for site, offset, step in self.ups if site in rows]
        if self.down in columns:
            own = columns[self.down]
            found.append(own if cut else own.reshape(self.count, self.size, *own.shape[1:]).sum(dim=1))
        return torch.stack(found).sum(dim=0) if found else None


def compounds(sites: Sites, unit: Unit) -> dict[str, Compound]:
    """MLP -> its hidden units, or attention module -> its heads. Rows are no compounds.

    Raises `ModelError` where a model has none that are known.
    """
    if unit == "hidden_unit":
        return {
            name: Compound(
                count=one.count, size=1, ups=tuple((site, offset, one.step) for site, offset in one.ups), down=one.down
            )
            for name, one in sites.units.items()
        }
    found = attention_heads(unwrap(sites.model).config, sites.shapes) if unit == "head" else {}
    if not found:
        raise ModelError("No attention heads were found among the sites", received=type(unwrap(sites.model)).__name__)
    return {
        name: Compound(count=heads.count, size=heads.size, ups=heads.ups, down=heads.down)
        for name, heads in found.items()
    }


def parts(group: Group, sites: Sites) -> dict[str, Part]:
    """Site name -> what the group means there; whole rows and columns among single weights are recognised as such.

    Raises `GroupError` where the group names a site (an MLP) or a member that the model does not have, or was made for
    another shape of a site.
    """
    if group.granularity == "unit":
        return _parts_of_units(group, sites.units, sites.shapes)
    if group.granularity == "head":
        return _parts_of_heads(group, sites)
    group.check_members(sites.shapes)
    result = {}
    for name, members in group.members.items():
        shape = sites.shapes[name]
        if name in group.shapes and tuple(group.shapes[name]) != shape:
            raise GroupError(
                f"The group was made for another shape of {name}", received=group.shapes[name], allowed=str(shape)
            )
        if len(members):
            is_rows = group.granularity == "neuron"
            result[name] = Part(shape=shape, rows=members) if is_rows else _parts_of_weights(members, shape)
    return result


def _parts_of_weights(flat: Indices, shape: tuple[int, int]) -> Part:
    out_features, in_features = shape
    row_of, column_of = np.divmod(flat, in_features)
    is_row = np.bincount(row_of, minlength=out_features) == in_features
    rest = ~is_row[row_of]
    free_rows = out_features - int(is_row.sum())
    is_column = (np.bincount(column_of[rest], minlength=in_features) == free_rows) & (free_rows > 0)
    rest &= ~is_column[column_of]
    return Part(shape=shape, rows=np.flatnonzero(is_row), columns=np.flatnonzero(is_column), entries=flat[rest])


def _parts_of_units(group: Group, units: Mapping[str, Units], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Part]:
    rows: dict[str, list[Indices]] = {}
    columns: dict[str, Indices] = {}
    for name, members in group.members.items():
        if name not in units:
            raise GroupError(f"The model has no MLP {name}, which the group names")
        if not len(members):
            continue
        unit = units[name]
        if members[-1] >= unit.count:
            raise GroupError(
                f"The group names a hidden unit beyond the end of {name}",
                received=int(members[-1]),
                allowed=f"below {unit.count}",
            )
        for up, offset in unit.ups:
            rows.setdefault(up, []).append(unit.step * members + offset)
        columns[unit.down] = members
    return {
        name: Part(
            shape=shape,
            rows=np.sort(np.concatenate(rows[name])) if name in rows else _NONE,
            columns=columns.get(name, _NONE),
        )
        for name, shape in shapes.items()
        if name in rows or name in columns
    }


def _parts_of_heads(group: Group, sites: Sites) -> dict[str, Part]:
    heads = compounds(sites, "head")
    result: dict[str, Part] = {}
    for name, members in group.members.items():
        if name not in heads:
            raise GroupError(f"The model has no attention {name} with heads, which the group names")
        if len(members) and members[-1] >= heads[name].count:
            raise GroupError(
                f"The group names a head beyond the end of {name}",
                received=int(members[-1]),
                allowed=f"below {heads[name].count}",
            )
        if len(members):
            result |= heads[name].parts(members, sites.shapes)
    return {name: result[name] for name in sites if name in result}


def members_within(group: Group, sites: Sites, names: Container[str]) -> int:
    """How many members have weights in the sites named; for a hidden unit one of its sites is enough."""

    def lies_within(name: str) -> bool:
        own = {name}
        if group.granularity in ("unit", "head"):
            own = compounds(sites, "hidden_unit" if group.granularity == "unit" else "head")[name].sites
        return any(site in names for site in own)

    return sum(len(indices) for name, indices in group.members.items() if lies_within(name))


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
            total += np.asarray(scores[site])[unit.rows(offset)].sum(axis=1, dtype=np.float64)
        result[name] = total.astype(np.float32)
    return result


def weights_of_units(group: Group, units: Mapping[str, Units], shapes: Mapping[str, tuple[int, int]]) -> Group:
    """The same group as single weights: every entry of each unit's rows and column.

    `units` and `shapes` are those of the model's sites. Raises `GroupError` for a group that is not of units, or of
    units that the model does not have.
    """
    if group.granularity != "unit":
        raise GroupError("Only a group of hidden units has unit weights", received=group.granularity)
    members = {name: part.flat() for name, part in _parts_of_units(group, units, shapes).items()}
    provenance = {"rule": "weights of units", "of": dict(group.provenance)}
    if "model" in group.provenance:
        provenance["model"] = group.provenance["model"]
    return Group(granularity="weight", members=members, shapes=dict(shapes), provenance=provenance)


def as_weights(group: Group, sites: Sites) -> Group:
    """A group of hidden units or heads as the weights of their rows and columns; any other as it is."""
    if group.granularity == "head":
        members = {name: part.flat() for name, part in _parts_of_heads(group, sites).items()}
        whole = Group(granularity="weight", members=members, shapes=dict(sites.shapes), provenance=group.provenance)
        return whole.with_members(members, {"rule": "weights of heads", "of": dict(group.provenance)})
    return weights_of_units(group, sites.units, sites.shapes) if group.granularity == "unit" else group
