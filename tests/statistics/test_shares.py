"""Shares of a sum with signs: recovered, free of units, gated, with a band; identities and dense oracles."""

import dataclasses

import numpy as np
import pytest

from helpers.populations import make_covariates, make_population
from neurondrift.statistics.design.plans import MATCHED_ON, Plans
from neurondrift.statistics.design.ratios import Rules, ratio_effect, ratio_sums, sums_of
from neurondrift.statistics.design.shares import NOTHING_LOST, called_share, share_effect
from neurondrift.statistics.results import encoded

RULES = Rules(1.25, 400, 0)


def planted(times, *, seeds=1, noise=1.0, mean=-1.0, layers=10, own=1):
    """Parts of a lost margin: `mean` each on average, the members' `times` that, with noise; and the design of the
    group. `own` draws the noise."""
    people, groups = make_population(np.random.default_rng(1), seeds=seeds, layers=layers, site_sd=0.0)
    people, member = make_covariates(people, groups["safety_top"], 1.0)
    rng = np.random.default_rng(own)
    scale = np.where(member, times, 1.0)
    parts = mean * scale + noise * rng.standard_normal((seeds, len(member)))
    return people, member, parts


def design_of(people, member, on=MATCHED_ON):
    values = dataclasses.replace(people, drift={"parts": np.ones((1, len(member)))})
    return Plans(values, ["parts"], 10).of(member, ~member, "parts", on).judging


def effect_of(people, member, parts, totals=None, rules=RULES):
    totals = parts.sum(axis=1) if totals is None else totals
    return share_effect(design_of(people, member), member, parts, totals, people.places(), rules)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("on", [MATCHED_ON, ("norm",)])
def test_shares_and_expected_shares_are_those_of_a_dense_sum(seeds, on):
    people, member, parts = planted(1.5, seeds=seeds)
    design, totals = design_of(people, member, on), parts.sum(axis=1)
    found = share_effect(design, member, parts, totals, people.places(), RULES)
    shares = parts / totals[:, None]
    own = [sum(row[design.compared_N]) for row in shares]
    controls = np.where(design.compared_N, 0.0, -design.coefficient_N)
    expected = [float(np.dot(controls, row)) for row in shares]
    assert found.per_seed == pytest.approx(own) and found.share == pytest.approx(np.mean(own))
    assert found.expected_per_seed == pytest.approx(expected) and found.expected == pytest.approx(np.mean(expected))
    assert found.difference.value == pytest.approx(found.share - found.expected)
    assert found.excess.value == pytest.approx(found.difference.value - found.margin)
    assert found.share_of_group == pytest.approx(np.mean([sum(row[member]) for row in shares]))
    assert found.share_of_neurons == design.compared_N.sum() / len(member)
    assert found.ratio == pytest.approx(found.share / found.expected)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("times", "verdict"), [(3.0, "more"), (1.0, "not_more"), (-2.0, "not_more")])
def test_a_planted_share_is_found(seeds, times, verdict):
    found = effect_of(*planted(times, seeds=seeds))
    assert found.comparable and found.verdict == verdict
    assert (found.p_more <= 0.025) == (verdict == "more") and (found.p_not_more <= 0.05) == (verdict == "not_more")
    low, high = found.difference.ci95
    true = (times - 1) * found.expected
    assert low < true < high


def test_a_share_at_the_band_is_inconclusive_and_noise_widens_the_interval():
    quiet, loud = (effect_of(*planted(1.25, noise=noise)) for noise in (1.0, 4.0))
    assert quiet.verdict == loud.verdict == "inconclusive"
    assert loud.difference.se > 2 * quiet.difference.se and loud.smallest_more > quiet.smallest_more > quiet.expected


def test_units_of_the_parts_make_no_difference():
    people, member, parts = planted(1.4, seeds=3)
    one, other = effect_of(people, member, parts), effect_of(people, member, 1e-6 * parts)
    for name in ("share", "expected", "margin", "p_more", "smallest_more"):
        assert getattr(other, name) == pytest.approx(getattr(one, name))
    assert other.excess.ci95 == pytest.approx(one.excess.ci95)


def test_controls_that_gain_give_a_band_around_the_share_of_neurons():
    """Where comparable neurons carry less than nothing a factor of it means nothing."""
    people, member, parts = planted(-1.0, mean=0.5)  # members lose, the others gain
    found = effect_of(people, member, parts, totals=np.array([-1000.0]))
    assert found.expected < 0 and np.isnan(found.ratio) and "ratio" in found.reasons
    assert found.margin == pytest.approx(0.25 * found.share_of_neurons)
    assert found.excess.value == pytest.approx(found.share - found.expected - found.margin)
    assert found.verdict == "more"


def test_parts_that_cancel_give_shares_above_one_and_below_zero():
    people, member, parts = planted(1.0)
    parts = np.where(member, -10.0, 9.9 * member.sum() / (~member).sum()) * np.ones_like(parts)
    found = effect_of(people, member, parts)
    assert found.share_of_group > 50 and found.expected < 0


def test_nothing_lost_gives_no_share_but_a_reason():
    people, member, parts = planted(1.0, seeds=3)
    for totals in ([-1.0, 2.0, -1.0], [0.0, -1.0, -1.0]):
        found = effect_of(people, member, parts, totals=np.array(totals))
        assert found.verdict == "inconclusive" and np.isnan([found.share, found.expected, found.excess.value]).all()
        assert encoded(found)["share"] is None and encoded(found)["share_reason"] == NOTHING_LOST


def test_the_gate_withholds_the_verdict():
    people, member, parts = planted(3.0)
    worst = np.where(member, people.norm * 50, people.norm)  # no control is like any member
    found = effect_of(dataclasses.replace(people, norm=worst), member, parts)
    assert not found.comparable and found.verdict == "inconclusive" and found.not_comparable_because


def test_ratios_rest_on_the_same_sums():
    people, member, _ = planted(1.0)
    design = design_of(people, member)
    drift = people.drift["relative"]
    one = ratio_sums(design, drift, people.places())
    other = sums_of(design.coefficient_N, design.compared_N, np.log(drift), people.places())
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert ratio_effect(design, drift, people.places(), RULES).n_compared == int(one.sums[:, 0].sum())


@pytest.mark.parametrize("times", [1.25, 1.0])
def test_no_more_wrong_calls_than_promised(times):
    """At the edge of the band "more" is called by chance in 2.5 % and "not more" in 5 %; 60 draws, so a bound."""
    people, member, _ = planted(times)
    design = design_of(people, member)
    calls = []
    for draw in range(60):
        parts = planted(times, noise=2.0, own=draw)[2]
        calls.append(share_effect(design, member, parts, parts.sum(axis=1), people.places(), RULES).verdict)
    assert calls.count("more") <= 6
    if times == 1.25:
        assert calls.count("not_more") <= 9
    else:
        assert called_share(effect_of(*planted(1.0, noise=0.1)).excess) == "not_more"
