"""How well a score finds members that are known: AUROC within strata, average precision, precision at k.

Arrays in, numbers out. A score that is undefined (NaN) ranks below all that are defined: it cannot be selected.
Shapes: N = members, S = strata (sites).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from neurondrift.statistics.descriptive import Mean, cluster_mean

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


class Found(NamedTuple):
    """How well one score finds the planted members.

    Attributes
    ----------
    auroc
        Mean over strata of the AUROC within the stratum, with the 95 % t interval over strata.
    as_far
        The same of the planted against the members that moved as far, and no others.
    decoy
        The same of the decoy against all that is not planted: .5 where a score is blind to what else was trained.
    pooled
        AUROC of the ranks within strata, all strata together.
    average_precision, precision
        Of the ranks within strata; precision among the k = |planted| first.
    base_rate
        Share of the planted among all: what precision is by chance.
    strata
        How many strata have a planted member and another.
    undefined
        How many members have no score.
    """

    auroc: Mean
    as_far: Mean
    decoy: Mean
    pooled: float
    average_precision: float
    precision: float
    base_rate: float
    strata: int
    undefined: int


def found(
    score_N: FloatArray, stratum_N: IntArray, planted_N: BoolArray, decoy_N: BoolArray, as_far_N: BoolArray
) -> Found:
    """How well `score_N` finds the planted.

    Parameters
    ----------
    score_N
        One number for each member, the higher the more it is taken for planted; NaN: undefined.
    stratum_N
        Which site each is in.
    planted_N, decoy_N, as_far_N
        Which were planted, which belong to the decoy, and which others moved about as far (the decoy among them).

    Returns
    -------
    `Found`; NaN where there is nothing to compare, such as no decoy.
    """
    percentile_N = percentiles(score_N, stratum_N)
    everything_N = np.ones(len(score_N), dtype=bool)
    auroc = within(score_N, stratum_N, planted_N, everything_N)
    return Found(
        auroc=auroc.mean,
        as_far=within(score_N, stratum_N, planted_N, planted_N | as_far_N).mean,
        decoy=within(score_N, stratum_N, decoy_N, ~planted_N).mean,
        pooled=auroc_of(percentile_N, planted_N),
        average_precision=average_precision(percentile_N, planted_N),
        precision=precision_at(percentile_N, planted_N, int(planted_N.sum())),
        base_rate=float(planted_N.mean()) if len(planted_N) else np.nan,
        strata=auroc.strata,
        undefined=int(np.isnan(score_N).sum()),
    )


class Within(NamedTuple):
    """A mean over strata, and over how many."""

    mean: Mean
    strata: int


def within(score_N: FloatArray, stratum_N: IntArray, positive_N: BoolArray, eligible_N: BoolArray) -> Within:
    """The mean over strata of the AUROC of the positive against the other eligible members of the same stratum; its
    interval ends at 0 and 1."""
    order = np.argsort(stratum_N, kind="stable")
    edges = np.flatnonzero(np.diff(stratum_N[order])) + 1
    values = [
        auroc_of(score_N[part[keep]], positive_N[part[keep]])
        for part, keep in ((part, eligible_N[part]) for part in np.split(order, edges))
    ]
    value_S = np.array(values, dtype=np.float64)
    mean, low, high = cluster_mean(value_S, np.arange(len(value_S)))
    return Within(Mean(mean, max(low, 0.0), min(high, 1.0)), int(np.isfinite(value_S).sum()))


def auroc_of(score_N: FloatArray, positive_N: BoolArray) -> float:
    """The probability that a positive one scores above another, ties counted half (Mann and Whitney, 1947); NaN where
    one of the two kinds is missing."""
    positives = int(positive_N.sum())
    others = len(positive_N) - positives
    if not positives or not others:
        return float("nan")
    ranks_N = stats.rankdata(_lowest_where_undefined(score_N))
    return float((ranks_N[positive_N].sum() - positives * (positives + 1) / 2) / (positives * others))


def percentiles(score_N: FloatArray, stratum_N: IntArray) -> FloatArray:
    """The place of each member within its stratum, (0, 1), ties shared: (rank - ½) / size."""
    result_N = np.empty(len(score_N))
    for stratum in np.unique(stratum_N):
        part = np.flatnonzero(stratum_N == stratum)
        result_N[part] = (stats.rankdata(_lowest_where_undefined(score_N[part])) - 0.5) / len(part)
    return result_N


def average_precision(score_N: FloatArray, positive_N: BoolArray) -> float:
    """The mean over the positive of the precision down to each of them; of tied scores, that of all down to the last.

    NaN where there is none.
    """
    if not positive_N.any():
        return float("nan")
    order = np.argsort(-score_N, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(score_N[order])), len(order) - 1)
    hits = np.cumsum(positive_N[order])[ends]
    return float((hits / (ends + 1) * np.diff(hits, prepend=0)).sum() / hits[-1])


def precision_at(score_N: FloatArray, positive_N: BoolArray, k: int) -> float:
    """The share of the positive among the k first; where a tie is cut, what it is on average. NaN for k = 0."""
    if not k:
        return float("nan")
    threshold = np.partition(score_N, -k)[-k]
    above, tied = score_N > threshold, score_N == threshold
    return float((positive_N[above].sum() + (k - above.sum()) * positive_N[tied].mean()) / k)


def _lowest_where_undefined(score_N: FloatArray) -> FloatArray:
    return np.where(np.isnan(score_N), -np.inf, score_N)
