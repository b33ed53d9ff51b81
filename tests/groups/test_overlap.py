"""Overlaps of groups against brute force and simulation."""

import numpy as np
import pytest

from neurondrift.base.errors import GroupError
from neurondrift.groups.overlap import overlap, overlap_by, stability
from neurondrift.groups.selection import random_group
from neurondrift.study.experiments.stability import layer_of_name, module_type_of_name

SHAPES = {"m.layers.0.mlp.up_proj": (40, 25), "m.layers.1.mlp.experts.down_proj.3": (60, 10)}


def test_overlap_equals_sets():
    one, two = (random_group(SHAPES, fraction=0.2, seed=seed) for seed in (0, 1))
    a = {(site, index) for site, indices in one.members.items() for index in indices.tolist()}
    b = {(site, index) for site, indices in two.members.items() for index in indices.tolist()}
    found = overlap(one, two)
    assert (found.first, found.second, found.shared) == (len(a), len(b), len(a & b))
    assert found.jaccard == len(a & b) / len(a | b)
    assert found.overlap == len(a & b) / min(len(a), len(b))
    assert overlap(one, one).jaccard == 1


def test_chance_is_what_random_groups_show():
    fixed = random_group(SHAPES, fraction=0.2, seed=0)
    found = [overlap(fixed, random_group(SHAPES, fraction=0.2, seed=seed)) for seed in range(1, 200)]
    mean, error = np.mean([f.shared for f in found]), np.std([f.shared for f in found]) / np.sqrt(len(found))
    assert abs(mean - found[0].chance_shared) < 4 * error
    assert np.mean([f.jaccard for f in found]) == pytest.approx(found[0].chance_jaccard, rel=0.05)


def test_classes_add_up():
    one, two = (random_group(SHAPES, fraction=0.2, seed=seed) for seed in (0, 1))
    by_layer = overlap_by(one, two, layer_of_name)
    assert list(by_layer) == [0, 1]
    assert sum(part.shared for part in by_layer.values()) == overlap(one, two).shared
    assert list(overlap_by(one, two, module_type_of_name)) == ["up_proj", "down_proj"]


def test_stability_of_equal_and_of_random_groups():
    groups = [random_group(SHAPES, fraction=0.2, seed=seed) for seed in range(5)]
    assert stability([groups[0]] * 3).jaccard == 1
    found = stability(groups)
    assert (found.draws, found.pairs) == (5, 10)
    assert found.jaccard == pytest.approx(found.chance_jaccard, rel=0.25)
    assert found.jaccard_low <= found.jaccard <= found.jaccard_high
    with pytest.raises(GroupError, match="at least two draws"):
        stability(groups[:1])


def test_groups_that_do_not_compare():
    one = random_group(SHAPES, fraction=0.2, seed=0)
    with pytest.raises(GroupError, match="do not overlap"):
        overlap(one, random_group(SHAPES, fraction=0.2, seed=0, granularity="neuron"))
    with pytest.raises(GroupError, match="different shapes"):
        overlap(one, random_group({site: (9, 9) for site in SHAPES}, fraction=0.2, seed=0))
