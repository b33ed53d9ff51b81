"""Matched controls are balanced in |w| wherever that is possible, and random all the same."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chisquare

from neurondrift.groups.balance import LIMIT, any_subset, at_the_ends, imbalance, shuffled, swapped
from neurondrift.groups.controls import matched
from neurondrift.groups.group import Group
from neurondrift.groups.selection import random_group


def skewed_sites(number, size, share, seed):
    """Sites of heavy-tailed |w|, with groups that range from random ones to little else than the largest."""
    generator = np.random.default_rng(seed)
    magnitudes, members = {}, {}
    for index in range(number):
        values = np.exp(generator.standard_normal(size) * generator.choice([0.1, 0.5, 1.5]))
        noise = generator.choice([0.3, 1.0, 10.0]) * generator.standard_normal(size)
        magnitudes[f"s{index}"] = values
        members[f"s{index}"] = np.sort(np.argsort(np.log(values) + noise)[-share(generator) :]).astype(np.int64)
    return Group(granularity="neuron", members=members, shapes={site: (size, 1) for site in members}), magnitudes


def difference(values, own, other):
    """|Standardised mean difference|, written down anew."""
    spread = np.sqrt((values[own].var() + values[other].var()) / 2)
    return abs(values[own].mean() - values[other].mean()) / spread


def all_choices(values, own):
    """Every control there could be `[choices, k]`, with the signed difference of means and the standardised one."""
    choices = np.array(list(combinations(np.setdiff1d(np.arange(len(values)), own).tolist(), len(own))))
    gap = values[own].mean() - values[choices].mean(axis=1)
    return choices, gap, gap / np.sqrt((values[own].var() + values[choices].var(axis=1)) / 2)


def test_a_control_is_balanced_wherever_any_choice_is_and_else_its_mean_is_the_nearest():
    group, magnitudes = skewed_sites(150, size=13, share=lambda generator: generator.integers(2, 6), seed=1)
    (control,) = matched(group, magnitudes, seed=0)
    impossible = 0
    for site, own in group.members.items():
        values, theirs = magnitudes[site], control.members[site]
        _, gap, off = all_choices(values, own)
        assert (difference(values, own, theirs) <= 0.05) == (np.abs(off).min() <= 0.05), site
        if np.abs(off).min() > 0.05:
            impossible += 1
            assert abs(values[own].mean() - values[theirs].mean()) == pytest.approx(np.abs(gap).min()), site
    assert 30 < impossible < 120, "the sites should be of both kinds"
    assert control.provenance["unbalanceable_sites"] == control.provenance["unbalanced_sites"] == impossible


def test_what_the_ends_call_impossible_is_impossible():
    group, magnitudes = skewed_sites(150, size=12, share=lambda generator: generator.integers(2, 6), seed=2)
    verdicts = []
    for site, own in group.members.items():
        values = magnitudes[site]
        _, gap, off = all_choices(values, own)
        found = at_the_ends(values, own, np.setdiff1d(np.arange(12), own))
        verdicts.append(found.balanceable)
        assert found.balanceable == (off.min() <= LIMIT and off.max() >= -LIMIT)
        if not found.balanceable:
            assert abs(values[own].mean() - values[found.nearest].mean()) == pytest.approx(np.abs(gap).min())
    assert 15 < sum(verdicts) < 135


def test_every_site_with_a_balanced_choice_is_balanced_also_where_not_all_can_be_tried():
    generator = np.random.default_rng(3)
    group, magnitudes = skewed_sites(60, size=200, share=lambda generator: generator.integers(2, 40), seed=3)
    for site, own in group.members.items():  # beside whatever there is, a near twin for every member
        twins = magnitudes[site][own] + 0.02 * magnitudes[site][own].std() * generator.uniform(-1, 1, len(own))
        magnitudes[site] = np.append(magnitudes[site], twins)
        assert difference(magnitudes[site], own, np.arange(200, 200 + len(own))) < 0.05
    unmatched = [difference(magnitudes[s], own, generator.choice(200, len(own))) for s, own in group.members.items()]
    assert np.mean(np.array(unmatched) > 0.05) > 0.8
    for control in matched(group, magnitudes, seed=0, draws=3):
        worst = max(difference(magnitudes[s], own, control.members[s]) for s, own in group.members.items())
        assert worst <= 0.05
        assert control.provenance["unbalanced_sites"] == control.provenance["unbalanceable_sites"] == 0


def test_draws_of_controls_are_disjoint_reproducible_and_different():
    group, magnitudes = skewed_sites(40, size=120, share=lambda generator: generator.integers(1, 9), seed=4)
    untouched = random_group(group.shapes, fraction=0.2, seed=9)
    arguments = {"seed": 5, "draws": 6, "exclude": (untouched,)}
    first, again = matched(group, magnitudes, **arguments), matched(group, magnitudes, **arguments)
    elsewhere = matched(group, magnitudes, **{**arguments, "seed": 6})
    overlaps = []
    for site, own in group.members.items():
        values, taken = magnitudes[site], np.union1d(own, untouched.members[site])
        for control, same in zip(first, again, strict=True):
            assert np.array_equal(control.members[site], same.members[site])
            assert len(np.unique(control.members[site])) == len(own)
            assert not np.intersect1d(control.members[site], taken).size
        largest = np.sort(np.delete(values, taken))[-len(own) :]
        if values[own].mean() < 0.9 * largest.mean():  # a control need not be the largest candidates
            sets = [set(control.members[site].tolist()) for control in (*first, elsewhere[0])]
            overlaps.append(np.mean([len(a & b) / len(a | b) for a, b in combinations(sets, 2)]))
    assert len(overlaps) > 15
    assert np.mean(overlaps) < 0.35
    assert np.mean(np.array(overlaps) > 0.99) < 0.1  # a lone member without neighbours, strata of one candidate each


def test_the_control_of_a_single_member_is_near_but_not_always_the_nearest():
    values = np.random.default_rng(0).standard_normal(500) + 10
    own = np.array([np.argsort(values)[250]])
    group = Group(granularity="neuron", members={"a": own}, shapes={"a": (500, 1)})
    picked = [int(control.members["a"][0]) for control in matched(group, {"a": values}, seed=0, draws=30)]
    assert np.abs(values[picked] - values[own]).max() <= 0.05 * values.std()
    assert len(set(picked)) > 8
    assert own[0] not in picked


def test_swaps_balance_a_draw_from_however_far():
    generator = np.random.default_rng(0)
    values = np.exp(generator.standard_normal(300))
    own, candidates = np.argsort(values)[240:299:2], np.argsort(values)[241:300:2]
    candidates = np.union1d(candidates, np.argsort(values)[:200])
    smallest = candidates[np.argsort(values[candidates])][:30]
    ends = {tuple(np.sort(swapped(values, own, candidates, smallest, generator)).tolist()) for _ in range(5)}
    assert len(ends) == 5
    for end in ends:
        assert len(set(end)) == 30
        assert set(end) <= set(candidates.tolist())
        assert difference(values, own, np.array(end)) <= 0.05


@pytest.mark.parametrize("way", ["shuffled", "any_subset"])
def test_every_balanced_draw_has_the_same_chance(way):
    generator = np.random.default_rng(0)
    values = generator.normal(10, 1, size=20)
    own, candidates = np.arange(4), np.arange(4, 20)
    choices, _, off = all_choices(values, own)
    balanced = choices[np.abs(off) <= 0.05]
    counts, moved = dict.fromkeys(map(tuple, balanced.tolist()), 0), 0
    assert len(counts) > 20
    for _ in range(60 * len(counts)):
        if way == "shuffled":  # the walk leaves the uniform distribution as it is
            start = balanced[generator.integers(len(balanced))]
            draw = np.sort(shuffled(values, own, candidates, start, generator))
            moved += not np.array_equal(draw, start)
        else:
            draw = any_subset(values, own, candidates, generator)
        counts[tuple(draw.tolist())] += 1  # a KeyError: not balanced
    assert chisquare(list(counts.values())).pvalue > 0.001
    assert way != "shuffled" or moved > 40 * len(counts)


def test_different_constants_are_not_balanced():
    five = np.full(3, 5.0)
    assert imbalance(five, five) == 0
    assert imbalance(five, np.ones(3)) == np.inf
    values = np.array([5.0, 5.0, 1.0, 1.0, 1.0, 4.9, 5.2])
    group = Group(granularity="neuron", members={"a": np.array([0, 1])}, shapes={"a": (7, 1)})
    (control,) = matched(group, {"a": values}, seed=0)
    assert control.members["a"].tolist() == [5, 6]
    assert control.provenance["unbalanceable_sites"] == 1


def test_many_members_without_a_candidate_in_their_range_are_balanced_from_both_sides():
    generator = np.random.default_rng(0)
    members, beyond = (
        generator.normal(10, 0.3, 600),
        np.concatenate([generator.normal(5, 1, 900), generator.normal(30, 1, 900)]),
    )
    beyond = beyond[(beyond < members.min()) | (beyond > members.max())]
    values = np.append(members, beyond)
    group = Group(granularity="weight", members={"a": np.arange(600)}, shapes={"a": (len(values), 1)})
    (control,) = matched(group, {"a": values}, seed=0, bins=20)
    assert control.provenance["borrowed"] == 600
    assert difference(values, np.arange(600), control.members["a"]) <= 0.05
    assert control.provenance["unbalanced_sites"] == 0
