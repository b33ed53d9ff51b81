"""What is known of every scored neuron before training, as one Parquet file: norm, scores, gradient scale.

Knows arrays and files; not what is matched on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import atomic_path, read_parquet

FORMAT = 1
#: The columns beside site and row, in their order, and how they are stored.
COLUMNS = {"norm": np.float64, "safety_score": np.float32, "utility_score": np.float32, "gradient_scale": np.float32}
#: Columns that are there where they are known: ‖Δ‖ of the alignment.
FURTHER = {"alignment_change": np.float32}
METADATA = "neurondrift.covariates"


def write_covariates(path: Path, columns: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write one row per neuron of every site, whole or not at all.

    Parameters
    ----------
    path
        The file.
    columns
        Column (those of `COLUMNS`, and of `FURTHER` what is known) -> site -> values `[out]`, as they are: zeros and
        what is not finite stay.
    about
        Where they come from: `model` (fingerprint), and what else is known. Goes into the file's metadata as JSON.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    assert set(COLUMNS) <= set(columns) <= {*COLUMNS, *FURTHER}, "a file of covariates has these columns"
    sites = list(columns["norm"])
    counts = [len(columns["norm"][site]) for site in sites]
    codes = pa.array(np.repeat(np.arange(len(sites), dtype=np.int32), counts))
    table = pa.table(
        {
            "site": pa.DictionaryArray.from_arrays(codes, pa.array(sites, pa.string())),
            "row": np.concatenate([np.arange(count, dtype=np.int32) for count in counts]),
            **{
                name: np.concatenate([np.asarray(columns[name][site]) for site in sites]).astype(dtype)
                for name, dtype in (COLUMNS | FURTHER).items()
                if name in columns
            },
        }
    ).replace_schema_metadata({METADATA: json.dumps({"format": FORMAT, **about})})
    with atomic_path(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


class Covariates:
    """A file of covariates in memory. `about`: what it says of itself; `of_site`: a column's values `[out]`.

    Raises `ArtifactError` where the file is missing, damaged, or of something else.
    """

    def __init__(self, path: Path) -> None:
        try:
            table = read_parquet(path)
            self.about: dict[str, Any] = json.loads(table.schema.metadata[METADATA.encode()])
            codes = table["site"].combine_chunks()
            names = codes.dictionary.to_pylist()
            of_row = codes.indices.to_numpy()
            counts = np.bincount(of_row, minlength=len(names))
            ends = np.cumsum(counts)
            rows = table["row"].to_numpy()
            in_order = np.concatenate([np.arange(count) for count in counts])
            if not np.array_equal(rows, in_order) or (np.diff(of_row) < 0).any() or not isinstance(self.about, dict):
                raise ValueError("its rows do not come in order")
            known = [*COLUMNS, *(name for name in FURTHER if name in table.column_names)]
            self._columns = {name: table[name].to_numpy() for name in known}
            self._where = {name: slice(end - count, end) for name, count, end in zip(names, counts, ends, strict=True)}
        except (ArtifactError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{path} holds no covariates of neurons ({error})", fix="neurondrift groups --force"
            ) from error

    @property
    def columns(self) -> list[str]:
        """The columns that the file has, beside site and row."""
        return list(self._columns)

    def column(self, column: str) -> dict[str, npt.NDArray[Any]] | None:
        """Site -> a column's values in it; None where the file does not have the column."""
        if column not in self._columns:
            return None
        return {site: self._columns[column][where] for site, where in self._where.items()}

    def of_site(self, column: str, site: str) -> npt.NDArray[Any] | None:
        """A column's values in a site, in the order of the rows; None where the file does not have the site."""
        return self._columns[column][self._where[site]] if site in self._where else None
