"""Statistics: all verdicts reachable, the confound undone, agreement with scipy and statsmodels, honest NaN."""

import json
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from neurondrift.base.errors import ConfigError, DataError, GroupError, UserError
from neurondrift.report.conclusion import association_sentences, conclusion
from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.comparison import Population
from neurondrift.statistics.descriptive import BehaviourSeries, associate
from neurondrift.statistics.estimates import (
    Difference,
    MatchedEffect,
    cohens_d_statistic,
    hedges_correction,
    matched_sums,
    raw_sums,
)
from neurondrift.statistics.inference import Inference, Reference, holm, infer, infer_plain, permutation_p
from neurondrift.statistics.matching import balance, quantile_bins, refine_bins
from neurondrift.statistics.results import decide, to_json

METRICS = ("relative", "l2")


def make_population(rng, *, seeds=1, layers=6, effect=0.0, site_sd=0.1, seed_sd=0.0, sizes=(192, 96, 300, 400)):
    """Sites of several sizes; 2 % members, whose drift is shifted by `effect` within-site SDs."""
    sizes = np.array(list(sizes) * layers)
    sites, n = len(sizes), sizes.sum()
    site = np.repeat(np.arange(sites), sizes)
    norm = np.exp(0.2 * rng.standard_normal(n))
    member = np.zeros(n, dtype=bool)
    for code in range(sites):
        inside = np.flatnonzero(site == code)
        member[rng.choice(inside, max(1, len(inside) // 50), replace=False)] = True
    drift = np.exp(0.5 * rng.standard_normal((seeds, n)))
    within = np.exp(0.125) * np.sqrt(np.exp(0.25) - 1)
    shift = effect + site_sd * rng.standard_normal(sites)[None] + seed_sd * rng.standard_normal(seeds)[:, None]
    drift += np.where(member, shift[:, site] * within, 0.0)
    kinds = ("q_proj", "k_proj", "o_proj", "up_proj")[: len(sizes) // layers]
    population = Population(
        site=site,
        site_names=tuple(f"layers.{i // len(kinds)}.{kinds[i % len(kinds)]}" for i in range(sites)),
        module_type=tuple(kinds[i % len(kinds)] for i in range(sites)),
        layer=tuple(i // len(kinds) for i in range(sites)),
        row=np.concatenate([np.arange(s) for s in sizes]),
        norm=norm,
        drift={"relative": drift, "l2": drift * norm},
    )
    return population, {"safety_top": member, "random": pick(rng, site, sites), "utility_top": pick(rng, site, sites)}


def pick(rng, site, sites):
    chosen = np.zeros(len(site), dtype=bool)
    for code in range(sites):
        inside = np.flatnonzero(site == code)
        chosen[rng.choice(inside, max(1, len(inside) // 50), replace=False)] = True
    return chosen


def run(population, groups, **settings):
    settings = {
        "metrics": METRICS,
        "seed_labels": [str(s) for s in range(len(population.drift["relative"]))],
        "resamples": 400,
        **settings,
    }
    return analyze(population, groups, **settings)


@pytest.fixture(scope="module")
def study():
    population, groups = make_population(np.random.default_rng(1), seeds=3, effect=0.6, seed_sd=0.02)
    return population, groups, run(population, groups)


# Verdicts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("effect", "layers", "site_sd", "verdict"),
    [(0.8, 30, 0.1, "more"), (0.0, 30, 0.1, "similar"), (-0.6, 30, 0.1, "protected"), (0.2, 2, 0.6, "inconclusive")],
)
def test_each_verdict_is_reached_by_a_simulated_study(effect, layers, site_sd, verdict):
    population, groups = make_population(np.random.default_rng(7), effect=effect, layers=layers, site_sd=site_sd)
    result = run(population, groups)
    found = result.effect("safety_top", "relative")
    assert found.verdict == verdict
    text = conclusion(result)
    assert {"more": "support H1", "similar": "support H2", "protected": "protected", "inconclusive": "cannot decide"}[
        verdict
    ] in text
    assert "one training seed" in text


def test_three_seeds_reach_more_and_say_how_few_three_are(study):
    _, _, result = study
    found = result.effect("safety_top", "relative")
    assert found.verdict == "more"
    assert found.g.ci95[0] < 0.6 < found.g.ci95[1]
    assert "2 degrees of freedom" in conclusion(result)
    assert len(found.per_seed) == 3
    assert np.mean([seed.value for seed in found.per_seed]) == pytest.approx(found.g.value, rel=1e-3)


@pytest.mark.parametrize(
    ("ci90", "ci95", "verdict"),
    [
        ((0.05, 0.15), (0.03, 0.17), "similar"),
        ((0.05, 0.21), (0.03, 0.22), "more"),
        ((-0.3, -0.1), (-0.4, -0.01), "protected"),
        ((0.01, 0.3), (-0.02, 0.33), "inconclusive"),
        ((-0.2, 0.1), (-0.25, 0.15), "inconclusive"),
        ((math.nan, 0.1), (0.1, 0.2), "inconclusive"),
    ],
)
def test_decision_rule(ci90, ci95, verdict):
    assert decide(ci90, ci95, 0.2) == verdict


def test_confounded_group_differs_naively_and_is_similar_when_matched():
    """Delta does not depend on the group; the group is chosen for large |w| (a score that contains it)."""
    rng = np.random.default_rng(3)
    sizes = np.array([192, 576, 576, 1536] * 15)
    site = np.repeat(np.arange(len(sizes)), sizes)
    norm = np.exp(rng.standard_normal(len(site)))
    score = norm * np.exp(1.2 * rng.standard_normal(len(site)))
    member = np.zeros(len(site), dtype=bool)
    for code, size in enumerate(sizes):
        inside = np.flatnonzero(site == code)
        member[inside[np.argsort(-score[inside])[: size // 100]]] = True
    delta = np.exp(0.5 * rng.standard_normal((1, len(site))))
    population = Population(
        site=site,
        site_names=tuple(map(str, range(len(sizes)))),
        module_type=("q_proj",) * len(sizes),
        layer=tuple(i // 4 for i in range(len(sizes))),
        row=np.zeros(len(site), dtype=int),
        norm=norm,
        drift={"relative": delta / norm, "l2": delta},
    )
    result = run(population, {"safety_top": member})
    relative, absolute = result.effect("safety_top", "relative"), result.effect("safety_top", "l2")
    assert relative.ratio_unmatched.value < 1 / 5
    assert relative.verdict == "similar"
    assert absolute.verdict == "similar"
    assert abs(relative.balance.after) < abs(relative.balance.before) / 5
    assert "ratio_unmatched" in relative.confounded


# Matching -----------------------------------------------------------------------------------------------


def test_quantile_bins_are_equal_sized_ordered_and_within_site():
    rng = np.random.default_rng(0)
    site = rng.integers(0, 4, 1000)
    magnitude = rng.random(1000)
    code = quantile_bins(site, magnitude, 10)
    assert (code // 10 == site).all()
    for s in range(4):
        inside = np.flatnonzero(site == s)
        counts = np.bincount(code[inside] % 10, minlength=10)
        assert counts.max() - counts.min() <= 1
        ordered = inside[np.argsort(magnitude[inside])]
        assert (np.diff(code[ordered]) >= 0).all()


def test_quantile_bins_do_not_depend_on_the_order_of_tied_neurons():
    rng = np.random.default_rng(0)
    site, magnitude = rng.integers(0, 3, 600), rng.integers(0, 9, 600) / 2
    code, order = quantile_bins(site, magnitude, 10), rng.permutation(600)
    assert (quantile_bins(site[order], magnitude[order], 10) == code[order]).all()
    for s in range(3):
        for value in np.unique(magnitude):
            assert len(np.unique(code[(site == s) & (magnitude == value)])) <= 1


def test_small_sites_get_fewer_bins():
    assert len(np.unique(quantile_bins(np.zeros(16, dtype=int), np.arange(16.0), 10))) == 3


def test_refinement_splits_within_bins_and_balances():
    rng = np.random.default_rng(0)
    site = np.repeat(np.arange(20), 1000)
    magnitude = np.exp(rng.standard_normal(len(site)))
    member = rng.random(len(site)) < 0.02 * np.minimum(1, (magnitude / 8) ** 2) + 0.001
    coarse = refine_bins(site, magnitude, member, 10, rounds=0)
    fine = refine_bins(site, magnitude, member, 10)
    assert len(np.unique(coarse)) == 200
    parents = np.unique(np.stack([fine, coarse]), axis=1)
    assert len(parents.T) == len(np.unique(fine)) > 200
    before, after = (balance(site, magnitude, member, s, 20).after for s in (coarse, fine))
    assert abs(after) < abs(before) / 1.5


def test_balance_of_a_random_group_is_near_zero_and_by_site():
    population, groups = make_population(np.random.default_rng(0))
    stratum = refine_bins(population.site, population.norm, groups["random"], 10)
    found = balance(population.site, population.norm, groups["random"], stratum, len(population.site_names))
    assert abs(found.before) < 0.3
    assert found.site_before.shape == (24,)
    assert found.n_matched == found.n_members


# Agreement with scipy and statsmodels -------------------------------------------------------------------


def one_stratum(rng, members=12, controls=40):
    drift = np.exp(rng.standard_normal(members + controls))
    member = np.arange(members + controls) < members
    return drift, member, np.zeros(members + controls, dtype=np.int64)


def test_g_of_one_stratum_is_hedges_g():
    drift, member, stratum = one_stratum(np.random.default_rng(0))
    sums = matched_sums(drift[None], member, stratum, np.zeros(1, dtype=np.int64), 1)
    found = MatchedEffect(1, hedges_correction(sums.freedom.sum()))(sums.sums.sum(axis=0))[0]
    a, b = drift[member], drift[~member]
    expected, _ = effectsize_smd(a.mean(), a.std(ddof=1), len(a), b.mean(), b.std(ddof=1), len(b))
    assert found == pytest.approx(expected, rel=1e-9)


def test_cohens_d_equals_the_formula():
    drift, member, _ = one_stratum(np.random.default_rng(1))
    site = np.arange(len(drift)) % 4
    parts = [raw_sums(drift[None], chosen, site, 4) for chosen in (member, ~member)]
    found = infer_plain(np.concatenate(parts, axis=1), cohens_d_statistic(1))
    a, b = drift[member], drift[~member]
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(drift) - 2))
    assert found.value == pytest.approx((a.mean() - b.mean()) / pooled)


def test_permutation_agrees_with_scipy():
    rng = np.random.default_rng(5)
    drift, member, stratum = one_stratum(rng)
    drift[member] += 0.7
    found = permutation_p(drift[None], member, stratum, resamples=9999, rng=rng)[0]
    scipy = stats.permutation_test(
        (drift[member], drift[~member]),
        lambda a, b: abs(a.mean() - b.mean()),
        n_resamples=9999,
        alternative="greater",
        rng=np.random.default_rng(0),
    ).pvalue
    assert found == pytest.approx(scipy, abs=0.012)


def test_permutation_of_small_strata_agrees_with_enumeration():
    """Strata in which most neurons are members are drawn through their complement."""
    drift = np.array([1.0, 2.5, 2.0, 7.0, 1.5, 9.0, 3.0])
    member = np.array([True, False, False, True, True, True, False])
    stratum = np.array([0, 0, 0, 1, 1, 1, 1])

    def statistic(chosen):
        total = 0.0
        for k in (0, 1):
            inside = drift[stratum == k]
            arm = chosen[stratum == k]
            total += arm.sum() * (inside[arm].mean() - inside[~arm].mean())
        return abs(total)

    null = []
    for i in range(3):
        for j in range(3, 7):
            null.append(statistic(np.array([k == i or (k >= 3 and k != j) for k in range(7)])))
    exact = np.mean(np.array(null) >= statistic(member) - 1e-9)
    found = permutation_p(drift[None], member, stratum, resamples=20_000, rng=np.random.default_rng(0))[0]
    assert found == pytest.approx(exact, abs=0.015)


def test_site_standard_error_agrees_with_the_cluster_bootstrap_and_the_plain_mean():
    """For sites of one size and a mean, the jackknife is the standard error of a mean; scipy's bootstrap is near."""
    rng = np.random.default_rng(2)
    values = rng.standard_normal(80) + 0.3
    sums = np.stack([np.ones(80), values, values**2], axis=1)

    def mean(totals):
        return totals[..., 1:2] / totals[..., :1]

    found = infer_plain(sums, mean)
    assert found.se == pytest.approx(stats.sem(values))
    assert found.interval(0.95) == pytest.approx(stats.t.interval(0.95, 79, loc=values.mean(), scale=stats.sem(values)))
    scipy = stats.bootstrap((values,), np.mean, n_resamples=4000, rng=np.random.default_rng(0))
    assert found.se == pytest.approx(scipy.standard_error, rel=0.05)


def test_studentised_interval_of_g_is_near_scipys_bca_on_the_same_sums():
    population, groups = make_population(np.random.default_rng(4), effect=0.3, layers=15, site_sd=0.3)
    stratum = refine_bins(population.site, population.norm, groups["safety_top"], 10)
    site_of = np.zeros(stratum.max() + 1, dtype=np.int64)
    site_of[stratum] = population.site
    matched = matched_sums(population.drift["relative"], groups["safety_top"], stratum, site_of, 60)
    statistic = MatchedEffect(1, hedges_correction(matched.freedom.sum()))
    found = infer(matched.sums, statistic, resamples=2000, rng_seed=0)

    def g(index):
        return statistic(matched.sums[index.astype(int)].sum(axis=0))[0]

    scipy = stats.bootstrap((np.arange(60),), g, n_resamples=1500, vectorized=False, rng=np.random.default_rng(0))
    assert found.se == pytest.approx(scipy.standard_error, rel=0.08)
    assert found.interval(0.95) == pytest.approx(tuple(scipy.confidence_interval), abs=0.35 * found.se)


def test_equivalence_agrees_with_statsmodels_and_with_the_90_percent_interval():
    values = np.random.default_rng(0).normal(0.05, 0.5, 60)
    se = stats.sem(values)
    ours = Inference(values.mean(), se, Reference(None, 59), values, 60, "", "")
    assert ours.p_equivalence(0.2) == pytest.approx(DescrStatsW(values).ttost_mean(-0.2, 0.2)[0])
    assert ours.p_value() == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    for centre in np.linspace(-0.3, 0.3, 25):
        shifted = ours._replace(value=centre)
        inside = decide(shifted.interval(0.9), shifted.interval(0.95), 0.2) == "similar"
        assert inside == (shifted.p_equivalence(0.2) < 0.05)


def test_holm_agrees_with_statsmodels_and_leaves_nan_out():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.5])
    found = holm(p)
    assert np.isnan(found[2])
    np.testing.assert_allclose(found[[0, 1, 3, 4]], multipletests(p[[0, 1, 3, 4]], method="holm")[1])


# Inference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contrast", [False, True])
def test_gradients_equal_finite_differences(contrast):
    rng = np.random.default_rng(0)
    one = MatchedEffect(3, 0.9)
    statistic, width = (Difference(one, MatchedEffect(3, 0.8)), 16) if contrast else (one, 8)
    totals = rng.random(width) + 0.5
    step = 1e-6
    numeric = np.stack(
        [(statistic(totals + step * e) - statistic(totals - step * e)) / (2 * step) for e in np.eye(width)]
    )
    np.testing.assert_allclose(statistic.gradient(totals), numeric, atol=1e-7)
    np.testing.assert_allclose(totals @ statistic.gradient(totals), 0, atol=1e-12)


def test_mixture_of_seeds_and_sites_has_its_limits():
    assert Reference(None, 50.0, 2.0, 1.0).quantile(0.975) == pytest.approx(stats.t.ppf(0.975, 2), rel=1e-3)
    nearly_sites = Reference(None, 50.0, 2.0, 1e-9).quantile(0.975)
    assert nearly_sites == pytest.approx(stats.t.ppf(0.975, 50), rel=0.01)
    half = Reference(None, 1e6, 2.0, 0.5)
    draws = np.random.default_rng(0)
    sample = np.sqrt(0.5) * (draws.standard_t(2, 400_000) + draws.standard_normal(400_000))
    assert half.quantile(0.95) == pytest.approx(np.quantile(sample, 0.95), rel=0.02)
    assert half.lower(1.5) + half.upper(1.5) == pytest.approx(1)


def test_shuffled_labels_give_uniform_p_values():
    """Both p-values, over random groups of one population."""
    rng = np.random.default_rng(11)
    population, _ = make_population(rng, layers=10, site_sd=0.0)
    drift, sites = population.drift["relative"], len(population.site_names)
    sharp, weak = [], []
    for number in range(300):
        member = pick(rng, population.site, sites)
        stratum = refine_bins(population.site, population.norm, member, 10)
        site_of = np.zeros(stratum.max() + 1, dtype=np.int64)
        site_of[stratum] = population.site
        matched = matched_sums(drift, member, stratum, site_of, sites)
        weak.append(infer(matched.sums, MatchedEffect(1, 1.0), resamples=400, rng_seed=number).p_value())
        sharp.append(permutation_p(drift, member, stratum, resamples=199, rng=rng)[0])
    assert stats.kstest(weak, "uniform").pvalue > 0.01
    assert stats.kstest(sharp, "uniform").pvalue > 0.01


def test_site_effects_fool_the_permutation_but_not_the_reported_p():
    """A mean effect of 0 that varies between sites: the weak null holds, the sharp null does not."""
    weak, sharp = [], []
    for number in range(150):
        rng = np.random.default_rng([number, 5])
        population, groups = make_population(rng, site_sd=1.5)
        member = groups["safety_top"]
        stratum = refine_bins(population.site, population.norm, member, 5)
        site_of = np.zeros(stratum.max() + 1, dtype=np.int64)
        site_of[stratum] = population.site
        matched = matched_sums(population.drift["relative"], member, stratum, site_of, len(population.site_names))
        weak.append(infer(matched.sums, MatchedEffect(1, 1.0), resamples=300, rng_seed=number).p_value() < 0.05)
        sharp.append(permutation_p(population.drift["relative"], member, stratum, resamples=99, rng=rng)[0] < 0.05)
    assert np.mean(weak) < 0.11
    assert np.mean(sharp) > 0.25


def test_the_same_seed_gives_the_same_result_and_another_seed_another_interval(study):
    population, groups, result = study
    assert to_json(run(population, groups)) == to_json(result)
    other = run(population, groups, rng_seed=1)
    assert other.effect("safety_top", "relative").g.ci95 != result.effect("safety_top", "relative").g.ci95
    assert other.effect("safety_top", "relative").g.value == result.effect("safety_top", "relative").g.value


def test_a_group_is_judged_alone_and_in_any_unit(study):
    population, groups, result = study
    scaled = Population(**{**vars(population), "drift": {k: v * 1e-7 for k, v in population.drift.items()}})
    alone = run(scaled, {"safety_top": groups["safety_top"]}, contrasts=())
    assert alone.effect("safety_top", "relative").g.value == pytest.approx(
        result.effect("safety_top", "relative").g.value
    )
    assert alone.effect("safety_top", "relative").g.ci95 == pytest.approx(
        result.effect("safety_top", "relative").g.ci95
    )
    assert alone.effect("safety_top", "relative").d_random.reason


# Undefined values, counts, mistakes ---------------------------------------------------------------------


def test_undefined_drift_is_counted_and_left_out():
    population, groups = make_population(np.random.default_rng(0), seeds=3)
    lost = np.flatnonzero(groups["safety_top"])[:7]
    population.drift["relative"][1, lost] = np.nan
    result = run(population, groups)
    found = result.effect("safety_top", "relative")
    assert (found.n_undefined, found.n_measured) == (7, found.n_members - 7)
    assert "zero norm" in found.undefined_reason
    assert math.isfinite(found.g.value)
    assert result.effect("safety_top", "l2").n_undefined == 0
    assert "7 members of safety_top have no defined drift" in conclusion(result)
    assert found.n_measured == found.g.n + found.n_unmatched


def test_strata_without_controls_are_counted():
    population, groups = make_population(np.random.default_rng(0))
    member = groups["safety_top"].copy()
    member[population.site == 0] = True
    found = run(population, {"safety_top": member}).effect("safety_top", "relative")
    assert found.n_unmatched == 192
    assert found.strata_unmatched >= 10
    assert found.g.n == member.sum() - 192
    assert found.g.sites == 23
    every = np.ones(len(member), dtype=bool)
    result = run(population, {"safety_top": every})
    found = result.effect("safety_top", "relative")
    assert math.isnan(found.g.value)
    assert found.g.reason == "no matched member"
    assert found.verdict == "inconclusive"


def test_constant_drift_gives_nan_with_a_reason():
    population, groups = make_population(np.random.default_rng(0))
    for values in population.drift.values():
        values[:] = 0.0
    result = run(population, groups)
    found = result.effect("safety_top", "relative")
    assert math.isnan(found.g.value)
    assert found.g.reason == "no variation of drift within strata"
    encoded = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert encoded["effects"][0]["g"]["value"] is None
    assert encoded["effects"][0]["g"]["value_reason"] == "no variation of drift within strata"


@pytest.mark.parametrize("layers", [1, 3])
def test_json_is_safe_and_every_null_has_its_own_reason(layers):
    population, groups = make_population(np.random.default_rng(0), layers=layers)
    population.drift["relative"][0, :5] = np.nan
    encoded = json.dumps(to_json(run(population, groups)), allow_nan=False)
    assert "undefined in these data" not in encoded
    found = json.loads(encoded)
    assert found["schema_version"] == 1
    nulls = 0

    def walk(node):
        nonlocal nulls
        if isinstance(node, dict):
            for key, value in node.items():
                if value is None and key != "layer":
                    nulls += 1
                    assert node[f"{key}_reason"]
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(found)
    assert nulls > 0


def test_result_holds_subgroups_contrasts_overlaps_and_family(study):
    _, _, result = study
    found = result.effect("safety_top", "relative")
    assert [part.name for part in found.by_module] == ["q_proj", "k_proj", "o_proj", "up_proj"]
    assert [part.name for part in found.by_layer_third] == ["first third", "middle third", "last third"]
    assert sum(part.g.n for part in found.by_module) == found.g.n == sum(site.n for site in found.by_site)
    contrast = next(c for c in result.contrasts if c.metric == "relative")
    assert contrast.difference.value == pytest.approx(found.g.value - result.effect("utility_top", "relative").g.value)
    assert contrast.verdict == "more"
    assert result.family_size == 2 * 2 + 2
    assert math.isnan(result.effect("random", "relative").p_holm)
    assert found.p_holm >= found.p
    assert len(result.overlaps) == 3


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"metrics": ("nonsense",)}, ConfigError, "metric is unknown"),
        ({"seed_labels": ["0", "1"]}, ConfigError, "seed labels"),
        ({"sesoi": 0.0}, ConfigError, "smallest effect of interest"),
        ({"resamples": 5}, ConfigError, "number of resamples is too small. Received: 5"),
        ({"primary_metric": "cosine_distance"}, ConfigError, "primary metric"),
        ({"contrasts": [("safety_top", "absent")]}, GroupError, "unknown group"),
    ],
)
def test_mistakes_are_named(change, error, message):
    population, groups = make_population(np.random.default_rng(0), layers=1)
    with pytest.raises(error, match=message):
        run(population, groups, **change)


def test_groups_that_do_not_fit_are_refused():
    population, groups = make_population(np.random.default_rng(0), layers=1)
    with pytest.raises(GroupError, match="'empty' has no member"):
        run(population, {"empty": np.zeros(len(population.site), dtype=bool)})
    with pytest.raises(GroupError, match="does not fit"):
        run(population, {"short": groups["random"][:-1]})
    with pytest.raises(DataError, match="norm does not fit"):
        Population(**{**vars(population), "norm": population.norm[:-1]})
    with pytest.raises(UserError, match="not finite"):
        quantile_bins(np.zeros(2, dtype=int), np.array([1.0, np.nan]), 10)


# Drift and behaviour ------------------------------------------------------------------------------------


def make_series(seeds, steps=6, noise=0.0):
    rng = np.random.default_rng(0)
    drift = np.linspace(0, 1, steps) * np.linspace(1, 1.2, seeds)[:, None] + noise * rng.random((seeds, steps))
    return BehaviourSeries(
        steps=tuple(range(steps)),
        refusal_rate=0.9 - 0.5 * drift,
        group_drift={"safety_top": drift},
        total_drift=drift * 2,
        n_prompts=48,
    )


def test_association_recovers_a_linear_relation_and_says_how_little_it_shows():
    total, group = associate(make_series(1))
    assert (total.group, group.group) == ("all neurons", "safety_top")
    assert group.n_points == 5  # the first step is 0 by construction
    assert group.spearman == pytest.approx(1)
    assert group.slope == pytest.approx(0.5)
    assert total.slope == pytest.approx(0.25)
    assert group.p == pytest.approx(2 / math.factorial(5))
    assert math.isnan(group.interval[0])
    assert group.reasons["interval"]
    statement = " ".join(association_sentences(group.n_points, group.n_seeds))
    assert "5 snapshots of 1 run." in statement
    assert "little" in statement


def test_association_over_three_seeds_has_an_interval_or_a_reason():
    found = associate(make_series(3, steps=9, noise=0.3))[0]
    assert found.n_seeds == 3
    assert found.interval[0] <= found.spearman + 1e-9 or "interval" in found.reasons
    short = associate(make_series(1, steps=2))[0]
    assert math.isnan(short.spearman)
    assert short.reasons["spearman"]


def test_association_refuses_series_that_do_not_fit():
    with pytest.raises(DataError, match="does not fit the refusal rates"):
        BehaviourSeries(
            steps=(0, 1),
            refusal_rate=np.zeros((1, 2)),
            group_drift={"a": np.zeros((1, 3))},
            total_drift=np.zeros((1, 2)),
            n_prompts=1,
        )


def test_the_equivalence_interval_reaches_as_far_as_either_bootstrap():
    rng = np.random.default_rng(3)
    sums = np.column_stack([np.ones(40), np.exp(1.5 * rng.standard_normal(40))])

    class Mean:
        def __call__(self, totals):
            return totals[..., 1:] / totals[..., :1]

        def gradient(self, totals):
            first = 1 / totals[..., 0]
            return np.stack([-totals[..., 1] * first**2, first], axis=-1)[..., None]

    found = infer(sums, Mean(), resamples=1000, rng_seed=0)
    low, high = found.equivalence_interval()
    symmetric = found.interval(0.90)
    assert low <= symmetric[0] and high >= symmetric[1]
    assert high > symmetric[1] + 0.05 * found.se  # a mean of skewed values: the upper side is the longer one
    for band in (0.5, 1.0, 3.0):  # the p-value and the interval are one test
        inside = -band < low and high < band
        assert (found.p_equivalence(band) < 0.05) == inside
