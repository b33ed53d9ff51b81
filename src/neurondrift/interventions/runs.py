"""The file of finished runs of interventions, from which an interrupted command goes on: one row a prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import atomic_path, read_parquet
from neurondrift.base.processes import in_step

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]
LATER = ("margin",)  # columns that files of older versions lack


class RunLog:
    """The finished runs in one Parquet file, rewritten whole after each run; by the first of several processes, of
    which each has all runs."""

    COLUMNS = (
        ("key", "string"),
        ("intervention", "string"),
        ("group", "string"),
        ("granularity", "string"),
        ("dose", "float64"),
        ("draw", "int32"),
        ("members", "int64"),
        ("acted_on", "int64"),
        ("outside", "int64"),
        ("kind", "string"),
        ("id", "string"),
        ("refused", "bool"),
        ("coherent", "bool"),
        ("undecided", "bool"),
        ("margin", "float64"),
        ("loss", "float64"),
        ("tokens", "int32"),
        ("seconds", "float64"),
    )

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.runs: dict[str, Rows] = {}
        if self.path.exists():
            try:
                table = read_parquet(self.path)
                rows: Rows = table.select([name for name, _ in self.COLUMNS if name not in LATER]).to_pylist()
                for name in LATER:  # older files do not have them
                    values = table[name].to_pylist() if name in table.column_names else [None] * len(rows)
                    rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
            except (ArtifactError, KeyError) as error:
                logger.warning("%s cannot be gone on from, its runs are made again (%s)", self.path, error)
                rows = []
            for row in rows:
                self.runs.setdefault(row["key"], []).append(row)

    def add(self, key: str, rows: Rows) -> None:
        """Keep a run's rows."""
        self.runs[key] = rows
        self.write()

    def keep_only(self, keys: Sequence[str]) -> None:
        """Drop the runs of other settings."""
        wanted = set(keys)
        self.runs = {key: rows for key, rows in self.runs.items() if key in wanted}

    def write(self) -> None:
        """Write all runs."""
        if in_step().number:
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        kinds = {
            "string": pa.string(),
            "float64": pa.float64(),
            "int32": pa.int32(),
            "int64": pa.int64(),
            "bool": pa.bool_(),
        }
        schema = pa.schema([(name, kinds[kind]) for name, kind in self.COLUMNS])
        rows = [row for run in self.runs.values() for row in run]
        with atomic_path(self.path) as partial:
            pq.write_table(
                pa.Table.from_pylist(rows, schema=schema), partial, compression="zstd", write_page_checksum=True
            )
