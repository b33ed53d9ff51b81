"""Selection of groups from scores against full sorts; random groups."""

import math

import numpy as np
import pytest

from helpers.groups import SHAPES, scores
from neurondrift.groups.group import Group
from neurondrift.groups.selection import random_group, select_top, set_difference, set_difference_like, top_indices


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


@pytest.mark.parametrize("granularity", ["neuron", "weight"])
def test_a_placebo_difference_is_as_large_in_every_site_as_the_group_that_it_is_like(granularity):
    style, safety, utility = scores(2), scores(0), scores(1)
    like = set_difference(safety, utility, p=0.2, q=0.3, granularity=granularity)
    group = set_difference_like(style, utility, p=0.2, like=like)
    top = select_top(utility, fraction=0.2, granularity=granularity)
    for site, own in like.members.items():
        values = style[site].sum(axis=1) if granularity == "neuron" else style[site].reshape(-1)
        outside = sorted(set(range(values.size)) - set(top.members[site].tolist()))
        expected = [outside[i] for i in brute_top(values[outside].tolist(), len(own))]
        assert group.members[site].tolist() == expected
    assert group.granularity == granularity and dict(group.shapes) == dict(like.shapes)


def test_a_placebo_difference_of_the_safety_scores_is_the_set_difference_itself():
    safety, utility = scores(0), scores(1)
    like = set_difference(safety, utility, p=0.2, q=0.3, granularity="neuron")
    group = set_difference_like(safety, utility, p=0.2, like=like)
    assert all(np.array_equal(group.members[site], like.members[site]) for site in SHAPES)


def test_a_placebo_difference_has_fewer_members_only_where_there_are_no_more():
    site, out_features = next((site, shape[0]) for site, shape in SHAPES.items())
    like = Group(granularity="neuron", members={site: np.arange(out_features)}, shapes=SHAPES)
    group = set_difference_like(scores(2), scores(1), p=0.5, like=like)
    assert list(group.members) == [site]
    assert len(group.members[site]) == out_features - out_features // 2


def test_a_seed_gives_the_same_group_again():
    assert all(
        np.array_equal(
            random_group(SHAPES, fraction=0.1, seed=7).members[s], random_group(SHAPES, fraction=0.1, seed=7).members[s]
        )
        for s in SHAPES
    )
