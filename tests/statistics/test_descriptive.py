"""Associations of drift with behaviour, and shares over sites."""

import math

import numpy as np
import pytest
from scipy import stats

from neurondrift.base.errors import DataError
from neurondrift.report.conclusion import association_sentences
from neurondrift.statistics.descriptive import BehaviourSeries, RatioOfSums, associate, ratio_of_medians, share


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


@pytest.mark.parametrize("steps", [4, 5, 6])
def test_a_correlation_of_fewer_than_five_points_a_seed_has_no_interval(steps):
    found = associate(make_series(4, steps=steps, noise=0.5))[0]
    assert found.n_points == 4 * (steps - 1) and math.isfinite(found.spearman)
    assert all(map(math.isnan, (*found.interval, found.p))) == (steps < 6)
    assert (found.reasons.get("interval") == "fewer than five points per seed") == (steps < 6)


@pytest.mark.parametrize("arms", [(0, 1), (1, 0)])
def test_a_ratio_of_medians_is_that_of_the_values_and_its_interval_that_of_a_jackknife(arms):
    rng = np.random.default_rng(0)
    values = np.linspace(0, 4, 400)
    codes = [np.clip(rng.gamma(3, shape, (12, 90)) / 0.01, 0, 399).astype(int) for shape in (0.25, 0.2)]
    first, second = (codes[arm] for arm in arms)
    counts = [np.stack([np.bincount(site, minlength=400) for site in arm]) for arm in (first, second)]
    found = ratio_of_medians(values, *counts)

    def ratio(keep):
        return np.quantile(values[first[keep]], 0.5, method="inverted_cdf") / np.quantile(
            values[second[keep]], 0.5, method="inverted_cdf"
        )

    assert found.value == pytest.approx(ratio(np.ones(12, dtype=bool)))
    logs = np.log([ratio(np.arange(12) != site) for site in range(12)])
    half = stats.t.ppf(0.975, 11) * math.sqrt(11 / 12 * ((logs - logs.mean()) ** 2).sum())
    assert (found.low, found.high) == pytest.approx((found.value * math.exp(-half), found.value * math.exp(half)))


def test_weights_near_zero_do_not_make_a_headline():
    """A mean of |change| / |w| is as large as its smallest weight makes it; its median is not."""
    rng = np.random.default_rng(0)
    values = np.concatenate([[0.0], np.logspace(-6, 6, 600)])
    relative = [np.abs(rng.standard_normal((20, 500)) / rng.standard_normal((20, 500))) for _ in range(2)]
    relative[0][3, 7] *= 1e6
    counts = [np.stack([np.bincount(np.searchsorted(values, site), minlength=601) for site in arm]) for arm in relative]
    found = ratio_of_medians(values, *counts)
    assert relative[0].mean() / relative[1].mean() > 3
    assert found.low < 1 < found.high and found.value == pytest.approx(1, abs=0.1)
    nothing = ratio_of_medians(values, counts[0], np.zeros_like(counts[0]))
    assert math.isnan(nothing.value) and nothing.reason


def test_association_refuses_series_that_do_not_fit():
    with pytest.raises(DataError, match="does not fit the refusal rates"):
        BehaviourSeries(
            steps=(0, 1),
            refusal_rate=np.zeros((1, 2)),
            group_drift={"a": np.zeros((1, 3))},
            total_drift=np.zeros((1, 2)),
            n_prompts=1,
        )


def test_shares_are_ratios_with_a_right_gradient():
    generator = np.random.default_rng(0)
    whole = generator.lognormal(size=(2, 30)) * 1e-9
    part = whole * generator.uniform(0.1, 0.3, size=(2, 30))
    whole[:, 4] = part[:, 4] = 0  # a site that did not change
    found = share(part, whole, resamples=500, rng_seed=0)
    assert found.of_sum.value == pytest.approx((part.sum(axis=1) / whole.sum(axis=1)).mean())
    known = np.delete(part / np.where(whole > 0, whole, 1), 4, axis=1)
    assert found.of_sites.value == pytest.approx(known.mean())
    assert found.of_sites.sites == 29
    for one in found:
        low, high = one.interval(0.95)
        assert 0.1 < low < one.value < high < 0.3
    statistic = RatioOfSums(2)
    totals = generator.uniform(1, 2, size=5)
    for column in range(5):
        step = np.eye(5)[column] * 1e-6
        slope = (statistic(totals + step) - statistic(totals - step)) / 2e-6
        np.testing.assert_allclose(statistic.gradient(totals)[column], slope, atol=1e-8)
    with pytest.raises(ValueError, match="no site"):
        share(part * 0, whole * 0, resamples=500, rng_seed=0)


def test_the_interval_of_a_share_covers_the_truth():
    """200 draws of 40 sites: the 95 % interval misses the true share about 5 % of the time."""
    misses = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        whole = generator.lognormal(sigma=0.5, size=(1, 40))
        part = whole * generator.beta(2, 8, size=(1, 40))  # mean share 0.2, independent of the size
        low, high = share(part, whole, resamples=300, rng_seed=seed).of_sum.interval(0.95)
        misses += not low <= 0.2 <= high
    assert 1 <= misses <= 22
