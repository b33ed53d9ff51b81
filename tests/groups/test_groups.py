"""The algebra of groups, and their files."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from helpers.families import build
from helpers.groups import SHAPES, group_of, scores
from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.groups.group import load_group
from neurondrift.groups.selection import random_group, select_top, set_difference


def test_algebra():
    everything = random_group(SHAPES, fraction=1.0, seed=0)
    one, two = random_group(SHAPES, fraction=0.3, seed=1), random_group(SHAPES, fraction=0.3, seed=2)
    assert len(one | two) == len(one) + len(two) - len(one & two)
    assert len(one - two) == len(one) - len(one & two)
    assert len(one.complement()) == len(everything) - len(one)
    assert len(one & one.complement()) == 0
    assert len((one | one.complement()) - everything) == 0
    with pytest.raises(GroupError, match="different granularity do not combine"):
        one | random_group(SHAPES, fraction=0.3, seed=1, granularity="neuron")
    foreign = random_group(SHAPES, fraction=0.3, seed=1, provenance={"model": "x"})
    with pytest.raises(GroupError, match="different models"):
        foreign | random_group(SHAPES, fraction=0.3, seed=1, provenance={"model": "y"})


def listed(group):
    """Each weight as (site, row, column), by the definition of a flat index."""
    return [
        (site, int(flat) // SHAPES[site][1], int(flat) % SHAPES[site][1])
        for site, members in group.members.items()
        for flat in members
    ]


def test_mask_rows_and_columns_agree():
    group = random_group(SHAPES, fraction=0.1, seed=0)
    for site in SHAPES:
        rows, columns = np.nonzero(group.mask(site))
        assert (rows.tolist(), columns.tolist()) == (group.rows(site).tolist(), group.columns(site).tolist())
    assert len(listed(group)) == len(group)


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_parquet_round_trip(tmp_path, granularity):
    group = select_top(scores(), fraction=0.1, granularity=granularity, provenance={"model": "m"})
    group.save(tmp_path / "g.parquet")
    again = load_group(tmp_path / "g.parquet")
    assert again.granularity == granularity
    assert again.shapes == group.shapes
    assert again.provenance == group.provenance
    assert all(np.array_equal(again.members[site], group.members[site]) for site in group.members)


def test_parquet_is_plain_for_pandas(tmp_path):
    import pandas as pd

    group = select_top(scores(), fraction=0.1)
    group.save(tmp_path / "g.parquet")
    frame = pd.read_parquet(tmp_path / "g.parquet")
    assert list(frame.columns) == ["site", "row", "col"]
    assert sorted(zip(frame["site"], frame["row"], frame["col"], strict=True)) == sorted(listed(group))


def test_group_files_are_read_by_pandas_polars_and_duckdb(tmp_path):
    """Also the columns of weights, which are encoded as BYTE_STREAM_SPLIT."""
    duckdb, polars, pandas = (pytest.importorskip(name) for name in ("duckdb", "polars", "pandas"))
    group = group_of(build("llama"), "weight", fraction=0.4)
    path = tmp_path / "random.weights.parquet"
    group.save(path)
    encodings = pq.ParquetFile(path).metadata.row_group(0).column(2).encodings
    assert "BYTE_STREAM_SPLIT" in encodings
    expected = {
        (site, int(row), int(col))
        for site in group.members
        for row, col in zip(group.rows(site), group.columns(site), strict=True)
    }
    frames = {
        "pandas": pandas.read_parquet(path).itertuples(index=False, name=None),
        "polars": polars.read_parquet(path).iter_rows(),
        "duckdb": duckdb.sql(f"SELECT site, row, col FROM '{path}'").fetchall(),
    }
    for name, rows in frames.items():
        assert set(rows) == expected, name


def test_json_round_trip_of_neurons(tmp_path):
    group = select_top(scores(), fraction=0.1, granularity="neuron")
    group.save(tmp_path / "g.json")
    content = json.loads((tmp_path / "g.json").read_text())
    assert content == {site: rows.tolist() for site, rows in group.members.items()}
    again = load_group(tmp_path / "g.json")
    assert all(np.array_equal(again.members[site], group.members[site]) for site in group.members)
    with pytest.raises(GroupError, match="Only groups of neurons"):
        select_top(scores(), fraction=0.1).save(tmp_path / "w.json")


def test_a_group_refuses_another_model():
    group = select_top(scores(), fraction=0.1, provenance={"model": "m"})
    group.check_model("m", SHAPES)
    with pytest.raises(GroupError, match="made from another model"):
        group.check_model("n", SHAPES)
    with pytest.raises(GroupError, match="no site a.q_proj"):
        group.check_model("m", {"b": (3, 3)})
    with pytest.raises(GroupError, match="beyond the end"):
        group.check_model("m", {site: (2, 2) for site in SHAPES})


def test_errors(tmp_path):
    with pytest.raises(GroupError, match=r"fraction is no share.*0.*\(0, 1\]"):
        select_top(scores(), fraction=0)
    broken = scores()
    broken["a.q_proj"][3, 3] = np.nan
    with pytest.raises(GroupError, match="scores of a.q_proj are not all finite"):
        select_top(broken, fraction=0.1)
    with pytest.raises(GroupError, match="empty in every site"):
        set_difference(scores(), scores(), p=0.1, q=0.1)
    with pytest.raises(ArtifactError, match="group file is missing"):
        load_group(tmp_path / "nope.parquet")
    (tmp_path / "half.parquet").write_bytes(b"PAR1 half")
    with pytest.raises(ArtifactError, match="is no group file"):
        load_group(tmp_path / "half.parquet")
    (tmp_path / "list.json").write_text('{"a": [1, "2"]}')
    with pytest.raises(ArtifactError, match="is no group of neurons"):
        load_group(tmp_path / "list.json")
