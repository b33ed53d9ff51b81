"""Exchangeable draws: the group is one of them, so that a group of chance is an outlier as often as p says."""

import numpy as np
import pytest

from neurondrift.base.errors import GroupError
from neurondrift.groups.controls import comparable_part, matched
from neurondrift.groups.group import Group
from neurondrift.statistics.null import empirical_p, is_settled

SITES, SIZE, DRAWS = 6, 100, 19


def chance(share, generator):
    """A group of chance in sites of heavy-tailed |w|."""
    members, magnitudes = {}, {}
    for index in range(SITES):
        site = f"s{index}"
        magnitudes[site] = np.exp(0.3 * generator.normal(size=SIZE) + generator.normal())
        members[site] = np.sort(generator.choice(SIZE, round(share * SIZE), replace=False)).astype(np.int64)
    return Group(granularity="neuron", members=members, shapes={site: (SIZE, 1) for site in members}), magnitudes


def outcomes(share, *, groups, each, seed):
    """Outcomes of groups `[R]` and of their draws `[R, K]`: sums of heavy-tailed effects, which differ by site."""
    generator = np.random.default_rng(seed)
    own, null = [], []
    for number in range(groups):
        group, magnitudes = chance(share, generator)
        part, _ = comparable_part(group, magnitudes)
        rest = (group - part,)
        controls = matched(part, magnitudes, seed=number, draws=DRAWS, exclude=rest, exchangeable=True)
        scale = np.exp(generator.normal(scale=0.7, size=(SITES, each, 1)))
        effects = scale * (generator.standard_t(3, size=(SITES, each, SIZE)) + generator.normal(size=(SITES, each, 1)))

        def sums(of, effects=effects):
            return np.sum([effects[int(site[1:])][:, rows].sum(axis=1) for site, rows in of.members.items()], axis=0)

        own.append(sums(part))
        null.append(np.array([sums(control) for control in controls]).T)
    return np.concatenate(own), np.concatenate(null)


@pytest.mark.parametrize("share", [0.04, 0.2, 0.4])
def test_a_group_of_chance_is_an_outlier_as_often_as_p_says(share):
    """Of draws apart from the group P(p <= .05) is .1 to .4 here; also where the null may stop early."""
    own, null = outcomes(share, groups=20, each=60, seed=1)
    p = np.array([empirical_p(value, draws) for value, draws in zip(own, null, strict=True)])
    for level, low, high in ((0.05, 0.03, 0.07), (0.1, 0.07, 0.13)):
        assert low <= (p <= level + 1e-9).mean() <= high, (share, level)
    stopped = []
    for value, draws in zip(own, null, strict=True):
        made = next((k for k in range(DRAWS) if is_settled(value, draws[:k], planned=DRAWS)), DRAWS)
        stopped.append((empirical_p(value, draws[:made]), made))
    of_stopped, made = np.array(stopped).T
    assert (of_stopped[made < DRAWS] > 0.1).all() and made.mean() < DRAWS / 2
    assert (of_stopped[made == DRAWS] == p[made == DRAWS]).all()


def test_draws_hold_as_many_members_as_chance_has_it_in_the_same_strata_and_balanced():
    generator = np.random.default_rng(0)
    group, magnitudes = chance(0.2, generator)
    part, support = comparable_part(group, magnitudes)
    assert support.members == len(group) and support.left_out == len(group) - len(part) and part.role == group.role
    controls = matched(part, magnitudes, seed=3, draws=40, exclude=(group - part,), exchangeable=True)
    again = matched(part, magnitudes, seed=3, draws=2, exclude=(group - part,), exchangeable=True)
    shares = []
    for number, control in enumerate(controls):
        assert control.provenance["exchangeable"] and control.provenance["borrowed"] == 0
        assert control.provenance["unbalanced_sites"] == 0
        for site, rows in part.members.items():
            values, picked = magnitudes[site], control.members[site]
            assert len(picked) == len(rows) == len(np.unique(picked))
            assert values[rows].min() <= values[picked].min() and values[picked].max() <= values[rows].max()
            assert number > 1 or np.array_equal(picked, again[number].members[site])
        shares.append(len(part & control) / len(part))
    assert 0.15 < np.mean(shares) < 0.3  # 0.2 by chance alone; within strata that have members a little more
    assert 0.15 < support.members_per_candidate < 0.5


def test_sites_without_comparable_neurons_are_in_neither_the_part_nor_the_draws():
    values = np.concatenate([np.linspace(1, 2, 90), np.linspace(5, 6, 10)])
    members = {"beyond": np.arange(90, 100), "within": np.arange(0, 90, 9), "alone": np.array([95])}
    group = Group(granularity="neuron", members=members, shapes=dict.fromkeys(members, (100, 1)))
    magnitudes = {"beyond": values, "within": values, "alone": np.append(np.linspace(1, 2, 95), [9, 1, 1, 1, 1])}
    part, support = comparable_part(group, magnitudes)
    assert list(part.members) == ["within"]
    assert support[:4] == (21, 11, 3, 2)
    (draw,) = matched(part, magnitudes, seed=0, exclude=(group - part,), exchangeable=True)
    assert list(draw.members) == ["within"]
    with pytest.raises(GroupError, match="beyond has too few candidates"):
        matched(group, magnitudes, seed=0, exchangeable=True)
    lonely = Group(granularity="neuron", members={"beyond": members["beyond"]}, shapes={"beyond": (100, 1)})
    nothing, support = comparable_part(lonely, magnitudes)
    assert not len(nothing) and np.isnan(support.members_per_candidate)


def test_a_single_member_has_the_neurons_near_it():
    values = np.random.default_rng(0).standard_normal(500) + 10
    own = np.array([np.argsort(values)[250]])
    group = Group(granularity="neuron", members={"a": own}, shapes={"a": (500, 1)})
    part, support = comparable_part(group, {"a": values})
    assert part is group and 0 < support.members_per_candidate < 0.2
    picked = [int(d.members["a"][0]) for d in matched(group, {"a": values}, seed=0, draws=60, exchangeable=True)]
    assert np.abs(values[picked] - values[own]).max() <= 0.05 * values.std()
    assert own[0] in picked and len(set(picked)) > 8


def test_strata_are_merged_until_each_has_as_many_candidates_as_members():
    from neurondrift.groups.strata import counts, merged_bounds, within

    generator = np.random.default_rng(5)
    for trial in range(60):
        values = np.exp(generator.normal(size=80) * generator.choice([0.2, 1.0]))
        own = np.sort(np.argsort(np.log(values) + generator.normal(size=80))[-generator.integers(2, 30) :])
        others = within(values, own, np.setdiff1d(np.arange(80), own))
        if len(others) < len(own):
            continue
        members, candidates = counts(values, own, others, merged_bounds(values, own, others, 10))
        assert members.sum() == len(own) and candidates.sum() == len(others), trial
        assert (members >= 1).all() and (candidates >= members).all(), trial
