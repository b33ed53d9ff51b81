"""Effects, intervals and p-values against scipy, statsmodels and enumeration; their limits and calibration."""

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.meta_analysis import effectsize_smd
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW

from helpers.populations import make_population, pick
from neurondrift.statistics.design.matching import refine_bins
from neurondrift.statistics.estimates import (
    Difference,
    MatchedEffect,
    cohens_d_statistic,
    hedges_correction,
    matched_sums,
    raw_sums,
)
from neurondrift.statistics.inference import Inference, Reference, holm, infer, infer_plain, permutation_p
from neurondrift.statistics.results import decide


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
    assert half.quantile(0.95) == pytest.approx(np.quantile(sample, 0.95), rel=0.05)
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
