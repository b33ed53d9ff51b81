"""Several studies as one: metafor's published example, formulas by hand, and what dependent points may claim."""

import math

import numpy as np
import pytest
from scipy import stats

from neurondrift.base.errors import ConfigError
from neurondrift.statistics.meta.pooling import pooled
from neurondrift.statistics.meta.random_effects import dependent_mean, random_effects
from neurondrift.statistics.meta.regression import meta_regression

# Thirteen trials of the BCG vaccine (Colditz et al. 1994; dat.bcg of metafor): vaccinated with and without tuberculosis,
# not vaccinated with and without, and the distance from the equator in degrees.
BCG = np.array(
    [
        (4, 119, 11, 128, 44),
        (6, 300, 29, 274, 55),
        (3, 228, 11, 209, 42),
        (62, 13536, 248, 12619, 52),
        (33, 5036, 47, 5761, 13),
        (180, 1361, 372, 1079, 44),
        (8, 2537, 10, 619, 19),
        (505, 87886, 499, 87892, 13),
        (29, 7470, 45, 7232, 27),
        (17, 1699, 65, 1600, 42),
        (186, 50448, 141, 27197, 18),
        (5, 2493, 3, 2338, 33),
        (27, 16886, 29, 17825, 33),
    ],
    dtype=float,
)


@pytest.fixture(scope="module")
def bcg():
    a, b, c, d, latitude = BCG.T
    effect = np.log(a / (a + b)) - np.log(c / (c + d))
    variance = 1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)
    return effect, np.sqrt(variance), latitude


def by_hand(effect, se):
    """DerSimonian and Laird (1986) and Hartung and Knapp (2001), written out."""
    w = 1 / se**2
    k = len(effect)
    q = np.sum(w * (effect - np.sum(w * effect) / np.sum(w)) ** 2)
    tau2 = max(0.0, (q - (k - 1)) / (np.sum(w) - np.sum(w**2) / np.sum(w)))
    v = 1 / (se**2 + tau2)
    mean = np.sum(v * effect) / np.sum(v)
    hksj = math.sqrt(np.sum(v * (effect - mean) ** 2) / (k - 1) / np.sum(v))
    return mean, 1 / math.sqrt(np.sum(v)), hksj, tau2, q


def test_metafors_example_as_published(bcg):
    effect, se, _ = bcg
    found = random_effects(effect, se)
    # rma(yi, vi, data = dat, method = "DL") prints these digits
    assert round(found.effect, 4) == -0.7141
    assert round(found.se_dl, 4) == 0.1787
    assert round(found.tau2, 4) == 0.3088
    assert round(100 * found.i2, 2) == 92.12
    assert round(found.q, 4) == 152.2330


def test_the_figures_are_the_formulas_to_a_millionth(bcg):
    effect, se, _ = bcg
    found = random_effects(effect, se)
    mean, dl, hksj, tau2, q = by_hand(effect, se)
    assert (found.effect, found.se_dl, found.se_hksj, found.tau2, found.q) == pytest.approx(
        (mean, dl, hksj, tau2, q), abs=1e-6
    )
    reach = stats.t.ppf(0.975, 12) * max(dl, hksj)
    assert found.ci95 == pytest.approx((mean - reach, mean + reach), abs=1e-6)
    wide = stats.t.ppf(0.975, 12) * math.sqrt(tau2 + max(dl, hksj) ** 2)
    assert found.prediction95 == pytest.approx((mean - wide, mean + wide), abs=1e-6)
    assert sum(found.weights) == pytest.approx(1)


def test_no_heterogeneity_is_zero_and_not_negative():
    effect, se = np.array([0.10, 0.11, 0.105, 0.1]), np.full(4, 0.2)
    found = random_effects(effect, se)
    mean, dl, hksj, tau2, _ = by_hand(effect, se)
    assert (found.tau2, found.i2) == (0, 0) and tau2 == 0
    assert (found.effect, found.se_dl, found.se_hksj) == pytest.approx((mean, dl, hksj), abs=1e-12)
    # agreement by chance is no precision: the interval is not below DerSimonian and Laird's
    assert found.se_hksj < found.se_dl == found.se
    assert random_effects([0.3, 0.3], [0.1, 0.1]).ci95[0] < 0.3


def test_fewer_than_two_have_no_interval_and_a_reason():
    one = random_effects([0.5], [0.1])
    assert one.effect == 0.5 and math.isnan(one.ci95[0]) and one.reason
    none = random_effects([], [])
    assert math.isnan(none.effect) and none.k == 0 and none.reason
    assert math.isnan(random_effects([0.1, 0.2], [0.1, 0.1]).prediction95[0])


@pytest.mark.parametrize(
    ("effects", "ses"), [([0.1, math.nan], [1, 1]), ([0.1, 0.2], [0, 1]), ([0.1], [0.1, 0.2]), ([0.1], [math.inf])]
)
def test_what_is_no_number_is_refused(effects, ses):
    with pytest.raises(ConfigError):
        random_effects(effects, ses)


def test_copies_of_one_study_say_no_more_than_the_study():
    """The kind of fault: twenty points that share their errors are one observation."""
    ses = [0.1] * 20
    copies = dependent_mean([0.3] * 20, ses)
    assert copies.bounded and copies.se == pytest.approx(0.1)
    assert copies.ci95 == pytest.approx((0.3 - 1.959964 * 0.1, 0.3 + 1.959964 * 0.1), abs=1e-6)
    assert copies.ci90[0] == pytest.approx(0.3 - 1.644854 * 0.1, abs=1e-6)
    assert random_effects([0.3] * 20, ses).se < 0.03  # what independence would claim


def test_points_that_differ_more_than_their_errors_keep_hartung_and_knapp():
    effects, ses = [0.1, 0.9, -0.4, 0.5], [0.05] * 4
    assert dependent_mean(effects, ses) == random_effects(effects, ses)


def test_the_bound_holds_for_every_correlation():
    rng = np.random.default_rng(0)
    ses = rng.uniform(0.1, 0.4, 6)
    found = dependent_mean([0.2] * 6, ses)
    weights = np.array(found.weights)
    for _ in range(50):
        factor = rng.normal(size=(6, 2))
        correlation = np.corrcoef(factor @ factor.T + 0.01 * np.eye(6))
        variance = weights @ (correlation * np.outer(ses, ses)) @ weights
        assert math.sqrt(variance) <= found.se + 1e-12


def test_models_are_the_unit_where_there_are_several():
    values, ses = [0.30, 0.32, 0.28, 0.31, 0.29, 0.33], [0.05] * 6
    by_model = pooled(values, ses, ["a", "a", "b", "b", "c", "c"], band=1.25)
    one_model = pooled(values, ses, ["a"] * 6, band=1.25)
    assert (by_model.unit, by_model.models, by_model.points, by_model.over.k) == ("model", 3, 6, 3)
    assert (one_model.unit, one_model.over.k) == ("point", 6)
    means = [dependent_mean(values[i : i + 2], ses[i : i + 2]) for i in (0, 2, 4)]
    assert by_model.over == random_effects([m.effect for m in means], [m.se for m in means])
    assert by_model.ratio == pytest.approx(math.exp(by_model.over.effect))


@pytest.mark.parametrize(
    ("values", "se", "verdict"),
    [
        ([0.5, 0.52, 0.48], 0.05, "more"),
        ([0.01, -0.01, 0.0], 0.05, "similar"),
        ([-0.5, -0.52, -0.48], 0.05, "protected"),
        ([0.3, -0.3, 0.1], 0.05, "inconclusive"),
        ([0.1], 0.01, "inconclusive"),
        ([], 0.01, "inconclusive"),
    ],
)
def test_the_verdict_follows_the_rule_of_one_study(values, se, verdict):
    found = pooled(values, [se] * len(values), ["a"] * len(values), band=1.25)
    assert found.verdict == verdict
    if verdict == "similar":
        assert found.p_equivalence < 0.05
    if verdict == "more":
        assert found.p_equivalence > 0.95


def test_a_small_difference_within_the_band_is_marked():
    found = pooled([0.1, 0.1, 0.1], [0.02] * 3, ["a"] * 3, band=1.25)
    assert found.verdict == "similar" and found.below_band


def test_meta_regression_is_the_formula_to_a_millionth(bcg):
    effect, se, latitude = bcg
    found = meta_regression(effect, se, latitude)
    x = np.column_stack([np.ones(13), latitude])
    w = np.diag(1 / se**2)
    p = w - w @ x @ np.linalg.inv(x.T @ w @ x) @ x.T @ w
    tau2 = (effect @ p @ effect - 11) / np.trace(p)
    v = np.diag(1 / (se**2 + tau2))
    beta = np.linalg.solve(x.T @ v @ x, x.T @ v @ effect)
    rest = effect - x @ beta
    scale = max(1.0, rest @ v @ rest / 11)
    error = math.sqrt(scale * np.linalg.inv(x.T @ v @ x)[1, 1])
    assert (found.intercept, found.slope, found.se, found.tau2) == pytest.approx((*beta, error, tau2), abs=1e-6)
    # rma(yi, vi, mods = ~ ablat, data = dat, method = "DL") prints these digits
    assert (round(found.tau2, 4), round(found.slope, 4)) == (0.0633, -0.0292)


def test_meta_regression_needs_three_studies_that_differ():
    assert math.isnan(meta_regression([0.1, 0.2], [0.1, 0.1], [0, 1]).slope)
    same = meta_regression([0.1, 0.2, 0.3], [0.1] * 3, [0.5] * 3)
    assert math.isnan(same.slope) and same.reason
