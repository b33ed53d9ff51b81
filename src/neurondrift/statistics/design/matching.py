"""Who is comparable with whom: strata of site and |w|, and how well they balance |w|.

Looks at sites, magnitudes and membership only, never at a drift, so that the choice of controls
cannot depend on the outcome. Shapes: N neurons.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from neurondrift.base.errors import DataError
from neurondrift.statistics.results import Balance

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

#: A quantile bin is made no finer than this many neurons on average.
SMALLEST_STRATUM = 5
#: Standardised mean difference below which a covariate counts as balanced (Stuart 2010).
BALANCED = 0.1


def quantile_bins(site_N: NDArray[np.integer], magnitude_N: FloatArray, bins: int) -> IntArray:
    """Stratum of every neuron: its site and its quantile bin of |w| within that site.

    A site of n neurons gets min(bins, max(1, n // 5)) bins, so that small sites keep controls in
    every stratum. Equal magnitudes share a bin, so the strata do not depend on the order of the neurons.

    Parameters
    ----------
    site_N
        Site code of each neuron, int [N], at least 0.
    magnitude_N
        |w| of each neuron (row norm of w0), float [N], finite.
    bins
        Quantile bins per site, at least 1.

    Returns
    -------
    int64 [N]
        ``site * bins + bin``.

    Raises
    ------
    DataError
        Lengths differ, a code is negative, a magnitude is not finite, or `bins` is below 1.

    References
    ----------
    Cochran (1968), Biometrics 24: five bins remove about 90 % of the bias of one covariate.
    """
    site_N = np.asarray(site_N).astype(np.int64)
    magnitude_N = np.asarray(magnitude_N, dtype=np.float64)
    if site_N.ndim != 1 or site_N.shape != magnitude_N.shape:
        raise DataError(
            "site and magnitude must be vectors of one length",
            received=(site_N.shape, magnitude_N.shape),
            allowed="two arrays of shape [n]",
        )
    if bins < 1:
        raise DataError("The number of |w| bins is too small", received=bins, allowed="1 or more")
    if site_N.size == 0:
        return np.zeros(0, dtype=np.int64)
    if site_N.min() < 0:
        raise DataError("A site code is negative", received=int(site_N.min()), allowed="0 or more")
    if not np.isfinite(magnitude_N).all():
        raise DataError(
            "Some magnitudes are not finite",
            received=int((~np.isfinite(magnitude_N)).sum()),
            allowed="finite row norms",
            fix="leave these neurons out or repair the weights",
        )
    order = np.lexsort((magnitude_N, site_N))
    sorted_site_N, sorted_magnitude_N = site_N[order], magnitude_N[order]
    size = np.bincount(site_N)
    start = np.cumsum(size) - size
    new_value = np.ones(site_N.size, dtype=bool)
    new_value[1:] = (np.diff(sorted_site_N) != 0) | (np.diff(sorted_magnitude_N) != 0)
    # The rank of a tie is that of its first neuron.
    first = np.maximum.accumulate(np.where(new_value, np.arange(site_N.size), 0))
    rank_N = first - start[sorted_site_N]
    site_bins = np.clip(size // SMALLEST_STRATUM, 1, bins)
    code_N = np.empty(site_N.size, dtype=np.int64)
    code_N[order] = sorted_site_N * bins + rank_N * site_bins[sorted_site_N] // size[sorted_site_N]
    return code_N


def refine_bins(
    site_N: NDArray[np.integer],
    magnitude_N: FloatArray,
    member_N: BoolArray,
    bins: int,
    *,
    threshold: float = BALANCED,
    smallest: int = 2 * SMALLEST_STRATUM,
    rounds: int = 5,
) -> IntArray:
    """Quantile bins, halved where |w| still differs between members and their controls.

    Importance scores contain |w|, so a group crowds into the upper end of the top bin, where ten bins
    are too coarse. For each bin position, pooled over all sites, the standardised mean difference of
    |w| within the strata is taken; where it exceeds `threshold`, the strata of that position are halved
    at their median, in every site where both halves keep `smallest` neurons; and again, up to `rounds`
    times. Only |w| and membership are used. With `rounds=0` this is `quantile_bins` with dense codes.

    Parameters
    ----------
    site_N, magnitude_N, bins
        As for `quantile_bins`.
    member_N
        Members of the group, bool [N].
    threshold
        Largest |standardised mean difference| left alone.
    smallest
        Fewest neurons in a stratum that a split may leave.
    rounds
        Most halvings of a bin.

    Returns
    -------
    int64 [N]
        Dense stratum codes, 0 to the number of strata - 1; a stratum lies within one site.

    References
    ----------
    Imbens and Rubin (2015), Causal Inference, ch. 17: subclasses are split until they balance.
    """
    base = quantile_bins(site_N, magnitude_N, bins)
    magnitude_N = np.asarray(magnitude_N, dtype=np.float64)
    distinct, stratum_N = np.unique(base, return_inverse=True)
    position = distinct % bins  # of each stratum
    order = np.lexsort((magnitude_N, stratum_N))
    for _ in range(rounds):
        count = len(position)
        members = np.bincount(stratum_N, weights=member_N, minlength=count)
        total = np.bincount(stratum_N, minlength=count)
        controls = total - members
        arm_N = stratum_N * 2 + member_N
        arm_count = np.bincount(arm_N, minlength=2 * count)
        arm_mean = np.bincount(arm_N, weights=magnitude_N, minlength=2 * count) / np.maximum(arm_count, 1)
        squares = np.bincount(arm_N, weights=(magnitude_N - arm_mean[arm_N]) ** 2, minlength=2 * count)
        freedom = np.maximum(total - 2, 1)
        used = np.where((members > 0) & (controls > 0), members, 0.0)
        gap = used * (arm_mean[1::2] - arm_mean[0::2])
        variance = used * (squares[0::2] + squares[1::2]) / freedom
        by_position = [np.bincount(position, weights=v) for v in (used, gap, variance)]
        with np.errstate(invalid="ignore", divide="ignore"):
            smd = by_position[1] / np.sqrt(by_position[0] * by_position[2])
        split = (np.abs(np.nan_to_num(smd)) > threshold)[position] & (total >= 2 * smallest)
        if not split.any():
            break
        start = np.cumsum(total) - total
        middle = magnitude_N[order][np.minimum(start + total // 2, len(order) - 1)]  # median of each stratum
        upper_N = split[stratum_N] & (magnitude_N >= middle[stratum_N])
        distinct, stratum_N = np.unique(stratum_N * 2 + upper_N, return_inverse=True)
        position = position[distinct // 2] * 2 + np.where(split[distinct // 2], distinct % 2, 0)
        order = np.lexsort((magnitude_N, stratum_N))
    return stratum_N.astype(np.int64)


def balance(
    site_N: NDArray[np.integer], magnitude_N: FloatArray, member_N: BoolArray, stratum_N: IntArray, n_sites: int
) -> Balance:
    """Standardised mean difference of |w|, before and after matching.

    Before: (mean of members - mean of non-members) / D with D the root of the mean of both variances.
    After: the mean over matched members of |w| minus the mean |w| of the controls in the same stratum,
    divided by the same D (Stuart 2010), so that only the numerator changes.

    Parameters
    ----------
    site_N, magnitude_N, member_N, stratum_N
        Site code, |w|, membership and dense stratum code of each neuron, [N].
    n_sites
        Number of sites.

    Returns
    -------
    Balance

    References
    ----------
    Stuart (2010), Matching methods for causal inference, Statistical Science 25; Austin (2009).
    """
    site_codes_N: IntArray = np.asarray(site_N).astype(np.int64)
    strata = int(stratum_N.max()) + 1 if stratum_N.size else 0
    control_count = np.bincount(stratum_N, weights=~member_N, minlength=strata)
    control_sum = np.bincount(stratum_N, weights=magnitude_N * ~member_N, minlength=strata)
    with np.errstate(invalid="ignore", divide="ignore"):
        gap_N = magnitude_N - (control_sum / control_count)[stratum_N]
    matched_N = member_N & (control_count[stratum_N] > 0)

    def differences(code_N: IntArray, groups: int) -> tuple[FloatArray, FloatArray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            means, variances = [], []
            for arm_N in (member_N, ~member_N):
                size = np.bincount(code_N[arm_N], minlength=groups)
                mean = np.bincount(code_N[arm_N], weights=magnitude_N[arm_N], minlength=groups) / size
                residual: FloatArray = (magnitude_N[arm_N] - mean[code_N[arm_N]]) ** 2
                means.append(mean)
                # One member has no variance of its own: the other arm's then stands for both.
                variances.append(
                    np.bincount(code_N[arm_N], weights=residual, minlength=groups)
                    / np.where(size > 1, size - 1, np.nan)
                )
            spread = np.sqrt(np.where(np.isnan(variances[0]), variances[1], (variances[0] + variances[1]) / 2))
            spread = np.where(spread > 0, spread, np.nan)
            gaps = np.bincount(code_N[matched_N], weights=gap_N[matched_N], minlength=groups)
            after = gaps / np.bincount(code_N[matched_N], minlength=groups)
            return (means[0] - means[1]) / spread, after / spread

    overall_before, overall_after = differences(np.zeros_like(site_codes_N), 1)
    site_before, site_after = differences(site_codes_N, n_sites)
    return Balance(
        before=float(overall_before[0]),
        after=float(overall_after[0]),
        site_before=site_before,
        site_after=site_after,
        n_members=int(member_N.sum()),
        n_matched=int(matched_N.sum()),
    )
