"""Figures beside the comparison: associations with refusals, means, distributions, ratios, and shares of a change.

None of them enters a verdict, which are those of `analysis`. Every interval takes sites as the units that vary, but
for that of an association, whose units are training seeds. In their order here:

- `associate`: whether refusals are lost as a group drifts;
- `cluster_mean`, `control_means`, `control_weights`, `distribution`: drift of members and of matched controls at one
  step, of which the figures over training and of the final drift are made;
- `ratio_of_means`, `ratio_of_medians`: members over controls where only sums or histograms per site are kept, as of
  single weights;
- `share`: what part of a change of weights lies in a subspace.

Shapes: N neurons, S seeds, J sites, T steps, Q sums per site.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats  # type: ignore[import-untyped,unused-ignore]

from neurondrift.base.errors import DataError
from neurondrift.statistics.estimates import BoolArray, FloatArray, IntArray, ratio_statistic
from neurondrift.statistics.inference import Inference, infer, infer_plain

#: Fewest points of a seed whose rank correlation counts towards an interval over seeds.
FEWEST_POINTS = 5
#: All orders of this many points are enumerated for the p-value (8! = 40,320).
MOST_ENUMERATED = 8
FEW_POINTS = "fewer than five points per seed"


@dataclass(frozen=True, kw_only=True)
class BehaviourSeries:
    """Refusals and mean drift at the same steps.

    Attributes
    ----------
    steps
        Training steps of the snapshots, increasing, [T].
    refusal_rate
        Share of harmful requests refused, float64 [S, T]; NaN where not evaluated.
    group_drift
        Per group its mean drift, float64 [S, T], in the study's primary metric.
    total_drift
        Mean drift of all neurons, float64 [S, T].
    n_prompts
        Requests behind each refusal rate.
    """

    steps: tuple[int, ...]
    refusal_rate: FloatArray
    group_drift: Mapping[str, FloatArray]
    total_drift: FloatArray
    n_prompts: int

    def __post_init__(self) -> None:
        shape = np.shape(self.refusal_rate)
        if len(shape) != 2 or shape[1] != len(self.steps) or shape[0] < 1:
            raise DataError(
                "The refusal rates do not fit the steps",
                received=shape,
                allowed=f"an array [seeds, {len(self.steps)}]",
            )
        for name, values in {"all neurons": self.total_drift, **self.group_drift}.items():
            if np.shape(values) != shape:
                raise DataError(
                    f"The drift series of {name} does not fit the refusal rates",
                    received=np.shape(values),
                    allowed=f"an array of shape {shape}",
                )


@dataclass(frozen=True, kw_only=True)
class Association:
    """How the loss of refusals goes with one group's drift (or with ``all neurons``).

    `spearman` is the mean over seeds of the rank correlation within a seed, with `p` by permutation of the
    steps (S = 1) and `interval` by Student's t over seeds (S >= 3 of five points each, on Fisher's z; NaN otherwise).
    `slope` is the loss of refusals per unit of drift, least squares with an intercept per seed; `r2` its
    share of the variance within seeds.
    """

    group: str
    n_points: int
    n_seeds: int
    n_prompts: int
    spearman: float
    interval: tuple[float, float]
    p: float
    slope: float
    r2: float
    method: str
    reasons: Mapping[str, str]


def associate(series: BehaviourSeries) -> tuple[Association, ...]:
    """Relation of drift and loss of refusals, for all neurons and for each group.

    The loss is the refusal rate at a seed's first evaluated step minus that at a later one; the first step
    itself (drift 0, loss 0) is left out, because it would correlate by construction.

    Returns
    -------
    tuple of Association
        ``all neurons`` first, then the groups in their order.
    """
    rate = np.asarray(series.refusal_rate, dtype=np.float64)
    out = []
    for name, values in {"all neurons": series.total_drift, **series.group_drift}.items():
        drift = np.asarray(values, dtype=np.float64)
        pairs = []
        for seed in range(len(rate)):
            known = np.flatnonzero(np.isfinite(rate[seed]) & np.isfinite(drift[seed]))
            later = known[1:]
            pairs.append((drift[seed, later], rate[seed, known[:1]] - rate[seed, later]))
        out.append(_associate(name, [pair for pair in pairs if len(pair[0])], series.n_prompts))
    return tuple(out)


def _associate(name: str, pairs: list[tuple[FloatArray, FloatArray]], n_prompts: int) -> Association:
    points = sum(len(x) for x, _ in pairs)
    rho, interval, p, reasons = _correlation(pairs)
    slope, r2 = _line(pairs) if points >= 3 else (float("nan"), float("nan"))
    for field, value in (("slope", slope), ("r2", r2)):
        if not np.isfinite(value):
            reasons[field] = "fewer than three points, or no variation"
    return Association(
        group=name,
        n_points=points,
        n_seeds=len(pairs),
        n_prompts=n_prompts,
        spearman=rho,
        interval=interval,
        p=p,
        slope=slope,
        r2=r2,
        reasons=reasons,
        method="Spearman within seeds, averaged; least squares with an intercept per seed",
    )


def _correlation(
    pairs: list[tuple[FloatArray, FloatArray]],
) -> tuple[float, tuple[float, float], float, dict[str, str]]:
    """Mean rank correlation within seeds, its interval and p, and why any of them is undefined."""
    rho, interval, p = float("nan"), (float("nan"), float("nan")), float("nan")
    reasons: dict[str, str] = {}
    within_S = np.array([_spearman(x, y) for x, y in pairs if len(x) >= 3])
    within_S = within_S[np.isfinite(within_S)]
    if len(within_S):
        rho = float(within_S.mean())
    else:
        reasons["spearman"] = "fewer than three snapshots after the first, or no variation"
    few = min((len(x) for x, _ in pairs), default=0) < FEWEST_POINTS
    if len(within_S) >= 3 and few:
        reasons["interval"] = reasons["p"] = FEW_POINTS
        return rho, interval, p, reasons
    if len(within_S) >= 3:
        z_S = np.arctanh(np.clip(within_S, -0.999, 0.999))
        half = float(special.stdtrit(len(z_S) - 1, 0.975) * z_S.std(ddof=1) / np.sqrt(len(z_S)))
        interval = (float(np.tanh(z_S.mean() - half)), float(np.tanh(z_S.mean() + half)))
        p = float(stats.ttest_1samp(z_S, 0.0).pvalue) if half > 0 else float("nan")
        if half == 0:
            reasons["p"] = "the seeds agree exactly"
        return rho, interval, p, reasons
    reasons["interval"] = "fewer than three seeds: snapshots of one run are not independent"
    if len(pairs) == 1 and np.isfinite(rho):
        p = _permutation_p(*pairs[0])
    else:
        reasons["p"] = reasons.get("spearman", "two seeds: too few to test over seeds")
    return rho, interval, p, reasons


def _line(pairs: list[tuple[FloatArray, FloatArray]]) -> tuple[float, float]:
    """Slope and r² of least squares with an intercept per seed."""
    x = np.concatenate([x - x.mean() for x, _ in pairs])
    y = np.concatenate([y - y.mean() for _, y in pairs])
    if not x @ x > 0:
        return float("nan"), float("nan")
    r2 = float((x @ y) ** 2 / ((x @ x) * (y @ y))) if y @ y > 0 else float("nan")
    return float(x @ y / (x @ x)), r2


def _spearman(x: FloatArray, y: FloatArray) -> float:
    a, b = stats.rankdata(x), stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else float("nan")


def _permutation_p(x: FloatArray, y: FloatArray) -> float:
    """Two-sided p of Spearman's rho over all orders, or by Student's t beyond `MOST_ENUMERATED` points."""
    if len(x) > MOST_ENUMERATED:
        return float(stats.spearmanr(x, y).pvalue)
    a, b = stats.rankdata(x), stats.rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    orders = np.array(list(itertools.permutations(range(len(a)))))
    null = np.abs(b[orders] @ a)
    return float((null >= abs(a @ b) - 1e-9).mean())


class Mean(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def cluster_mean(values_N: FloatArray, cluster_N: IntArray) -> Mean:
    """Mean of `values_N` [N] and its 95 % t interval with `cluster_N` [N] (the site) as the unit that varies.

    The variance is that of the sums of residuals by cluster, with the factor S / (S - 1) for S clusters; the
    interval has S - 1 degrees of freedom and is NaN for fewer than two clusters. NaN values are left out.
    """
    known_N = np.isfinite(values_N)
    values_N, cluster_N = values_N[known_N], cluster_N[known_N]
    if len(values_N) == 0:
        return Mean(np.nan, np.nan, np.nan)
    mean = float(values_N.mean())
    codes, position = np.unique(cluster_N, return_inverse=True)
    if len(codes) < 2:
        return Mean(mean, np.nan, np.nan)
    sums = np.bincount(position, weights=values_N - mean)
    error = np.sqrt((sums**2).sum() * len(codes) / (len(codes) - 1)) / len(values_N)
    half = float(stats.t.ppf(0.975, len(codes) - 1) * error)
    return Mean(mean, mean - half, mean + half)


def control_means(drift_N: FloatArray, stratum_N: IntArray, member_N: BoolArray) -> FloatArray:
    """For each member, the mean drift of the non-members of its stratum; NaN where there are none.

    `drift_N` [N], `stratum_N` [N] (non-negative codes), `member_N` [N]; returns `[member.sum()]`.
    """
    candidate_N = ~member_N & np.isfinite(drift_N)
    size = int(stratum_N.max()) + 1
    counts = np.bincount(stratum_N[candidate_N], minlength=size)
    sums = np.bincount(stratum_N[candidate_N], weights=drift_N[candidate_N], minlength=size)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums / counts)[stratum_N[member_N]]


def control_weights(stratum_N: IntArray, member_N: BoolArray) -> FloatArray:
    """Weight of every neuron as a matched control: members per control in its stratum, 0 for members. `[N]`."""
    size = int(stratum_N.max()) + 1
    members = np.bincount(stratum_N[member_N], minlength=size)
    controls = np.bincount(stratum_N[~member_N], minlength=size)
    ratio = np.divide(members, controls, out=np.zeros(size), where=controls > 0)
    return np.where(member_N, 0.0, ratio[stratum_N])


class Distribution(NamedTuple):
    """Densities per unit of log10 drift over common, log-spaced `edges` [k + 1]."""

    edges: FloatArray
    members: FloatArray
    controls: FloatArray


def distribution(
    drift_N: FloatArray, member_N: BoolArray, weights_N: FloatArray, *, bins: int = 40
) -> Distribution | None:
    """Distribution of log10 drift of members and of controls with `weights_N`; None where no member has a positive
    drift. Values at or below zero are left out."""
    positive_N = np.isfinite(drift_N) & (drift_N > 0)
    shown_N = positive_N & (member_N | (weights_N > 0))
    if not (positive_N & member_N).any():
        return None
    low, high = np.quantile(drift_N[shown_N], [0.001, 0.999])
    edges = np.logspace(np.log10(low), np.log10(high * (1 + 1e-6)), bins + 1)
    clipped_N = np.clip(drift_N, low, high)

    def density(chosen_N: BoolArray, weight_N: FloatArray) -> FloatArray:
        counts, _ = np.histogram(clipped_N[chosen_N], bins=edges, weights=weight_N[chosen_N])
        return counts / max(counts.sum(), 1e-300) / np.diff(np.log10(edges))

    return Distribution(
        edges, density(positive_N & member_N, np.ones(len(drift_N))), density(positive_N & ~member_N, weights_N)
    )


class Ratio(NamedTuple):
    """A ratio of means with its 95 % interval; NaN with a reason where it is undefined."""

    value: float
    low: float
    high: float
    reason: str


def ratio_of_means(first_J2: FloatArray, second_J2: FloatArray) -> Ratio:
    """Mean of the first arm over that of the second, from count and sum per site, `[sites, 2]` each.

    The interval is that of a jackknife over sites with Student's t on sites - 1 degrees of freedom
    (`inference.infer_plain`): it holds for this run and for sites like these.
    """
    nothing_J1 = np.zeros((len(first_J2), 1))  # in the place of the sums of squares, which a ratio does not read
    inferred = infer_plain(np.hstack([first_J2, nothing_J1, second_J2, nothing_J1]), ratio_statistic(1))
    if not np.isfinite(inferred.value):
        return Ratio(np.nan, np.nan, np.nan, "no member has moved, or none is defined")
    low, high = inferred.interval(0.95)
    return Ratio(inferred.value, low, high, inferred.reason)


def ratio_of_medians(edge_E: FloatArray, first_JV: IntArray, second_JV: IntArray) -> Ratio:
    """Median of the first arm over that of the second, from histograms per site.

    For quotients with a denominator near 0, whose means rest on few of them. The medians are those of all sites
    together, interpolated within their bin; the interval is that of a jackknife over sites, of the log of the ratio,
    with Student's t on sites - 1 degrees of freedom.

    Parameters
    ----------
    edge_E
        Edges of the bins, increasing, float64 [E].
    first_JV, second_JV
        How many values of each arm are 0 (first column) and lie in each bin, int [J, E] in each site.
    """
    sites = len(first_JV)
    whole = [float(_medians(edge_E, arm_JV.sum(axis=0)[None])[0]) for arm_JV in (first_JV, second_JV)]
    if not (np.isfinite(whole).all() and whole[1] > 0):
        return Ratio(np.nan, np.nan, np.nan, "no median, or the controls' is 0")
    value = whole[0] / whole[1]
    without_J2 = np.stack([_medians(edge_E, arm.sum(axis=0) - arm) for arm in (first_JV, second_JV)], axis=1)
    if sites < 2 or not (np.isfinite(without_J2).all() and (without_J2 > 0).all() and value > 0):
        return Ratio(value, np.nan, np.nan, "one site, or a median that is 0 without one of the sites")
    log_J = np.log(without_J2[:, 0] / without_J2[:, 1])
    error = float(np.sqrt((sites - 1) / sites * ((log_J - log_J.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, sites - 1)) * error
    return Ratio(value, value * float(np.exp(-half)), value * float(np.exp(half)), "")


def _medians(edge_E: FloatArray, counts_KV: IntArray) -> FloatArray:
    """Median of each row of counts (of zeros, and of each bin), [K]; NaN where a row is empty."""
    cumulative_KV = np.cumsum(counts_KV, axis=1)
    middle_K = cumulative_KV[:, -1] / 2
    place_K = (cumulative_KV < middle_K[:, None]).sum(axis=1)
    row_K = np.arange(len(counts_KV))
    bin_K = np.maximum(place_K, 1)
    before_K = cumulative_KV[row_K, bin_K - 1]
    share_K = (middle_K - before_K) / np.maximum(counts_KV[row_K, bin_K], 1)
    inside_K = edge_E[bin_K - 1] + share_K * (edge_E[np.minimum(bin_K, len(edge_E) - 1)] - edge_E[bin_K - 1])
    return np.where(middle_K > 0, np.where(place_K > 0, inside_K, 0.0), np.nan)


class RatioOfSums(NamedTuple):
    """Σ part / Σ whole per seed, from totals [weight, part of each seed, whole of each seed], with its gradient."""

    seeds: int

    def __call__(self, totals: FloatArray) -> FloatArray:
        whole = totals[..., 1 + self.seeds :]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio: FloatArray = totals[..., 1 : 1 + self.seeds] / np.where(whole > 0, whole, np.nan)
        return ratio

    def gradient(self, totals: FloatArray) -> FloatArray:
        """Derivatives, [..., Q, S]; column s belongs to seed s."""
        whole = totals[..., 1 + self.seeds :]
        out = np.zeros((*totals.shape, self.seeds))
        seed = np.arange(self.seeds)
        with np.errstate(invalid="ignore", divide="ignore"):
            out[..., 1 + seed, seed] = 1 / whole
            out[..., 1 + self.seeds + seed, seed] = -self(totals) / whole
        return out


class SharePair(NamedTuple):
    """`of_sum`: Σ part / Σ whole, so that sites count by their size. `of_sites`: the mean of the sites' shares."""

    of_sum: Inference
    of_sites: Inference


def share(part_SJ: FloatArray, whole_SJ: FloatArray, *, resamples: int, rng_seed: int) -> SharePair:
    """Share of a whole in a part, over all sites and averaged over seeds, with cluster bootstrap over sites.

    Parameters
    ----------
    part_SJ, whole_SJ
        Non-negative amounts of each seed and site; `part` may be a difference of two parts. A site whose whole is
        0 in a seed has no share of its own: it is left out of `of_sites` (and adds nothing to `of_sum`).
    resamples, rng_seed
        As in `infer`.

    Raises
    ------
    ValueError
        No site with a whole above 0.
    """
    known = (whole_SJ > 0).all(axis=0)
    if not known.any():
        raise ValueError("no site has a whole above 0")
    part, whole = part_SJ[:, known], whole_SJ[:, known]
    # In units of the mean whole: squares of tiny changes stay far from underflow.
    scale = whole.mean()
    part, whole = part / scale, whole / scale
    statistic = RatioOfSums(len(part))

    def inferred(parts: FloatArray, wholes: FloatArray) -> Inference:
        sums = np.concatenate([wholes.mean(axis=0)[None], parts, wholes]).T  # [J, 1 + 2 S]
        return infer(sums, statistic, resamples=resamples, rng_seed=rng_seed)

    return SharePair(inferred(part, whole), inferred(part / whole, np.ones_like(whole)))
