"""Sums per site from which every estimate follows, and the estimates as functions of those sums.

A statistic is a smooth function of totals over sites, so that leaving out, repeating or re-weighting
sites (jackknife, bootstrap) never goes back to the neurons. Shapes: S seeds, J sites, H strata, Q sums, N neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

#: totals [..., Q] -> value per seed [..., S]
Statistic = Callable[[FloatArray], FloatArray]


class MatchedSums(NamedTuple):
    """The matched comparison of a group, site by site.

    ``sums`` [J, 2 + 2 S] holds, per site: matched members; those in a stratum with a variance; then per
    seed the sum over members of (drift - mean drift of the stratum's controls); then per seed the sum over
    members of the pooled variance of their stratum. ``freedom`` [J] are the degrees of freedom behind the
    variances, ``expected`` [J, S] the sums over members of their controls' mean drift.
    """

    sites: IntArray
    sums: FloatArray
    freedom: FloatArray
    expected: FloatArray
    n_matched: int
    n_unmatched: int
    n_controls: int
    strata: int
    strata_unmatched: int

    @property
    def seeds(self) -> int:
        return int(self.expected.shape[1])

    def subset(self, keep: BoolArray) -> MatchedSums:
        """The same for some of the sites, bool [J]; counts of unmatched members are not carried over."""
        members = int(self.sums[keep, 0].sum())
        return self._replace(
            sites=self.sites[keep],
            sums=self.sums[keep],
            freedom=self.freedom[keep],
            expected=self.expected[keep],
            n_matched=members,
            n_unmatched=0,
        )


def matched_sums(
    drift_SN: FloatArray, member_N: BoolArray, stratum_N: IntArray, site_of_stratum: IntArray, n_sites: int
) -> MatchedSums:
    """Sufficient statistics of the matched effect, one row per site that has matched members.

    Parameters
    ----------
    drift_SN
        Finite drift, float64 [S, N].
    member_N, stratum_N
        Membership and dense stratum code, [N].
    site_of_stratum
        Site code of each stratum.
    n_sites
        Number of sites.
    """
    seeds, strata = drift_SN.shape[0], len(site_of_stratum)
    arm_N = stratum_N * 2 + member_N
    count = np.bincount(arm_N, minlength=2 * strata).reshape(strata, 2)  # [strata, control | member]
    controls, members = count[:, 0], count[:, 1]
    paired = (controls > 0) & (members > 0)
    freedom = np.where(paired, controls + members - 2, 0)
    known = np.where(freedom > 0, members, 0)
    columns = [np.where(paired, members, 0), known]
    differences, variances, expected = [], [], []
    for values_N in drift_SN:
        mean = np.bincount(arm_N, weights=values_N, minlength=2 * strata) / np.maximum(count.ravel(), 1)
        square = np.bincount(arm_N, weights=(values_N - mean[arm_N]) ** 2, minlength=2 * strata).reshape(strata, 2)
        mean = mean.reshape(strata, 2)
        differences.append(np.where(paired, members * (mean[:, 1] - mean[:, 0]), 0.0))
        variances.append(known * square.sum(axis=1) / np.maximum(freedom, 1))
        expected.append(np.where(paired, members * mean[:, 0], 0.0))

    def per_site(values_H: NDArray[np.generic]) -> FloatArray:
        weights = np.asarray(values_H, dtype=np.float64)
        return np.bincount(site_of_stratum, weights=weights, minlength=n_sites).astype(np.float64)

    sums_JQ = np.stack([per_site(v) for v in [*columns, *differences, *variances]], axis=1)
    sites = np.flatnonzero(sums_JQ[:, 0] > 0)
    alone = (members > 0) & (controls == 0)
    return MatchedSums(
        sites=sites,
        sums=sums_JQ[sites],
        freedom=per_site(freedom)[sites],
        expected=np.stack([per_site(v) for v in expected], axis=1).reshape(n_sites, seeds)[sites],
        n_matched=int(members[paired].sum()),
        n_unmatched=int(members[alone].sum()),
        n_controls=int(controls[paired].sum()),
        strata=int((members > 0).sum()),
        strata_unmatched=int(alone.sum()),
    )


def hedges_correction(freedom: float) -> float:
    """Small-sample factor 1 - 3 / (4 df - 1) of a standardised difference (Hedges 1981, eq. 6e)."""
    return 1.0 - 3.0 / (4.0 * freedom - 1.0) if freedom > 1 else float("nan")


class MatchedEffect(NamedTuple):
    """The matched standardised effect g as a function of totals, with its gradient.

    g = c (D / M) / sqrt(V / N), with M matched members, D the sum of their differences from their controls'
    means, V the sum of their strata's pooled variances, N the members counted in V, and c = Hedges' factor.
    """

    seeds: int
    correction: float

    @property
    def width(self) -> int:
        """Number of totals."""
        return 2 + 2 * self.seeds

    def __call__(self, totals: FloatArray) -> FloatArray:
        seeds = self.seeds
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = totals[..., 2 : 2 + seeds] / totals[..., :1]
            spread = np.sqrt(totals[..., 2 + seeds : 2 + 2 * seeds] / totals[..., 1:2])
            effect: FloatArray = self.correction * mean / np.where(spread > 0, spread, np.nan)
        return effect

    def gradient(self, totals: FloatArray) -> FloatArray:
        """Derivatives, [..., Q, S]; column s belongs to seed s."""
        seeds = self.seeds
        effect = self(totals)
        members, known = totals[..., :1], totals[..., 1:2]
        variance = totals[..., 2 + seeds : 2 + 2 * seeds]
        out = np.zeros((*totals.shape, seeds))
        diagonal = np.arange(seeds)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[..., 0, :] = -effect / members
            out[..., 1, :] = 0.5 * effect / known
            out[..., 2 + diagonal, diagonal] = self.correction / (members * np.sqrt(variance / known))
            out[..., 2 + seeds + diagonal, diagonal] = -0.5 * effect / variance
        return out


class MeanPerMember(NamedTuple):
    """D / M of every seed as a function of totals [M, D of each seed], with its gradient: a mean over members."""

    seeds: int

    @property
    def width(self) -> int:
        """Number of totals."""
        return 1 + self.seeds

    def __call__(self, totals: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean: FloatArray = totals[..., 1:] / totals[..., :1]
        return mean

    def gradient(self, totals: FloatArray) -> FloatArray:
        """Derivatives, [..., Q, S]; column s belongs to seed s."""
        out = np.zeros((*totals.shape, self.seeds))
        diagonal = np.arange(self.seeds)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[..., 0, :] = -self(totals) / totals[..., :1]
            out[..., 1 + diagonal, diagonal] = 1 / totals[..., :1]
        return out


class Difference(NamedTuple):
    """One effect minus another of the same kind, on totals laid side by side; the sites are shared."""

    first: MatchedEffect | MeanPerMember
    second: MatchedEffect | MeanPerMember

    def __call__(self, totals: FloatArray) -> FloatArray:
        width = self.first.width
        return self.first(totals[..., :width]) - self.second(totals[..., width:])

    def gradient(self, totals: FloatArray) -> FloatArray:
        width = self.first.width
        return np.concatenate(
            [self.first.gradient(totals[..., :width]), -self.second.gradient(totals[..., width:])], axis=-2
        )


def raw_sums(drift_SN: FloatArray, chosen_N: BoolArray, site_N: IntArray, n_sites: int) -> FloatArray:
    """Per site: the count of the chosen neurons, then per seed their sum, then per seed their sum of squares.

    Returns float64 [n_sites, 1 + 2 S]. Drift is taken in units of its overall mean, which keeps the
    squares of tiny drifts exact; callers that need units multiply by `raw_scale`.
    """
    code = site_N[chosen_N]
    columns = [np.bincount(code, minlength=n_sites).astype(np.float64)]
    scaled = drift_SN[:, chosen_N] / raw_scale(drift_SN)[:, None]
    columns += [np.bincount(code, weights=v, minlength=n_sites).astype(np.float64) for v in scaled]
    columns += [np.bincount(code, weights=v * v, minlength=n_sites).astype(np.float64) for v in scaled]
    return np.stack(columns, axis=1)


def raw_scale(drift_SN: FloatArray) -> FloatArray:
    """The mean |drift| of each seed, [S]; 1 where it is zero."""
    scale_S = np.abs(drift_SN).mean(axis=1)
    return np.where(scale_S > 0, scale_S, 1.0)


def mean_statistic(seeds: int, scale: FloatArray) -> Statistic:
    """Mean of one arm, from `raw_sums`."""

    def value(totals: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            mean: FloatArray = scale * totals[..., 1 : 1 + seeds] / totals[..., :1]
        return mean

    return value


def ratio_statistic(seeds: int) -> Statistic:
    """Ratio of the means of two arms, from two `raw_sums` side by side."""
    width = 1 + 2 * seeds

    def value(totals: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            first = totals[..., 1 : 1 + seeds] / totals[..., :1]
            second = totals[..., width + 1 : width + 1 + seeds] / totals[..., width : width + 1]
            ratio: FloatArray = first / np.where(second != 0, second, np.nan)
        return ratio

    return value


def matched_ratio_statistic(seeds: int) -> Statistic:
    """Mean drift of members over the mean of their controls, from [expected | difference] sums."""

    def value(totals: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            base = totals[..., :seeds]
            ratio: FloatArray = 1.0 + totals[..., seeds : 2 * seeds] / np.where(base != 0, base, np.nan)
        return ratio

    return value


def cohens_d_statistic(seeds: int) -> Statistic:
    """Cohen's d of two arms (pooled SD, df = n1 + n2 - 2), from two `raw_sums` side by side."""
    width = 1 + 2 * seeds

    def value(totals: FloatArray) -> FloatArray:
        with np.errstate(invalid="ignore", divide="ignore"):
            means, squares, counts = [], [], []
            for start in (0, width):
                count = totals[..., start : start + 1]
                mean = totals[..., start + 1 : start + 1 + seeds] / count
                squares.append(totals[..., start + 1 + seeds : start + width] - count * mean**2)
                means.append(mean)
                counts.append(count)
            pooled = np.sqrt((squares[0] + squares[1]) / (counts[0] + counts[1] - 2))
            d: FloatArray = (means[0] - means[1]) / np.where(pooled > 0, pooled, np.nan)
        return d

    return value


def stratified_median(values_N: FloatArray, stratum_N: IntArray, member_N: BoolArray) -> float:
    """Median drift of the matched controls, each weighted by members / controls of its stratum."""
    strata = int(stratum_N.max()) + 1
    members = np.bincount(stratum_N, weights=member_N, minlength=strata)
    controls = np.bincount(stratum_N, weights=~member_N, minlength=strata)
    weight_N = (members / np.maximum(controls, 1))[stratum_N]
    chosen_N = ~member_N & (weight_N > 0)
    if not chosen_N.any():
        return float("nan")
    order = np.argsort(values_N[chosen_N], kind="stable")
    cumulative = np.cumsum(weight_N[chosen_N][order])
    return float(values_N[chosen_N][order][np.searchsorted(cumulative, cumulative[-1] / 2)])
