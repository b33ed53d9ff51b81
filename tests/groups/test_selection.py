"""Selection of groups from scores against full sorts; random groups."""

import math

import numpy as np
import pytest

from helpers.groups import SHAPES, scores
from neurondrift.groups.selection import random_group, select_top, set_difference, top_indices


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


def test_a_seed_gives_the_same_group_again():
    assert all(
        np.array_equal(
            random_group(SHAPES, fraction=0.1, seed=7).members[s], random_group(SHAPES, fraction=0.1, seed=7).members[s]
        )
        for s in SHAPES
    )
