"""Doses of a group: its most important members, site by site."""

import numpy as np
import pytest

import neurondrift as nd
from neurondrift.base.errors import GroupError
from neurondrift.groups.selection import random_group


def test_doses_lie_within_each_other_and_take_the_most_important_of_each_site(tmp_path):
    from neurondrift.groups.doses import digest, dose_of, importance_of, read_importance, write_importance

    generator = np.random.default_rng(0)
    shapes = {"a": (40, 3), "b": (20, 5), "c": (9, 2)}
    scores = {
        site: generator.random(shape).astype(np.float32) * (100 if site == "b" else 1) for site, shape in shapes.items()
    }
    group = random_group(shapes, fraction=0.5, seed=3, granularity="neuron")
    importance = importance_of(group, scores)
    for site, rows in group.members.items():
        assert importance[site] == pytest.approx(scores[site][rows].sum(axis=1), rel=1e-6)
    doses = {share: dose_of(group, importance, share) for share in (0.1, 0.25, 0.5, 1.0)}
    assert doses[1.0] is group
    assert [len(dose) for dose in doses.values()] == [round(share * len(group)) for share in doses]
    for small, large in ((0.1, 0.25), (0.25, 0.5), (0.5, 1.0)):
        assert len(doses[small] - doses[large]) == 0
    half = doses[0.5]
    for site, rows in group.members.items():  # no site is favoured because its scores are larger
        assert abs(len(half.members[site]) - len(rows) / 2) <= 1
        kept = np.isin(rows, half.members[site])
        assert importance[site][kept].min() >= importance[site][~kept].max()
    write_importance(tmp_path / "g.parquet", group, importance)
    read = read_importance(tmp_path / "g.parquet", group)
    assert all(np.array_equal(read[site], importance[site]) for site in importance)
    with pytest.raises(nd.UserError, match="another group"):
        read_importance(tmp_path / "g.parquet", half)
    with pytest.raises(nd.UserError, match="was not kept"):
        read_importance(tmp_path / "none.parquet", group)
    with pytest.raises(GroupError, match="no share"):
        dose_of(group, importance, 1.5)
    weights = random_group(shapes, fraction=0.2, seed=1, granularity="weight")
    order = importance_of(weights, scores)
    assert np.array_equal(order["a"], scores["a"].reshape(-1)[weights.members["a"]])
    assert digest(weights) != digest(group) == digest(doses[1.0])
