"""Selection, algebra, matched controls and files of groups."""

import json
import math

import numpy as np
import pytest
import torch

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.groups.controls import matched
from neurondrift.groups.group import Group, load_group
from neurondrift.groups.selection import random_group, select_top, set_difference, top_indices
from neurondrift.importance.scores import ScoreFile, check_compatible, write_scores

SHAPES = {"a.q_proj": (30, 20), "a.down_proj": (12, 50)}


def scores(seed=0):
    generator = np.random.default_rng(seed)
    return {site: generator.lognormal(size=shape).astype(np.float32) for site, shape in SHAPES.items()}


def brute_top(values, count):
    """Indices of the highest values by a full, stable sort."""
    return sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.35, 1.0])
@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_top_equals_a_full_sort(fraction, granularity):
    data = scores()
    group = select_top(data, fraction=fraction, granularity=granularity)
    for site, values in data.items():
        flat = values.sum(axis=1, dtype=np.float64) if granularity == "neuron" else values.reshape(-1)
        count = max(1, math.floor(round(fraction * len(flat), 9)))
        assert group.members[site].tolist() == brute_top(flat.tolist(), count)


def test_top_per_row_and_per_model():
    data = scores()
    rows = select_top(data, fraction=0.1, per="row")
    for site, values in data.items():
        expected = [
            i * values.shape[1] + j
            for i, row in enumerate(values)
            for j in brute_top(row.tolist(), values.shape[1] // 10)
        ]
        assert rows.members[site].tolist() == expected
    whole = select_top(data, fraction=0.05, per="model")
    pooled = np.concatenate([values.reshape(-1) for values in data.values()])
    kept = np.concatenate([data[site].reshape(-1)[indices] for site, indices in whole.members.items()])
    assert len(whole) == math.floor(0.05 * len(pooled))
    assert kept.min() >= np.sort(pooled)[::-1][len(whole) - 1]


def test_ties_go_to_the_lower_index():
    assert top_indices(np.array([1, 3, 3, 2, 3], dtype=np.float32), 2).tolist() == [1, 2]
    assert top_indices(np.zeros(5, dtype=np.float32), 3).tolist() == [0, 1, 2]


def test_set_difference_is_top_q_minus_top_p():
    safety, utility = scores(0), scores(1)
    group = set_difference(safety, utility, p=0.2, q=0.3)
    for site in SHAPES:
        n = safety[site].size
        expected = set(brute_top(safety[site].reshape(-1).tolist(), int(0.3 * n))) - set(
            brute_top(utility[site].reshape(-1).tolist(), int(0.2 * n))
        )
        assert set(group.members[site].tolist()) == expected


def test_tensors_and_score_files_give_the_same_group(tmp_path):
    data = {site: torch.from_numpy(values) for site, values in scores().items()}
    write_scores(tmp_path / "s.safetensors", data, header={"model": "m", "method": "snip", "data": "d"})
    from_file = select_top(ScoreFile(tmp_path / "s.safetensors"), fraction=0.1)
    from_memory = select_top(data, fraction=0.1)
    assert {site: indices.tolist() for site, indices in from_file.members.items()} == {
        site: indices.tolist() for site, indices in from_memory.members.items()
    }
    assert from_file.provenance["model"] == "m"


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


def test_a_seed_gives_the_same_group_again():
    assert all(
        np.array_equal(
            random_group(SHAPES, fraction=0.1, seed=7).members[s], random_group(SHAPES, fraction=0.1, seed=7).members[s]
        )
        for s in SHAPES
    )


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_matched_controls_have_equal_counts_and_the_same_magnitudes(granularity):
    generator = np.random.default_rng(0)
    shapes = {"a": (1200, 30), "b": (900, 40)}
    weights = {site: np.abs(generator.standard_t(5, size=shape)) for site, shape in shapes.items()}
    magnitudes = (
        weights if granularity == "weight" else {site: np.linalg.norm(w, axis=1) for site, w in weights.items()}
    )
    noisy = {
        site: (values * generator.lognormal(size=values.shape)).astype(np.float32)
        for site, values in magnitudes.items()
    }
    group = select_top(noisy, fraction=0.05, granularity=granularity)
    first, second = matched(group, magnitudes, seed=0, draws=2, bins=20)
    for control in (first, second):
        assert control.granularity == granularity
        for site, own in group.members.items():
            theirs = control.members[site]
            assert len(theirs) == len(own)
            assert not set(theirs.tolist()) & set(own.tolist())
            flat = magnitudes[site].reshape(-1)
            difference = abs(flat[own].mean() - flat[theirs].mean()) / flat[own].std()
            assert difference < (0.05 if granularity == "weight" else 0.25), site
    assert any(not np.array_equal(first.members[site], second.members[site]) for site in group.members)


def test_matched_borrows_the_nearest_where_a_stratum_is_empty():
    magnitudes = {"a": np.arange(10, dtype=float)}
    group = Group(granularity="neuron", members={"a": np.array([8, 9])}, shapes={"a": (10, 1)})
    (control,) = matched(group, magnitudes, seed=0, bins=2)
    assert control.members["a"].tolist() == [6, 7]
    assert control.provenance["borrowed"] == 2
    most = Group(granularity="neuron", members={"a": np.arange(6)}, shapes={"a": (10, 1)})
    with pytest.raises(GroupError, match="too few candidates.*6 members, 4 others"):
        matched(most, magnitudes, seed=0)


def test_borrowing_takes_the_nearest_unused_each_once():
    from neurondrift.groups.controls import _nearest_unused

    generator = np.random.default_rng(0)
    values, targets = generator.random(300), np.sort(generator.random(120) * 1.2 - 0.1)
    candidates = np.sort(generator.choice(300, 200, replace=False))
    used = candidates[::4]
    free = list(np.setdiff1d(candidates, used))
    expected = []
    for target in targets:  # the same greedy rule by exhaustive search
        best = min(free, key=lambda index: abs(values[index] - target))
        expected.append(best)
        free.remove(best)
    assert _nearest_unused(values, candidates, used, targets).tolist() == expected


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


def test_score_files_notice_damage_and_foreigners(tmp_path):
    data = {site: torch.from_numpy(values) for site, values in scores().items()}
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_scores(first, data, header={"model": "m", "method": "snip", "data": "d"})
    write_scores(second, data, header={"model": "n", "method": "snip", "data": "d"})
    with pytest.raises(GroupError, match="different models"):
        check_compatible(ScoreFile(first), ScoreFile(second))
    from safetensors.torch import load_file

    assert torch.equal(load_file(first)["a.q_proj"], data["a.q_proj"])
    first.write_bytes(first.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="truncated"):
        ScoreFile(first)
    (tmp_path / "c.safetensors").write_bytes(b"not a file of ours")
    with pytest.raises(ArtifactError, match="is no score file"):
        ScoreFile(tmp_path / "c.safetensors")
    with pytest.raises(ArtifactError, match="missing"):
        ScoreFile(tmp_path / "nope.safetensors")


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "opt", "gpt_neox", "mixtral", "qwen3_moe"])
def test_units_are_the_rows_and_the_column_of_one_hidden_unit(family):
    from families import build

    from neurondrift.models.parts import unit_scores, weights_of_units
    from neurondrift.models.sites import linear_sites, mlp_units

    model = build(family)
    sites = linear_sites(model)
    units, shapes = mlp_units(sites), {name: site.shape for name, site in sites.items()}
    scored = {name: site.weight.abs() for name, site in sites.items()}
    group = select_top(unit_scores(scored, units), fraction=0.1, granularity="unit")
    assert set(group.shapes) == set(units)
    weights = weights_of_units(group, units, shapes)
    total = sum(
        float(scored[site].reshape(-1)[torch.from_numpy(indices)].sum()) for site, indices in weights.members.items()
    )
    expected = sum(float(unit_scores(scored, units)[name][indices].sum()) for name, indices in group.members.items())
    assert total == pytest.approx(expected, rel=1e-5)
    # zeroing these weights is the same as silencing the units: the MLP's outputs no longer depend on their inputs
    if family == "llama":
        name, chosen = next(iter(group.members.items()))
        mlp, hidden = model.get_submodule(name), torch.randn(3, 16)
        gated = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
        gated[:, torch.from_numpy(chosen)] = 0
        expected_output = mlp.down_proj(gated)
        for site, indices in weights.members.items():
            if site.startswith(name):
                sites[site].weight.view(-1)[torch.from_numpy(indices)] = 0
        assert torch.allclose(mlp(hidden), expected_output, atol=1e-6)
    with pytest.raises(GroupError, match="Only a group of hidden units"):
        weights_of_units(weights, units, shapes)


def test_a_matched_control_has_the_same_mean_where_members_lie_beyond_all_candidates():
    rng = np.random.default_rng(0)
    values = np.exp(rng.standard_normal((60, 100)))  # a heavy tail, of which the group takes most
    shapes = {"a": values.shape}
    chosen = np.sort(np.argsort(values.reshape(-1) * np.exp(0.8 * rng.standard_normal(values.size)))[-300:])
    group = Group(granularity="weight", members={"a": chosen.astype(np.int64)}, shapes=shapes)
    (control,) = matched(group, {"a": values}, seed=0, bins=20)
    own, other = values.reshape(-1)[chosen], values.reshape(-1)[control.members["a"]]
    assert len(own) == len(other) and not np.intersect1d(chosen, control.members["a"]).size
    assert control.provenance["borrowed"] > 0
    spread = np.sqrt((own.var() + other.var()) / 2)
    assert abs(own.mean() - other.mean()) / spread < 0.05
    assert control.provenance["imbalance"] == pytest.approx(abs(own.mean() - other.mean()) / spread, abs=1e-4)
