"""Matched controls: equal counts, near magnitudes, and whom they borrow."""

import numpy as np
import pytest

from neurondrift.base.errors import GroupError
from neurondrift.groups.controls import matched, unlike
from neurondrift.groups.group import Group
from neurondrift.groups.selection import select_top


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
    from neurondrift.groups.strata import _nearest_unused

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


def test_others_that_are_unlike_the_members_are_left_to_no_control():
    generator = np.random.default_rng(3)
    values = {"a": np.exp(generator.normal(size=200)), "b": np.exp(generator.normal(size=30))}
    values["a"][:5] = 0.0
    values["b"][3] = np.nan
    members = {"a": np.argsort(values["a"])[[20, 21, 150, 199]], "b": np.array([3])}
    members = {site: np.sort(own).astype(np.int64) for site, own in members.items()}
    group = Group(granularity="neuron", members=members, shapes={"a": (200, 1), "b": (30, 1)})
    apart = unlike(group, values, candidates=5)
    assert set(apart.members) == {"a"}  # nothing is known of b's only member
    others = [m for m in range(5, 200) if m not in members["a"]]
    logs = np.log(np.maximum(values["a"], 1e-300))
    nearest = [sorted(others, key=lambda m, own=own: abs(logs[m] - logs[own])) for own in members["a"]]
    kept = next(kept for k in range(200) if len(kept := {m for own in nearest for m in own[: k + 1]}) >= 5 * 4)
    assert set(apart.members["a"]) == set(range(200)) - kept - set(members["a"])
    controls = matched(group.with_members({"a": members["a"]}, {}), values, seed=0, exclude=(apart,), draws=10)
    assert all(set(control.members["a"]) <= kept for control in controls)
