"""A group: a set of neurons, weights or hidden units with its provenance, the algebra of such sets, and its files.

The set comes first, then how it is written and read: as Parquet (site, row, col) that pandas, polars and DuckDB read,
or as plain JSON of neurons. Knows arrays and files; no model, and not how a group is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.base.files import atomic_path, read_json, read_parquet, write_json
from neurondrift.base.roles import ROLES, Role, role_of_name

Granularity = Literal["neuron", "weight", "unit", "head"]
Indices: TypeAlias = npt.NDArray[np.int64]

# Of the Parquet file: the version of its header, and the columns of a tile, which its rows are ordered by.
FORMAT = 1
TILE = 256


@dataclass(frozen=True, kw_only=True)
class Group:
    """A set of neurons, weights or hidden units.

    Attributes
    ----------
    granularity
        `neuron` (rows of sites), `weight` (single entries), `unit` (hidden units of MLPs: a "site" is then
        the name of an MLP) or `head` (of attentions, likewise).
    members
        Site name -> sorted, distinct int64: rows of the site, or flat indices `row * in + col`. Sites without
        members are left out.
    shapes
        Site name -> `(out, in)` for every site that was eligible, also those without members. Empty where a
        group was read from plain JSON.
    provenance
        Where it comes from: `model` (fingerprint), `rule`, `method`, `data`, `seed` as far as they are known; and
        `role`, what it is to a study.
    """

    granularity: Granularity
    members: Mapping[str, Indices]
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.members.values())

    @property
    def role(self) -> Role | None:
        """What the group is to a study, as its provenance says: one of `base.roles.ROLES`; None for any
        other. Where it names no role (files of older versions), its rule can."""
        if "role" in self.provenance:
            return next((role for role in ROLES if role == self.provenance["role"]), None)
        by_rule: dict[str, Role] = {"random": "random", "matched": "control"}
        return by_rule.get(str(self.provenance.get("rule")))

    def rows(self, site: str) -> Indices:
        """Rows of a site's members (for weights: one entry per weight, ascending)."""
        indices = self.members.get(site, np.empty(0, dtype=np.int64))
        return indices // self.shapes[site][1] if self.granularity == "weight" else indices

    def columns(self, site: str) -> Indices:
        """Columns of a site's weights. Raises `GroupError` for a group of neurons or units."""
        if self.granularity != "weight":
            raise GroupError(f"A group of {self.granularity}s has no columns")
        return self.members.get(site, np.empty(0, dtype=np.int64)) % self.shapes[site][1]

    def mask(self, site: str) -> npt.NDArray[np.bool_]:
        """Membership as booleans: `[out]` for neurons, `[out, in]` for weights."""
        out_features, in_features = self.shapes[site]
        shape = (out_features, in_features) if self.granularity == "weight" else (out_features,)
        mask = np.zeros(shape, dtype=bool)
        mask.reshape(-1)[self.members.get(site, [])] = True
        return mask

    def __or__(self, other: Group) -> Group:
        return self._combine(other, np.union1d, "union")

    def __and__(self, other: Group) -> Group:
        return self._combine(other, lambda a, b: np.intersect1d(a, b, assume_unique=True), "intersection")

    def __sub__(self, other: Group) -> Group:
        return self._combine(other, lambda a, b: np.setdiff1d(a, b, assume_unique=True), "difference")

    def complement(self) -> Group:
        """Everything that is eligible and not in the group."""
        if not self.shapes:
            raise GroupError("A group without shapes has no complement", fix="read it from Parquet rather than JSON")
        members = {site: np.flatnonzero(~self.mask(site).reshape(-1)) for site in self.shapes}
        return self.with_members(members, {"rule": "complement", "of": dict(self.provenance)})

    def _combine(self, other: Group, operation: Callable[[Indices, Indices], Indices], rule: str) -> Group:
        if self.granularity != other.granularity:
            raise GroupError(
                "Groups of different granularity do not combine", received=f"{self.granularity}, {other.granularity}"
            )
        require_same_model(self, other)
        empty = np.empty(0, dtype=np.int64)
        sites = list(dict.fromkeys([*self.members, *other.members]))
        members = {site: operation(self.members.get(site, empty), other.members.get(site, empty)) for site in sites}
        shapes = {**other.shapes, **self.shapes}
        order = {site: index for index, site in enumerate(shapes)}
        members = {site: members[site] for site in sorted(sites, key=lambda s: order.get(s, len(order)))}
        provenance = {"rule": rule, "of": [dict(self.provenance), dict(other.provenance)]}
        if "model" in self.provenance or "model" in other.provenance:
            provenance["model"] = self.provenance.get("model", other.provenance.get("model"))
        return Group(granularity=self.granularity, members=without_empty(members), shapes=shapes, provenance=provenance)

    def with_members(self, members: Mapping[str, Indices], provenance: Mapping[str, Any]) -> Group:
        """A group over the same sites and model with other members."""
        if "model" in self.provenance:
            provenance = {"model": self.provenance["model"], **provenance}
        return Group(
            granularity=self.granularity, members=without_empty(members), shapes=self.shapes, provenance=provenance
        )

    def check_model(self, fingerprint: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `GroupError` unless the group was made from the model with this fingerprint and these sites."""
        self.check_origin(fingerprint)
        self.check_members(shapes)

    def check_origin(self, fingerprint: str) -> None:
        """Raise `GroupError` where the group says that it was made from a model with another fingerprint."""
        own = self.provenance.get("model")
        if own is not None and own != fingerprint:
            raise GroupError(
                "The group was made from another model",
                received=f"group of {own}, model {fingerprint}",
                fix="make the group from this model: neurondrift score and groups",
            )

    def check_members(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `GroupError` unless every member lies in a site of one of these names, and not beyond its end."""
        for site, indices in self.members.items():
            if site not in shapes:
                raise GroupError(f"The model has no site {site}, which the group names")
            out_features, in_features = shapes[site]
            limit = out_features * (in_features if self.granularity == "weight" else 1)
            if len(indices) and indices[-1] >= limit:
                raise GroupError(
                    f"The group names a member beyond the end of {site}",
                    received=int(indices[-1]),
                    allowed=f"below {limit}",
                )

    def save(self, path: str | Path) -> None:
        """Write the group as Parquet (columns site, row, col; provenance in the metadata) or, by the
        ending `.json`, a group of neurons as `{site: [rows]}`."""
        path = Path(path)
        if path.suffix == ".json":
            if self.granularity != "neuron":
                raise GroupError("Only groups of neurons are written as JSON", received=str(path), fix="use .parquet")
            write_json(path, {site: rows.tolist() for site, rows in self.members.items()})
        elif path.suffix == ".parquet":
            write_parquet(path, self)
        else:
            raise GroupError("A group is written as .parquet or .json", received=str(path))


def role_of(group: Group, name: str) -> Role | None:
    """The role of a group that is called `name`: by its provenance, or by its name where that has none."""
    return group.role if "role" in group.provenance else group.role or role_of_name(name)


def without_empty(members: Mapping[str, Indices]) -> dict[str, Indices]:
    return {site: indices for site, indices in members.items() if len(indices)}


def require_same_model(first: Group, second: Group) -> None:
    """Raise `GroupError` where two groups are known to come from different models."""
    models = {group.provenance["model"] for group in (first, second) if "model" in group.provenance}
    if len(models) > 1:
        raise GroupError("The groups were made from different models", received=sorted(models))


def write_parquet(path: Path, group: Group) -> None:
    """Write a group as Parquet, its shapes and provenance in the metadata. See `Group.save`.

    Weights are ordered by half tiles: of all sites' tiles of 256 columns first the columns 0 to 127, then the others;
    within each half by site, tile, row and column (docs/results.md says so too). Of a column's four bytes only the
    lowest then varies, in 7 bits over long stretches, and rows rise slowly (benchmarks/groups.py has the sizes).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    codes, rows, columns = _in_order(group)
    header = {
        "format": FORMAT,
        "granularity": group.granularity,
        "shapes": {site: list(shape) for site, shape in group.shapes.items()},
        "provenance": dict(group.provenance),
    }
    table = pa.table(
        {
            "site": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(group.members), pa.string())),
            "row": pa.array(rows),
            "col": pa.nulls(len(rows), pa.int32()) if columns is None else pa.array(columns),
        }
    ).replace_schema_metadata({"neurondrift.group": json.dumps(header)})
    with atomic_path(path) as partial:
        pq.write_table(
            table,
            partial,
            compression="zstd",
            compression_level=19,
            write_page_checksum=True,
            use_dictionary=["site"],
            write_statistics=["site", "row"],
            column_encoding={
                "row": "DELTA_BINARY_PACKED",
                "col": "PLAIN" if columns is None else "BYTE_STREAM_SPLIT",
            },
        )


def _in_order(group: Group) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32] | None]:
    """The number of its site, the row and (of weights) the column of each member, in the order of the file."""
    sites, empty = list(group.members), np.empty(0, dtype=np.int32)
    counts = [len(group.members[site]) for site in sites]
    codes = np.repeat(np.arange(len(sites), dtype=np.int32), counts)
    rows = np.concatenate([empty, *(group.rows(site).astype(np.int32) for site in sites)])
    if group.granularity != "weight":
        return codes, rows, None
    columns = np.concatenate([empty, *(group.columns(site).astype(np.int32) for site in sites)])
    order = np.lexsort((columns, rows, columns // TILE, codes, columns % TILE // (TILE // 2)))
    return codes[order], rows[order], columns[order]


def load_group(path: str | Path) -> Group:
    """Read a group from Parquet, or a group of neurons from JSON `{site: [rows]}`.

    Raises `ArtifactError` where the file is missing, truncated or of something else.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _from_json(path)
    try:
        table = read_parquet(path)
        header = json.loads(table.schema.metadata[b"neurondrift.group"])
        shapes = {site: (int(rows), int(columns)) for site, (rows, columns) in header["shapes"].items()}
        granularity: Granularity = header["granularity"]
        chunked = table["site"].combine_chunks() if table.num_rows else None
        names = chunked.dictionary.to_pylist() if chunked is not None else []
        if chunked is not None and chunked.null_count:
            raise ValueError("a member has no site")
        codes = chunked.indices.to_numpy() if chunked is not None else np.empty(0, dtype=np.int32)
        flat = _whole(table, "row")
        if granularity == "weight":
            widths = np.array([shapes[name][1] for name in names], dtype=np.int64)
            width, column = widths[codes] if len(names) else np.empty(0, dtype=np.int64), _whole(table, "col")
            if ((column < 0) | (column >= width)).any():
                raise ValueError("a column lies outside of its site")
            flat = flat * width + column
        members = {name: np.sort(flat[codes == code]) for code, name in enumerate(names)}
        group = Group(granularity=granularity, members=members, shapes=shapes, provenance=dict(header["provenance"]))
        _check_read(group)
    except ArtifactError as error:
        if not path.exists():
            raise ArtifactError("The group file is missing", received=str(path)) from error
        raise ArtifactError(f"{path} is no group file of neurondrift ({error})") from error
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, GroupError) as error:
        raise ArtifactError(f"{path} is no group file of neurondrift ({type(error).__name__}: {error})") from error
    return group


def _whole(table: Any, name: str) -> Indices:
    """A column of whole numbers, none of them missing. Raises `ValueError` for any other: 1.5 is no row."""
    import pyarrow as pa

    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ValueError(f"the column {name} does not hold whole numbers")
    return column.to_numpy().astype(np.int64)


def _check_read(group: Group) -> None:
    """Raise for what no group can be: an unknown granularity, members outside of its sites or twice."""
    if group.granularity not in get_args(Granularity):
        raise ValueError(f"there is no granularity {group.granularity!r}")
    if group.shapes:  # a group that came from plain JSON has none
        group.check_members(group.shapes)
    for site, indices in group.members.items():
        if len(indices) and (indices[0] < 0 or (np.diff(indices) == 0).any()):
            raise ValueError(f"the members of {site} are no rows, or come twice")


def _from_json(path: Path) -> Group:
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(rows, list) and all(type(row) is int and 0 <= row < 2**31 for row in rows)
        for rows in content.values()
    ):
        raise ArtifactError(f"{path} is no group of neurons", allowed="a JSON object of site name -> list of rows")
    members = {site: np.unique(np.array(rows, dtype=np.int64)) for site, rows in content.items()}
    return Group(granularity="neuron", members=without_empty(members), provenance={"source": path.name})
