"""Snapshots on disk: a Parquet data set with one folder per step, each written whole or not at all.

Owns the layout `step=000100/neurons.parquet` and `weights.parquet`, their columns, the names of followed groups and the
rows of their members. Knows nothing of models.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.base.files import atomic_path, read_json, read_parquet, remove_partial, write_json
from neurondrift.groups.group import Group, load_group

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow.dataset as ds

    from neurondrift.drift.bins import WeightDrift


METRICS = ("l2", "relative", "cosine_distance")
METADATA = "drift.json"
INITIAL = "initial.parquet"
NEURONS = "neurons.parquet"
WEIGHTS = "weights.parquet"
WORDS = ["group", "site", "metric"]
ROWS = {"row": "DELTA_BINARY_PACKED"}  # they differ little from one to the next
BINS = {"bins.list.element": "BYTE_STREAM_SPLIT"}  # small integers

#: Groups by name; or groups and files of groups, which get their names from `named_groups`.
Groups: TypeAlias = Mapping[str, Group] | Sequence[Group | str | Path]


class DriftLog:
    """The drift snapshots of one training run in a folder.

    Parameters
    ----------
    directory
        The folder; made by the first snapshot.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def steps(self) -> list[int]:
        """Steps that have a snapshot, ascending."""
        matches = (re.fullmatch(r"step=([0-9]{1,9})", entry.name) for entry in self.directory.glob("step=*"))
        return sorted(int(match[1]) for match in matches if match)

    def metadata(self) -> dict[str, Any]:
        """What holds for all snapshots: model fingerprint, sites with their shapes, untrained sites."""
        content: dict[str, Any] = read_json(self.directory / METADATA)
        if not _is_metadata(content):
            raise ArtifactError(f"{self.directory / METADATA} is not the metadata of a drift log")
        return content

    def initial(self) -> pd.DataFrame:
        """The neurons before training: columns site, row, norm (‖w₀‖), module_type, layer."""
        file = self.directory / INITIAL
        if not file.exists():
            raise ArtifactError("The folder holds no drift log", received=str(self.directory))
        table = read_parquet(file)
        _require_columns(table, file, ("site", "row", "norm", "module_type", "layer"))
        numbers = pa.types.is_integer(table["row"].type) and pa.types.is_integer(table["layer"].type)
        if not numbers or any(column.null_count for column in table.columns):
            raise ArtifactError(f"{file} lacks values of some neurons, or has them of another kind")
        return table.to_pandas()

    def not_finite(self) -> dict[int, int]:
        """Step -> how many neurons have a change that is NaN or infinite; steps without any are left out."""
        found = {}
        for step in self.steps():
            l2 = pq.read_table(self._folder(step) / NEURONS, columns=["l2"])["l2"].to_numpy()
            if count := int((~np.isfinite(l2)).sum()):
                found[step] = count
        return found

    def begin(self, metadata: Mapping[str, Any], initial: pa.Table, *, step: int) -> None:
        """Start, or go on from a checkpoint at `step`: later snapshots are dropped, since they will be made again.

        `metadata` identifies the run (see `describe`), `initial` holds the neurons before training.

        What writes that were killed have left is deleted.

        Raises `ArtifactError` where the folder holds the snapshots of another model.
        """
        for name in (METADATA, INITIAL, "step=*"):
            remove_partial(self.directory / name)
        if (self.directory / METADATA).exists():
            standing, wanted = self.metadata(), dict(metadata)
            same = [key for key in {**standing, **wanted} if standing.get(key) == wanted.get(key)]
            if "groups" not in same and len(same) == len({**standing, **wanted}) - 1:
                raise ArtifactError(
                    "The folder's drift snapshots follow other groups of weights",
                    received=str(self.directory),
                    fix="pass the same groups, choose another folder, or delete this one",
                )
            if standing != wanted:
                raise ArtifactError(
                    "The folder holds drift snapshots of another model or adapter",
                    received=str(self.directory),
                    fix="choose another folder, or delete this one",
                )
        else:
            with atomic_path(self.directory / INITIAL) as partial:
                _write(initial, partial, words=["site", "module_type", "layer"], encoding=ROWS)
            write_json(self.directory / METADATA, dict(metadata))
        for later in (s for s in self.steps() if s > step):
            shutil.rmtree(self._folder(later))

    def write(self, step: int, drift: Mapping[str, Sequence[Any]], weights: Sequence[WeightDrift] = ()) -> None:
        """Write the snapshot of a step: site -> (l2, relative, cosine_distance), each `[out]`; and what groups of
        weights sum up to, where they are followed."""
        sites = list(drift)
        columns = _site_and_row({site: len(drift[site][0]) for site in sites})
        for index, metric in enumerate(METRICS):
            columns[metric] = pa.array(
                np.concatenate([np.asarray(drift[site][index], dtype=np.float32) for site in sites])
            )
        with atomic_path(self._folder(step)) as partial:
            partial.mkdir()
            with ThreadPoolExecutor(1) as beside:  # pyarrow works without the interpreter's lock
                # Values that hardly repeat: a dictionary makes a larger file, compression saves little.
                table, file = pa.table(columns), partial / NEURONS
                pending = [beside.submit(_write, table, file, words=["site"], encoding=ROWS, compression="none")]
                try:
                    if weights:
                        _write(_weights_table(weights), partial / WEIGHTS, words=WORDS, encoding=BINS)
                finally:
                    pending.pop().result()  # no name is left to it: with its error it would keep the file open

    def read(
        self,
        *,
        steps: Sequence[int] | None = None,
        sites: Sequence[str] | None = None,
        groups: Groups | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """Snapshots as a data frame with the columns step, site, row, l2, relative, cosine_distance.

        Only the files of the wanted steps are opened, and only the wanted columns and sites are read. With `groups` of
        neurons (by name, or a list of groups or of their files) only their members come, with a column `group`; a
        neuron of two groups comes twice, and members in untrained sites, whose drift is zero, are left out.

        Raises `ArtifactError` for a step that has no snapshot, `GroupError` for a group of another model, of single
        weights or of units.
        """
        return self.table(steps=steps, sites=sites, groups=groups, columns=columns).to_pandas()

    def table(
        self,
        *,
        steps: Sequence[int] | None = None,
        sites: Sequence[str] | None = None,
        groups: Groups | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The same as an Arrow table."""
        keep = None if columns is None else [name for name in columns if name not in ("step", "group")]
        if groups is None:
            return self._read_steps(NEURONS, steps, columns=keep, filters=_filters(site=sites))
        named, metadata = named_groups(groups), self.metadata()
        check_groups(named, metadata)
        sizes = {site: shape[0] for site, shape in metadata["sites"].items()}
        positions = [neuron_positions(group, sizes, sites) for group in named.values()]
        labels = np.repeat(np.arange(len(named), dtype=np.int32), [len(rows) for rows in positions])
        column = pa.DictionaryArray.from_arrays(pa.array(labels), pa.array(list(named), pa.string()))
        rows = pa.array(np.concatenate(positions)) if positions else pa.array([], pa.int64())

        def members(part: pa.Table) -> pa.Table:
            return part.take(rows).add_column(0, "group", column)

        return self._read_steps(NEURONS, steps, columns=keep, convert=members)

    def weights(
        self,
        *,
        steps: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """What the followed groups of weights sum up to: one row per step, group, site and metric.

        Columns: step, group, site, metric (`absolute`: |Δ|, `relative`: |Δ|/|w₀|), count, zeros, undefined, mean,
        variance, first_bin, bins (see `WeightDrift`; `weight_drifts` makes these of the rows, for quantiles).

        Raises `ArtifactError` for a step without a snapshot, or snapshots without weights.
        """
        return self.weights_table(steps=steps, groups=groups, sites=sites, columns=columns).to_pandas()

    def weights_table(
        self,
        *,
        steps: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
        sites: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """The same as an Arrow table."""
        keep = None if columns is None else [name for name in columns if name != "step"]
        return self._read_steps(WEIGHTS, steps, columns=keep, filters=_filters(group=groups, site=sites))

    def follows_weights(self) -> bool:
        """Whether the log has snapshots, and every one sums up groups of weights."""
        return all((self._folder(step) / WEIGHTS).exists() for step in self.steps()) and bool(self.steps())

    def dataset(self, file: str = NEURONS) -> ds.Dataset:
        """All snapshots as an Arrow data set that reads nothing yet, with a column `step`: for filters of any kind.

        `file` is `neurons.parquet` or `weights.parquet`.
        """
        import pyarrow.dataset as ds

        return ds.dataset(
            [str(self._folder(step) / file) for step in self._wanted(None)],
            format="parquet",
            partitioning=ds.partitioning(pa.schema([("step", pa.int32())]), flavor="hive"),
            partition_base_dir=str(self.directory),
        )

    def _wanted(self, steps: Sequence[int] | None) -> list[int]:
        available = self.steps()
        wanted = available if steps is None else list(steps)
        if missing := sorted(set(wanted) - set(available)):
            raise ArtifactError("There is no drift snapshot of this step", received=missing[0], allowed=str(available))
        if not wanted:
            raise ArtifactError("The folder holds no drift snapshots", received=str(self.directory))
        return wanted

    def _read_steps(
        self,
        name: str,
        steps: Sequence[int] | None,
        *,
        columns: list[str] | None,
        filters: list[tuple[str, str, list[str]]] | None = None,
        convert: Callable[[pa.Table], pa.Table] = lambda part: part,
    ) -> pa.Table:
        parts = []
        for step in self._wanted(steps):
            file = self._folder(step) / name
            if name == WEIGHTS and not file.exists():
                raise ArtifactError(
                    "This snapshot follows no single weights", received=str(file.parent), fix="pass groups of weights"
                )
            try:
                part = read_parquet(file, columns=columns, filters=filters)
                if columns is None:
                    _require_columns(part, file, ("site", "row", *METRICS) if name == NEURONS else WORDS)
                part = convert(part)
            except (pa.ArrowException, ArtifactError, LookupError) as error:
                reason = type(error.__cause__ or error).__name__
                raise ArtifactError(f"{file} cannot be read as a drift snapshot ({reason})") from error
            parts.append(part.add_column(0, "step", pa.array(np.full(part.num_rows, step, dtype=np.int32))))
        try:
            return pa.concat_tables(parts, promote_options="default")
        except pa.ArrowException as error:
            raise ArtifactError("The drift snapshots have different columns", received=str(self.directory)) from error

    def _folder(self, step: int) -> Path:
        return self.directory / f"step={step:06d}"


def _is_metadata(content: Any) -> bool:
    """Whether a JSON value is what `describe` makes, as far as a log is read by it."""
    return (
        isinstance(content, dict)
        and isinstance(content.get("model"), str)
        and isinstance(content.get("untrained"), list)
        and all(isinstance(site, str) for site in content["untrained"])
        and isinstance(content.get("sites"), dict)
        and all(
            isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size >= 0 for size in shape)
            for shape in content["sites"].values()
        )
    )


def _require_columns(table: pa.Table, file: Path, names: Sequence[str]) -> None:
    if missing := [name for name in names if name not in table.column_names]:
        raise ArtifactError(f"{file} has no column {missing[0]}, as a drift log has")
    kinds = {**dict.fromkeys([*METRICS, "norm"], pa.types.is_floating), "row": pa.types.is_integer}
    for name, is_kind in kinds.items():
        if name in names and (not is_kind(table.schema.field(name).type) or table[name].null_count):
            raise ArtifactError(f"{file} has other values in {name} than a drift log has")


def _write(
    table: pa.Table, path: Path, *, words: list[str], encoding: dict[str, str], compression: str = "zstd"
) -> None:
    """`words` are columns of few different values: only these are given a dictionary, and statistics for filters."""
    pq.write_table(
        table,
        path,
        compression=compression,
        compression_level=1 if compression == "zstd" else None,
        use_dictionary=words,
        write_statistics=words,
        write_page_checksum=True,
        column_encoding=encoding,
    )


def _site_and_row(sizes: Mapping[str, int]) -> dict[str, Any]:
    """The columns that name every neuron: site (dictionary) and row."""
    codes = np.repeat(np.arange(len(sizes), dtype=np.int32), list(sizes.values()))
    rows = np.concatenate([np.arange(count, dtype=np.int32) for count in sizes.values()])
    return {
        "site": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(list(sizes), pa.string())),
        "row": pa.array(rows),
    }


def initial_table(norms: Mapping[str, Any], module_types: Mapping[str, str], layers: Mapping[str, int]) -> pa.Table:
    """The neurons before training: per site ‖w₀‖ `[out]`, its module type and its layer."""
    columns = _site_and_row({site: len(values) for site, values in norms.items()})
    site = columns["site"]
    columns["norm"] = pa.array(np.concatenate([np.asarray(values, dtype=np.float64) for values in norms.values()]))
    codes = site.indices
    columns["module_type"] = pa.DictionaryArray.from_arrays(codes, pa.array([module_types[name] for name in norms]))
    columns["layer"] = pa.array(np.array([layers[name] for name in norms], dtype=np.int32)[codes.to_numpy()])
    return pa.table(columns)


def _weights_table(weights: Sequence[WeightDrift]) -> pa.Table:
    """One row per group, site and metric. The histograms' counts as int32."""

    def words(name: str) -> pa.Array:
        return pa.array([getattr(entry, name) for entry in weights], pa.string()).dictionary_encode()

    def numbers(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([getattr(entry, name) for entry in weights], kind)

    ends = np.cumsum([0, *(len(entry.bins) for entry in weights)], dtype=np.int32)
    counts = np.concatenate([entry.bins for entry in weights], dtype=np.int32, casting="unsafe")
    return pa.table(
        {
            **{name: words(name) for name in WORDS},
            **{name: numbers(name, pa.int64()) for name in ("count", "zeros", "undefined")},
            **{name: numbers(name, pa.float64()) for name in ("mean", "variance")},
            "first_bin": numbers("first_bin", pa.int32()),
            "bins": pa.ListArray.from_arrays(pa.array(ends), pa.array(counts)),
        }
    )


def _filters(**allowed: Sequence[str] | None) -> list[tuple[str, str, list[str]]] | None:
    return [(name, "in", list(values)) for name, values in allowed.items() if values is not None] or None


def describe(
    shapes: Mapping[str, tuple[int, int]],
    untrained: Sequence[str],
    *,
    model: str,
    zero_norm: Mapping[str, int] | None = None,
    groups: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The metadata of a drift log.

    `zero_norm` counts the neurons with ‖w₀‖ = 0 of the sites that have some, `groups` tells of each followed group of
    weights its granularity, its members in trained sites and those outside.
    """
    return {
        "format": 2,
        "model": model,
        "sites": {name: list(shape) for name, shape in shapes.items()},
        "untrained": list(untrained),
        "zero_norm": dict(zero_norm or {}),
        "groups": {name: dict(entry) for name, entry in (groups or {}).items()},
    }


def named_groups(groups: Groups) -> dict[str, Group]:
    """Groups by name. A mapping names them itself; else a file gives its name without the endings
    (`safety_top.matched.weights.parquet` is `safety_top.matched`), a group its rule and granularity (`top_neurons`).
    A name that is taken gets a number.

    Raises `GroupError` for something that is no group, `ArtifactError` for a file that cannot be read.
    """
    if isinstance(groups, Mapping):
        return dict(groups)
    if isinstance(groups, str | Path | Group):
        raise GroupError("groups is one group rather than a list", received=groups, fix="put it into a list")
    named: dict[str, Group] = {}
    for entry in groups:
        group = load_group(entry) if isinstance(entry, str | Path) else entry
        if not isinstance(group, Group):
            raise GroupError("This is no group", received=entry, allowed="a Group, or the path of its file")
        name = stem = _name(Path(entry).name if isinstance(entry, str | Path) else None, group)
        number = 2
        while name in named:
            name, number = f"{stem}_{number}", number + 1
        named[name] = group
    return named


def _name(file: str | None, group: Group) -> str:
    file = file or group.provenance.get("source")
    if file:
        return re.sub(r"(\.(neuron|weight|unit)s)?\.(parquet|json)$", "", file)
    return f"{group.provenance.get('rule', 'group')}_{group.granularity}s".replace(" ", "_")


def check_groups(groups: Mapping[str, Group], metadata: Mapping[str, Any]) -> None:
    """Raise `GroupError` unless the groups of neurons or weights were made from the model of a log's metadata."""
    anything = (1 << 62, 1)  # the shapes of untrained sites are not kept
    shapes = dict.fromkeys(metadata["untrained"], anything)
    shapes |= {site: tuple(shape) for site, shape in metadata["sites"].items()}
    for group in groups.values():
        group.check_model(metadata["model"], shapes)


def neuron_positions(
    group: Group, sizes: Mapping[str, int], sites: Sequence[str] | None = None
) -> npt.NDArray[np.int64]:
    """Where the members of a group of neurons stand in a snapshot, int64, ascending.

    `sizes` gives the neurons of each site in the snapshot's order; members in other sites are left out, and so
    are those in sites that are not in `sites`.
    """
    if group.granularity != "neuron":
        raise GroupError(
            f"A snapshot's neurons cannot be chosen by a group of {group.granularity}s", allowed="groups of neurons"
        )
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    chosen = [site for site in sizes if site in group.members and (sites is None or site in sites)]
    return np.concatenate([np.empty(0, dtype=np.int64), *(starts[site] + group.members[site] for site in chosen)])
