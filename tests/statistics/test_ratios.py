"""Ratios: recovered, free of units, gated, with the clusters that vary most; identities and dense oracles."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import special

from helpers.populations import make_covariates, make_population, run
from neurondrift.base.errors import ConfigError, DataError, GroupError
from neurondrift.statistics.design.plans import MATCHED_ON, Plans
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import (
    Places,
    RatioSums,
    Rules,
    _row_variance,
    infer_difference,
    infer_ratio,
    ratio_effect,
    ratio_sums,
)
from neurondrift.statistics.estimates import MeanPerMember
from neurondrift.statistics.inference import Reference, infer
from neurondrift.statistics.results import decide
from neurondrift.statistics.weaknesses import NotComparable, weaknesses

RULES = Rules(1.25, 400, 0)
ONE = {"metrics": ("relative",), "contrasts": (), "resamples": 200}


def planted(ratio, *, seeds=1, layers=10, **options):
    """A population with covariates that move drift, and a group whose drift is `ratio` times what it would be."""
    people, groups = make_population(np.random.default_rng(1), seeds=seeds, layers=layers, site_sd=0.0)
    return make_covariates(people, groups["safety_top"], ratio, **options)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_true_ratio_is_recovered_by_both_comparisons(seeds):
    people, member = planted(1.3, seeds=seeds, slopes=(-0.4, 0.0, 0.0))
    found = run(people, {"safety_set_difference": member}, **ONE).effects[0]
    for effect in (found.effect_norm, found.effect_matched):
        assert effect.comparable
        assert effect.ratio == pytest.approx(1.3, abs=3 * 1.3 * effect.log_ratio.se)
        assert effect.ratio_ci95[0] < 1.3 < effect.ratio_ci95[1]
        assert effect.verdict == "more"
        assert np.mean([s.value for s in effect.per_seed]) == pytest.approx(effect.log_ratio.value)


def test_only_balancing_undoes_what_goes_with_utility_and_gradient():
    people, member = planted(1.0, slopes=(-0.4, 0.6, 0.8))
    found = run(people, {"safety_set_difference": member}, **ONE).effects[0]
    assert found.effect_norm.ratio_ci95[0] > 1  # confounded: the published comparison
    assert found.effect_matched.ratio_ci95[0] < 1 < found.effect_matched.ratio_ci95[1]
    assert found.verdict == found.effect_matched.verdict == "similar"
    assert found.primary_effect is found.effect_matched
    assert {b.name: b.gated for b in found.effect_norm.balance} == {
        "norm": True,
        "utility_score": False,
        "gradient_scale": False,
    }
    assert all(abs(b.after) <= 0.05 for b in found.effect_matched.balance)


def test_units_and_relative_against_absolute_drift_make_no_difference():
    people, member = planted(1.1)
    people.drift["l2"] = people.drift["relative"] * people.norm * 3e-9
    result = run(people, {"safety_set_difference": member}, **{**ONE, "metrics": ("relative", "l2")})
    relative, absolute = result.effects
    for name in ("effect_norm", "effect_matched"):
        one, other = getattr(relative, name), getattr(absolute, name)
        assert other.log_ratio.value == pytest.approx(one.log_ratio.value, abs=1e-6)
        assert other.log_ratio.ci95 == pytest.approx(one.log_ratio.ci95, abs=1e-6)
        assert other.verdict == one.verdict


def test_every_neuron_twice_gives_the_same_ratio_and_another_order_the_same_result():
    people, member = planted(1.1)
    twice = [np.concatenate([array, array]) for array in (people.site, people.row, people.norm, member)]
    double = dataclasses.replace(
        people,
        site=twice[0],
        row=twice[1],
        norm=twice[2],
        drift={"relative": np.hstack([people.drift["relative"]] * 2)},
        covariates={k: np.concatenate([v, v]) for k, v in people.covariates.items()},
    )
    order = np.random.default_rng(0).permutation(len(member))
    shuffled = dataclasses.replace(
        people,
        site=people.site[order],
        row=people.row[order],
        norm=people.norm[order],
        drift={"relative": people.drift["relative"][:, order]},
        covariates={k: v[order] for k, v in people.covariates.items()},
    )
    one, two, other = (
        run(p, {"g": m}, **ONE, roles={"g": "safety"}).effects[0]
        for p, m in ((people, member), (double, twice[3]), (shuffled, member[order]))
    )
    assert two.effect_matched.log_ratio.value == pytest.approx(one.effect_matched.log_ratio.value, abs=1e-6)
    assert other.effect_matched.log_ratio.value == pytest.approx(one.effect_matched.log_ratio.value, abs=1e-6)
    assert other.effect_norm.log_ratio.ci95 == pytest.approx(one.effect_norm.log_ratio.ci95, abs=1e-6)
    assert two.effect_matched.n_compared == 2 * one.effect_matched.n_compared


def test_multiplying_the_drift_of_members_moves_the_estimate_and_nothing_else():
    people, member = planted(1.0, seeds=3)
    found = run(people, {"safety_set_difference": member}, **ONE).effects[0]
    without, injected = found.primary_effect.log_ratio, found.injected
    assert injected.factor == 1.25 and injected.found and injected.verdict == "more"
    assert injected.log_ratio.value == pytest.approx(without.value + math.log(1.25))
    assert injected.log_ratio.se == pytest.approx(without.se)
    moved = [limit + math.log(1.25) for limit in (*without.ci90, *without.ci95)]
    assert [*injected.log_ratio.ci90, *injected.log_ratio.ci95] == pytest.approx(moved)


def test_a_noisy_group_hides_the_injection():
    people, member = planted(1.0, layers=1)
    noisy = np.random.default_rng(0).normal(0, 3, member.sum())
    people.drift["relative"][:, member] *= np.exp(noisy)
    result = run(people, {"safety_set_difference": member}, **ONE)
    assert not result.effects[0].injected.found
    assert "injected_control" in [weakness.kind for weakness in weaknesses(result)]


def test_a_group_that_the_norm_chose_is_not_comparable_and_has_no_verdict():
    """It was called "protected": relative drift falls with the norm, and nobody is like the largest."""
    people, groups = make_population(np.random.default_rng(2), layers=8)
    member = np.zeros(len(people.site), dtype=bool)
    for code in range(len(people.site_names)):
        inside = np.flatnonzero(people.site == code)
        member[inside[np.argsort(-people.norm[inside])[: max(1, len(inside) // 100)]]] = True
    people.drift["relative"] = people.drift["l2"] / people.norm**2
    result = run(people, {"safety_set_difference": member, "random": groups["random"]}, **ONE)
    found = result.effect("safety_set_difference", "relative")
    assert not found.effect_norm.comparable and "imbalance" in found.effect_norm.not_comparable_because
    assert found.verdict == "inconclusive" and math.isnan(found.p_holm)
    assert all(part.verdict == "inconclusive" for part in (*found.by_module, *found.by_layer_third))
    assert result.effect("random", "relative").effect_norm.comparable
    assert result.family_size == 0
    (weakness,) = (w for w in weaknesses(result) if isinstance(w, NotComparable))
    assert weakness.worst == "norm" and abs(weakness.difference) > 0.1


def test_a_drift_of_zero_has_no_log_and_is_counted():
    people, member = planted(1.2)
    some = np.flatnonzero(member)[:2]
    people.drift["relative"][0, some] = 0.0
    found = run(people, {"safety_set_difference": member}, **ONE).effects[0]
    for effect in (found.effect_norm, found.effect_matched):
        assert effect.n_undefined == 2 and math.isfinite(effect.ratio)
        assert effect.n_members == effect.n_compared + effect.n_without_control + effect.n_undefined
    assert found.n_undefined == 0  # a drift of 0 is a drift: g has it
    people.drift["relative"][0, np.flatnonzero(member)[: member.sum() // 4]] = 0.0
    assert "undefined_drift" in run(people, {"g": member}, **ONE).effects[0].effect_norm.not_comparable_because


# Clusters


def sums_of(values_JS, members_J, layers=None):
    sites = np.arange(len(members_J))
    none = np.zeros(0, dtype=np.int64)
    sums = RatioSums(sites, np.column_stack([members_J, values_JS * members_J[:, None]]), none, none, np.zeros(0))
    layer = sites if layers is None else layers
    return sums, Places(sites, sites, np.asarray(layer), np.zeros(len(sites), dtype=bool))


def test_the_clustering_with_the_larger_standard_error_is_taken():
    rng = np.random.default_rng(0)
    layers = np.repeat(np.arange(15), 7)
    members = rng.integers(2, 9, len(layers)).astype(float)
    shared = (0.3 * rng.standard_normal(15))[layers] + 0.05 * rng.standard_normal(len(layers))
    sums, places = sums_of(shared[:, None], members, layers)
    found = infer_ratio(sums, places, RULES)
    assert found.cluster == "layer" and found.inferred.sites == len(layers)
    joint = np.stack([np.bincount(layers, weights=column) for column in sums.sums.T], axis=1)
    oracle = infer(joint, MeanPerMember(1), resamples=400, rng_seed=0, units="layers")
    assert found.inferred.se == oracle.se and found.inferred.interval(0.95) == oracle.interval(0.95)
    assert "15 layers" in found.inferred.method
    opposed = np.tile([1, -1, 1, -1, 1, -1, 0], 15) * 0.3 + 0.02 * rng.standard_normal(len(layers))
    sums, places = sums_of(opposed[:, None], np.full(len(layers), 4.0), layers)
    assert infer_ratio(sums, places, RULES).cluster == "site"


def test_the_standard_error_over_layers_of_like_size_is_that_of_their_mean():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 1))
    sums, places = sums_of(np.repeat(values, 4, axis=0), np.ones(24), np.repeat(np.arange(6), 4))
    found = infer_ratio(sums, places, RULES)
    assert found.cluster == "layer"
    assert found.inferred.se == pytest.approx(values.std(ddof=1) / math.sqrt(6))
    assert found.inferred.interval(0.95)[1] - found.inferred.value == pytest.approx(
        special.stdtrit(5, 0.975) * found.inferred.se
    )


def test_the_part_of_rows_is_that_of_two_way_clustering():
    """Cameron, Gelbach and Miller (2011): layers + rows - rows within layers, over all pairs of members."""
    rng = np.random.default_rng(0)
    n = 80
    row, layer, influence = rng.integers(0, 9, n), rng.integers(0, 12, n), rng.standard_normal(n)
    influence += rng.standard_normal(9)[row]
    pairs = itertools.product(range(n), range(n))
    expected = sum(influence[i] * influence[j] for i, j in pairs if row[i] == row[j] and layer[i] != layer[j])
    assert _row_variance(influence, row, layer).variance == pytest.approx(expected)
    assert _row_variance(influence, np.arange(n), layer).variance == 0
    assert _row_variance(influence[:0], row[:0], layer[:0]).variance == 0


def test_one_row_in_all_layers_widens_the_interval_only_where_rows_are_coordinates():
    rng = np.random.default_rng(3)
    layers, size = 24, 60
    site = np.repeat(np.arange(layers), size)
    row = np.tile(np.arange(size), layers)
    moved = 0.6 * rng.standard_normal(4)  # of the four rows that are members in every layer
    log = 0.05 * rng.standard_normal(len(site)) + np.where(row < 4, moved[row % 4], 0.0)
    member = row < 4

    def effect(kind, rows):
        people = Population(
            site=site,
            site_names=tuple(map(str, range(layers))),
            module_type=(kind,) * layers,
            layer=tuple(range(layers)),
            row=rows,
            norm=np.exp(0.1 * rng.standard_normal(len(site))),
            drift={"l2": np.exp(log)[None]},
        )
        plan = Plans(people, ["l2"], 5).of(member, ~member, "l2", ("norm",))
        return ratio_effect(plan.norm, people.drift["l2"], people.places(), RULES)

    coordinates, others = effect("self_attn.o_proj", row), effect("q_proj", row)
    assert coordinates.row_share > 0.9 and others.row_share == 0
    assert coordinates.log_ratio.se > 3 * others.log_ratio.se
    assert coordinates.log_ratio.se == pytest.approx(moved.std(ddof=0) / 2, rel=0.15)
    assert effect("o_proj", np.arange(len(site))).row_share == 0


def test_the_sums_are_members_minus_the_mean_of_their_controls():
    people, member = planted(1.2, seeds=2)
    places = people.places()
    design = Plans(people, ["relative"], 10).of(member, ~member, "relative", MATCHED_ON).matched
    sums = ratio_sums(design, people.drift["relative"], places)
    log = np.log(people.drift["relative"])
    for position, code in enumerate(sums.sites[:5]):
        inside = people.site == code
        own, weights = inside & design.compared_N, np.where(inside, design.weight_N, 0)
        expected = log[:, own].sum(axis=1) - own.sum() * (log @ weights) / weights.sum()
        np.testing.assert_allclose(sums.sums[position, 1:], expected, atol=1e-9)
    writing = np.flatnonzero(places.writes_residual[sums.sites])
    for position in writing[:3]:
        own = sums.member_value[sums.member_site == sums.sites[position]]
        assert own.sum() == pytest.approx(sums.sums[position, 1:].mean())


def test_a_difference_is_that_of_its_groups_and_shares_their_clusters():
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(40)
    one, places = sums_of((shared + 0.1 * rng.standard_normal(40))[:, None], np.full(40, 3.0))
    two, _ = sums_of(shared[:, None], np.full(40, 5.0))
    found = infer_difference(one, two, places, RULES)
    alone = [infer_ratio(part, places, RULES).inferred for part in (one, two)]
    assert found.inferred.value == pytest.approx(alone[0].value - alone[1].value)
    assert found.inferred.se < 0.2 * alone[0].se


def test_extra_variance_widens_and_its_freedom_is_welchs():
    rng = np.random.default_rng(0)
    sums, places = sums_of(rng.standard_normal((40, 3)), np.full(40, 2.0))
    inferred = infer_ratio(sums, places, RULES).inferred
    wider = inferred.with_extra(inferred.se**2, 4.0)
    assert wider.se == pytest.approx(inferred.se * math.sqrt(2))
    own = inferred.reference.seed_share
    assert wider.reference.seed_share == pytest.approx((own + 1) / 2)
    expected = (own + 1) ** 2 / (own**2 / inferred.reference.seed_df + 1 / 4)
    assert wider.reference.seed_df == pytest.approx(expected)
    assert inferred.with_extra(0.0, 1.0) is inferred


# What would be called more


@pytest.mark.parametrize("se", [0.03, 0.1, 0.2])
def test_the_smallest_ratio_called_more_is_called_so_in_four_of_five_studies(se):
    rng = np.random.default_rng(0)
    sums, places = sums_of((se * math.sqrt(30) * rng.standard_normal(30))[:, None], np.ones(30))
    inferred = infer_ratio(sums, places, RULES).inferred
    band = math.log(1.25)
    smallest = inferred.smallest_more(band)
    draws = inferred.reference.site_draws
    drawn = smallest + inferred.se * draws
    reach90 = [limit - inferred.value for limit in inferred.equivalence_interval()]
    reach95 = [limit - inferred.value for limit in inferred.interval(0.95)]
    called = [decide((v + reach90[0], v + reach90[1]), (v + reach95[0], v + reach95[1]), band) for v in drawn]
    assert np.mean([verdict == "more" for verdict in called]) == pytest.approx(0.8, abs=0.01)
    assert smallest > inferred.detectable() - 1e-3  # the power to reject 0 is no power to be called more
    if se == 0.03:
        assert smallest > band - 2 * inferred.se


def test_quantiles_of_seeds_and_sites_are_averaged_by_their_variances():
    mixed = Reference(None, 30.0, 2.0, 0.3)
    for q in (0.025, 0.3, 0.95):
        expected = 0.7 * special.stdtrit(30, q) + 0.3 * special.stdtrit(2, q)
        assert mixed.quantile(q) == pytest.approx(expected)
        assert mixed.lower(mixed.quantile(q)) == pytest.approx(q, abs=1e-6)
        assert mixed.upper(mixed.quantile(q)) == pytest.approx(1 - q, abs=1e-6)


def test_less_than_the_band_is_said_of_a_difference_that_was_found_within_it():
    people, member = planted(1.08, layers=30)
    effect = run(people, {"g": member}, **ONE, roles={"g": "safety"}).effects[0].primary_effect
    assert effect.verdict == "similar" and effect.below_band and not effect.beyond_band
    assert effect.ratio_ci95[0] > 1 and effect.ratio_ci90[1] < 1.25
    people, member = planted(2.0, layers=30)
    effect = run(people, {"g": member}, **ONE, roles={"g": "safety"}).effects[0].primary_effect
    assert effect.verdict == "more" and effect.beyond_band and not effect.below_band


# The study


def test_groups_that_judge_and_controls_that_are_known_before():
    people, member = planted(1.5)
    rng = np.random.default_rng(0)
    groups = {
        "safety_top": member,
        "safety_set_difference": member,
        "random": rng.random(len(member)) < 0.02,
        "style_set_difference": rng.random(len(member)) < 0.02,
        "gradient_top": member,
    }
    result = run(people, groups, **ONE)
    assert result.judging == ("safety_set_difference",)
    assert [e.group for e in result.effects if e.judging] == ["safety_set_difference"]
    assert result.comparison_that_judges == "matched" and result.band == 1.25
    checks = {check.group: check for check in result.controls}
    assert {name: (c.expected, c.passed) for name, c in checks.items()} == {
        "random": ("similar", True),
        "style_set_difference": ("similar", True),
        "gradient_top": ("more", True),
    }
    matched_on = {b.name for b in result.effect("gradient_top", "relative").effect_matched.balance if b.gated}
    assert matched_on == {"norm", "utility_score"}  # it is chosen by the gradient
    assert result.family_size == 2
    moved = {**people.drift, "relative": people.drift["relative"] * np.where(groups["random"], 1.6, 1.0)}
    moved["relative"][:, member] /= 1.5
    failed = run(dataclasses.replace(people, drift=moved), groups, **ONE)
    assert [w.kind for w in weaknesses(failed)][:2] == ["negative_control", "positive_control"]


def test_contrasts_compare_members_that_are_not_shared():
    people, member = planted(1.4)
    rng = np.random.default_rng(0)
    half = member & (rng.random(len(member)) < 0.5)
    other = half | (rng.random(len(member)) < 0.01)
    groups = {"safety_set_difference": member, "utility_top": other}
    settings = {**ONE, "contrasts": (("safety_set_difference", "utility_top"),)}
    result = run(people, groups, **settings)
    (contrast,) = result.contrasts
    assert contrast.shared == int((member & other).sum()) >= half.sum()
    assert contrast.comparable and contrast.comparison == "matched"
    assert contrast.ratio == pytest.approx(1.4, abs=0.2) and contrast.verdict == "more"
    (mirrored,) = run(
        people, groups, **{**settings, "contrasts": (("utility_top", "safety_set_difference"),)}
    ).contrasts
    assert mirrored.log_ratio.value == pytest.approx(-contrast.log_ratio.value)
    same = run(
        people, {"safety_top": member, "utility_top": member}, **{**ONE, "contrasts": (("safety_top", "utility_top"),)}
    )
    assert same.contrasts[0].verdict == "inconclusive" and same.contrasts[0].shared == member.sum()


def test_what_is_matched_may_be_chosen_and_mistakes_are_named():
    people, member = planted(1.0)
    on = {"g": ("norm", "gradient_scale")}
    effect = run(people, {"g": member}, **ONE, match_on=on).effects[0]
    assert [b.name for b in effect.effect_matched.balance if b.gated] == list(on["g"])
    assert run(people, {"g": member}, **ONE, match_on={"g": ("norm",)}).effects[0].effect_matched is None
    for change, error, words in (
        ({"match_on": {"g": ("colour",)}}, ConfigError, "covariate is unknown"),
        ({"match_on": {"h": ("norm",)}}, GroupError, "group is unknown"),
        ({"judging": ["h"]}, GroupError, "group is unknown"),
        ({"band": 1.0}, ConfigError, "band of equivalence"),
    ):
        with pytest.raises(error, match=words):
            run(people, {"g": member}, **ONE, **change)
    with pytest.raises(DataError, match="utility_score does not fit"):
        dataclasses.replace(people, covariates={"utility_score": people.norm[:-1]})
