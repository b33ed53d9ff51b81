"""The file of covariates: what is written is read; what is damaged or of something else is said."""

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from neurondrift.base.errors import ArtifactError
from neurondrift.groups.covariates import COLUMNS, Covariates, write_covariates

SIZES = {"m.layers.0.mlp.up_proj": 7, "m.layers.10.mlp.up_proj": 4, "m.layers.2.mlp.up_proj": 9}


def written(path):
    generator = np.random.default_rng(0)
    columns = {name: {site: generator.random(size) for site, size in SIZES.items()} for name in COLUMNS}
    columns["gradient_scale"]["m.layers.0.mlp.up_proj"][:2] = 0, np.nan  # as they are
    write_covariates(path, columns, {"model": "abc", "scores": {"safety": {"method": "snip"}}})
    return columns


def test_what_is_written_is_read(tmp_path):
    columns = written(tmp_path / "c.parquet")
    file = Covariates(tmp_path / "c.parquet")
    assert file.about == {"format": 1, "model": "abc", "scores": {"safety": {"method": "snip"}}}
    for name, dtype in COLUMNS.items():
        for site in SIZES:
            found = file.of_site(name, site)
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, columns[name][site].astype(dtype))
    assert file.of_site("norm", "m.layers.1.mlp.up_proj") is None


def test_other_tools_read_it(tmp_path):
    written(tmp_path / "c.parquet")
    table = pq.read_table(tmp_path / "c.parquet").to_pandas()
    assert list(table) == ["site", "row", *COLUMNS]
    assert table.groupby("site", sort=False, observed=True).size().to_dict() == SIZES
    assert table["site"].dtype == "category" and table["row"].dtype == np.int32
    assert table[["site", "row"]].drop_duplicates().shape[0] == sum(SIZES.values())


def test_a_damaged_file_is_an_error_or_reads_the_same(tmp_path):
    columns = written(tmp_path / "c.parquet")
    content, draw, noticed = (tmp_path / "c.parquet").read_bytes(), random.Random(0), 0
    for _ in range(60):
        changed = bytearray(content)
        changed[draw.randrange(len(content) - 8)] ^= 1 << draw.randrange(8)
        (tmp_path / "d.parquet").write_bytes(bytes(changed))
        try:
            found = Covariates(tmp_path / "d.parquet")
            values = {name: {site: found.of_site(name, site) for site in SIZES} for name in COLUMNS}
        except ArtifactError:
            noticed += 1
            continue
        for name, dtype in COLUMNS.items():
            for site, own in values[name].items():
                assert own is None or np.array_equal(own, columns[name][site].astype(dtype), equal_nan=True)
    assert noticed > 10


@pytest.mark.parametrize("what", ["missing", "text", "another table", "rows in another order", "sites mixed"])
def test_what_holds_no_covariates_is_said(what, tmp_path):
    path = tmp_path / "c.parquet"
    if what == "text":
        path.write_text("hello")
    elif what == "another table":
        pq.write_table(pa.table({"a": [1]}), path)
    elif what != "missing":
        written(path)
        table = pq.read_table(path)
        order = np.arange(table.num_rows)
        if what == "sites mixed":
            order = np.argsort(table["row"].to_numpy(), kind="stable")
        pq.write_table(table.take(order if what == "sites mixed" else order[::-1]), path)
    with pytest.raises(ArtifactError, match="holds no covariates of neurons"):
        Covariates(path)
