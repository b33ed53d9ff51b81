"""Files of groups: Parquet (site, row, col) that pandas, polars and DuckDB read, and plain JSON of neurons."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from neurondrift.artifacts import atomic_path, read_json
from neurondrift.errors import ArtifactError
from neurondrift.groups.group import Granularity, Group, without_empty

FORMAT = 1
TILE = 256


def write_parquet(path: Path, group: Group) -> None:
    """Write a group as Parquet, its shapes and provenance in the metadata. See `Group.save`.

    Weights are ordered by half tiles: of all sites' tiles of 256 columns first the columns 0 to 127, then the others;
    within a half tile by row. Of a column's four bytes only the lowest then varies, in 7 bits over long stretches,
    and rows rise slowly (benchmarks/groups.py has the sizes).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    sites = list(group.members)
    counts = [len(group.members[site]) for site in sites]
    codes = np.repeat(np.arange(len(sites), dtype=np.int32), counts)
    rows = (
        np.concatenate([group.rows(site).astype(np.int32) for site in sites]) if sites else np.empty(0, dtype=np.int32)
    )
    if group.granularity == "weight":
        columns = np.concatenate([group.columns(site).astype(np.int32) for site in sites]) if sites else rows
        order = np.lexsort((columns, rows, columns // TILE, codes, columns % TILE // (TILE // 2)))
        codes, rows, columns = codes[order], rows[order], columns[order]
        col_column, col_encoding = pa.array(columns), "BYTE_STREAM_SPLIT"
    else:
        col_column, col_encoding = pa.nulls(len(rows), pa.int32()), "PLAIN"
    header = {
        "format": FORMAT,
        "granularity": group.granularity,
        "shapes": {site: list(shape) for site, shape in group.shapes.items()},
        "provenance": dict(group.provenance),
    }
    table = pa.table(
        {
            "site": pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(sites, pa.string())),
            "row": pa.array(rows),
            "col": col_column,
        }
    ).replace_schema_metadata({"neurondrift.group": json.dumps(header)})
    with atomic_path(path) as partial:
        pq.write_table(
            table,
            partial,
            compression="zstd",
            compression_level=19,
            use_dictionary=["site"],
            write_statistics=["site", "row"],
            column_encoding={"row": "DELTA_BINARY_PACKED", "col": col_encoding},
        )


def load_group(path: str | Path) -> Group:
    """Read a group from Parquet, or a group of neurons from JSON `{site: [rows]}`.

    Raises `ArtifactError` where the file is missing, truncated or of something else.
    """
    path = Path(path)
    if path.suffix == ".json":
        return _from_json(path)
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        header = json.loads(table.schema.metadata[b"neurondrift.group"])
        shapes = {site: (int(rows), int(columns)) for site, (rows, columns) in header["shapes"].items()}
        granularity: Granularity = header["granularity"]
        chunked = table["site"].combine_chunks() if table.num_rows else None
        names = chunked.dictionary.to_pylist() if chunked is not None else []
        codes = chunked.indices.to_numpy() if chunked is not None else np.empty(0, dtype=np.int32)
        flat = table["row"].to_numpy().astype(np.int64)
        if granularity == "weight":
            widths = np.array([shapes[name][1] for name in names], dtype=np.int64)
            flat = flat * (widths[codes] if len(names) else 1) + table["col"].to_numpy().astype(np.int64)
    except FileNotFoundError as error:
        raise ArtifactError("The group file is missing", received=str(path)) from error
    except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} is no group file of neurondrift ({type(error).__name__})") from error
    members = {name: np.sort(flat[codes == code]) for code, name in enumerate(names)}
    return Group(granularity=granularity, members=members, shapes=shapes, provenance=header["provenance"])


def _from_json(path: Path) -> Group:
    content = read_json(path)
    if not isinstance(content, dict) or not all(
        isinstance(rows, list) and all(type(row) is int and row >= 0 for row in rows) for rows in content.values()
    ):
        raise ArtifactError(f"{path} is no group of neurons", allowed="a JSON object of site name -> list of rows")
    members = {site: np.unique(np.array(rows, dtype=np.int64)) for site, rows in content.items()}
    return Group(granularity="neuron", members=without_empty(members), provenance={"source": path.name})
