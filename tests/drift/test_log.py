"""The drift log gives what is asked of it: steps, sites, groups, single weights; DuckDB and Polars read it."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.adapters import UP, lora
from helpers.groups import group_of
from helpers.paths import REPOSITORY
from helpers.training import trainer
from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.log import DriftLog
from neurondrift.groups.group import Group


def test_the_log_reads_what_is_asked_for(tmp_path):
    callback = DriftCallback(tmp_path / "drift", every=2)
    trainer(lora(), tmp_path / "t", callback).train()
    log = DriftLog(tmp_path / "drift")
    part = log.read(steps=[2, 6], sites=["model.layers.0.self_attn.q_proj"], columns=["site", "row", "l2"])
    assert list(part.columns) == ["step", "site", "row", "l2"]
    assert set(part["step"]) == {2, 6}
    assert set(part["site"]) == {"model.layers.0.self_attn.q_proj"}
    with pytest.raises(ArtifactError, match=r"no drift snapshot of this step.*3.*\[0, 2, 4, 6\]"):
        log.read(steps=[3])
    file = tmp_path / "drift" / "step=000004" / "neurons.parquet"
    whole = pq.read_table(file, partitioning=None)
    for name, kind in (("l2", pa.string()), ("row", pa.float64()), ("relative", None)):  # other values, and none
        column = pa.nulls(len(whole), pa.float64()) if kind is None else whole[name].cast(kind)
        pq.write_table(whole.set_column(whole.column_names.index(name), name, column), file)
        with pytest.raises(ArtifactError, match="step=000004/neurons.parquet cannot be read as a drift snapshot"):
            log.read(steps=[4])
    (tmp_path / "drift" / "step=000002" / "neurons.parquet").write_bytes(b"half")
    with pytest.raises(ArtifactError, match="cannot be read as a drift snapshot"):
        log.read(steps=[2])
    with pytest.raises(ArtifactError, match="no drift snapshots"):
        DriftLog(tmp_path / "empty").read()


def test_the_log_gives_the_members_of_groups(tmp_path):
    model = lora()
    group = group_of(model, "neuron")
    trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=3)).train()
    group.save(tmp_path / "random.neurons.parquet")
    log = DriftLog(tmp_path / "d")
    other = Group(granularity="neuron", members={UP: np.array([2, 23])})
    frame = log.read(steps=[3, 6], groups={"first": group, "second": other})
    assert list(frame.columns) == ["step", "group", "site", "row", "l2", "relative", "cosine_distance"]
    trained = log.metadata()["sites"]
    for name, members in (("first", group), ("second", other)):
        expected = [(s, int(r)) for s in trained for r in members.rows(s)]
        for step in (3, 6):
            part = frame[(frame["group"] == name) & (frame["step"] == step)]
            assert list(zip(part["site"], part["row"], strict=True)) == expected
    everything = log.read(steps=[6])
    merged = frame[(frame["step"] == 6)].merge(everything, on=["site", "row"])
    assert (merged["l2_x"] == merged["l2_y"]).all()
    one = log.read(steps=[6], groups=[tmp_path / "random.neurons.parquet"], sites=[UP], columns=["row", "l2"])
    assert one["row"].tolist() == group.rows(UP).tolist()
    assert list(one.columns) == ["step", "group", "row", "l2"]
    assert set(one["group"]) == {"random"}
    with pytest.raises(GroupError, match="by a group of weights"):
        log.read(groups={"w": group_of(model, "weight")})
    with pytest.raises(GroupError, match="another model"):
        log.read(groups={"f": Group(granularity="neuron", members={UP: np.array([1])}, provenance={"model": "x"})})


def test_duckdb_and_polars_read_the_snapshots(tmp_path, monkeypatch):
    """The commands of docs/results.md, as they stand there."""
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    model = lora()
    trainer(model, tmp_path / "t", DriftCallback(tmp_path / "drift", every=3)).train()
    (tmp_path / "neuron_groups").mkdir()
    group_of(model, "neuron").save(tmp_path / "neuron_groups" / "safety_top.neurons.parquet")
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "results.md").read_text()
    sql = text.split("```sql\n")[1].split("```")[0]
    log = DriftLog("drift")
    expected = log.read(groups=["neuron_groups/safety_top.neurons.parquet"]).groupby("step")["relative"].mean()
    found = duckdb.sql(sql).fetchall()
    assert [row[0] for row in found] == expected.index.tolist() == [0, 3, 6]
    assert [row[1] for row in found] == pytest.approx(expected.tolist(), rel=1e-5)
    code = next(block for block in text.split("```python\n")[1:] if "import polars" in block).split("```")[0]
    space = {}
    exec(code, space)
    assert isinstance(space["means"], polars.DataFrame)
    assert space["means"]["relative"].to_list() == pytest.approx(expected.tolist(), rel=1e-5)
    import pyarrow.compute as pc

    lazily = log.dataset().to_table(
        columns=["step", "row", "l2"], filter=(pc.field("step") == 6) & (pc.field("row") < 2)
    )
    assert lazily.num_rows == 2 * len(log.metadata()["sites"])


def test_the_log_gives_weights_by_step_group_and_site(tmp_path):
    model = lora()
    groups = {"one": group_of(model, "weight", seed=1), "two": group_of(model, "weight", seed=2)}
    trainer(model, tmp_path / "t", DriftCallback(tmp_path / "d", every=3, groups=groups)).train()
    log = DriftLog(tmp_path / "d")
    assert log.follows_weights()
    everything = log.weights()
    assert list(everything.columns) == [
        "step", "group", "site", "metric", "count", "zeros", "undefined", "mean", "variance", "first_bin", "bins",
    ]  # fmt: skip
    assert len(everything) == 3 * 2 * 4 * 2
    site = "model.layers.0.self_attn.q_proj"
    part = log.weights(steps=[6], groups=["two"], sites=[site], columns=["group", "site", "metric", "mean"])
    assert part[["step", "group", "site", "metric"]].values.tolist() == [
        [6, "two", site, "absolute"],
        [6, "two", site, "relative"],
    ]
    lazily = log.dataset("weights.parquet")
    import pyarrow.compute as pc

    assert lazily.count_rows(filter=(pc.field("step") == 6) & (pc.field("group") == "two")) == 8
    trainer(lora(), tmp_path / "t2", DriftCallback(tmp_path / "plain", every=6)).train()
    assert not DriftLog(tmp_path / "plain").follows_weights()
    with pytest.raises(ArtifactError, match="follows no single weights"):
        DriftLog(tmp_path / "plain").weights()


def test_duckdb_and_polars_read_the_weights(tmp_path):
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    model = lora()
    trainer(
        model, tmp_path / "t", DriftCallback(tmp_path / "d", every=3, groups={"g": group_of(model, "weight")}), steps=3
    ).train()
    pattern = f"{tmp_path}/d/step=*/weights.parquet"
    expected = DriftLog(tmp_path / "d").weights(steps=[3])
    total = int(expected["count"].sum())
    query = f"SELECT sum(count), sum(list_sum(bins)) FROM read_parquet('{pattern}', hive_types={{'step': INT}}) WHERE step = 3"
    assert duckdb.sql(query).fetchall() == [(total, total)]
    frame = polars.scan_parquet(pattern, hive_partitioning=True).filter(polars.col("step") == 3).collect()
    assert frame["count"].sum() == total
    assert np.allclose(frame["mean"].to_numpy(), expected["mean"])
