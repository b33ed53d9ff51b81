"""A design applied to a drift: the ratio of members to controls, with clusters of sites, layers and coordinates.

The effect is linear in log drift, so that everything follows from sums per site. Shapes: N neurons, S seeds, J sites
with members that are compared, M such members, Q sums per site.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neurondrift.statistics.design.designs import Design
from neurondrift.statistics.estimates import BoolArray, Difference, FloatArray, IntArray, MeanPerMember
from neurondrift.statistics.inference import Inference, infer
from neurondrift.statistics.results import Cluster, Estimate, InjectedControl, RatioEffect, Verdict, decide

NAN = float("nan")
#: What the injected control multiplies the members' drift with.
INJECTED = 1.25
#: Fields of a record of a ratio that are undefined where its estimate is.
RATIO_FIELDS = ("ratio", "ratio_ci90", "ratio_ci95", "p", "p_holm", "p_equivalence", "smallest_more")


class Places(NamedTuple):
    """Where neurons lie: their site and row; per site its layer (a code of its own where it has none) and whether its
    rows are coordinates of the residual stream."""

    site_N: IntArray
    row_N: IntArray
    layer_of_site: IntArray
    writes_residual: BoolArray


class Rules(NamedTuple):
    """Band of equivalence (a ratio above 1), bootstrap resamples, and the seed of the resampling."""

    band: float
    resamples: int
    rng_seed: int


class RatioSums(NamedTuple):
    """The effect of a design, site by site.

    ``sums`` [J, 1 + S]: members compared, then per seed the sum over them of log drift minus that of their controls.
    ``member_site``, ``member_row`` [M]: place of every member in a site that writes to the residual stream, and
    ``member_value`` [M] its own difference from the site's controls, averaged over seeds.
    """

    sites: IntArray
    sums: FloatArray
    member_site: IntArray
    member_row: IntArray
    member_value: FloatArray

    @property
    def seeds(self) -> int:
        return self.sums.shape[1] - 1

    def subset(self, keep: BoolArray) -> RatioSums:
        """The same for some of the sites, bool [J]."""
        inside = np.isin(self.member_site, self.sites[keep])
        return RatioSums(
            self.sites[keep],
            self.sums[keep],
            self.member_site[inside],
            self.member_row[inside],
            self.member_value[inside],
        )

    def of_seed(self, seed: int) -> RatioSums:
        """One seed alone, without the part of coordinates."""
        none = np.zeros(0, dtype=np.int64)
        return RatioSums(self.sites, self.sums[:, [0, 1 + seed]], none, none, np.zeros(0))


def log_of(drift_SN: FloatArray) -> FloatArray:
    """Natural log of drift; NaN where it is 0 or not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isfinite(drift_SN) & (drift_SN > 0), np.log(drift_SN), np.nan)


def ratio_sums(design: Design, drift_SN: FloatArray, places: Places) -> RatioSums:
    """Sums per site of a design on a drift, which must be positive wherever the design has a coefficient."""
    return sums_of(design.coefficient_N, design.compared_N, log_of(drift_SN), places)


def sums_of(coefficient_N: FloatArray, compared_N: BoolArray, value_SN: FloatArray, places: Places) -> RatioSums:
    """Sums per site of coefficients on a value, which must be finite wherever there is one; 1 for members compared."""
    used = np.flatnonzero(coefficient_N)
    site, coefficient = places.site_N[used], coefficient_N[used]
    value_SU = value_SN[:, used]
    member = compared_N[used]
    sites = len(places.layer_of_site)
    count_J = np.bincount(site[member], minlength=sites).astype(np.float64)
    effect_SJ = np.stack(
        [np.bincount(site, weights=coefficient * value, minlength=sites).astype(np.float64) for value in value_SU]
    )
    present = np.flatnonzero(count_J)
    mean_U = value_SU.mean(axis=0)
    own_J = np.bincount(site[member], weights=mean_U[member], minlength=sites)
    controls_J = (own_J - effect_SJ.mean(axis=0)) / np.maximum(count_J, 1)
    writing = member & places.writes_residual[site]
    return RatioSums(
        present,
        np.concatenate([count_J[:, None], effect_SJ.T], axis=1)[present],
        site[writing],
        places.row_N[used[writing]],
        mean_U[writing] - controls_J[site[writing]],
    )


class Clustered(NamedTuple):
    """An inference with the clustering that it takes, and the parts of its variance from rows and seeds."""

    inferred: Inference
    cluster: Cluster
    row_share: float
    seed_share: float


def infer_ratio(sums: RatioSums, places: Places, rules: Rules) -> Clustered:
    """The log ratio, mean over members: see `infer_clusters`."""
    statistic = MeanPerMember(sums.seeds)
    members = float(sums.sums[:, 0].sum())
    centre = float(sums.sums[:, 1:].sum() / (members * sums.seeds)) if members else 0.0
    influence_M = (sums.member_value - centre) / max(members, 1.0)
    rows = _row_variance(influence_M, sums.member_row, places.layer_of_site[sums.member_site])
    return infer_clusters(sums.sites, sums.sums, statistic, rows, places, rules)


def infer_difference(first: RatioSums, second: RatioSums, places: Places, rules: Rules) -> Clustered:
    """The log ratio of one group minus that of another, over the sites of both."""
    sites = np.union1d(first.sites, second.sites)
    width = 1 + first.seeds
    joint = np.zeros((len(sites), 2 * width))
    joint[np.searchsorted(sites, first.sites), :width] = first.sums
    joint[np.searchsorted(sites, second.sites), width:] = second.sums
    influences = []
    for sums, sign in ((first, 1.0), (second, -1.0)):
        members = float(sums.sums[:, 0].sum())
        centre = float(sums.sums[:, 1:].sum() / (members * sums.seeds)) if members else 0.0
        influences.append(sign * (sums.member_value - centre) / max(members, 1.0))
    rows = _row_variance(
        np.concatenate(influences),
        np.concatenate([first.member_row, second.member_row]),
        places.layer_of_site[np.concatenate([first.member_site, second.member_site])],
    )
    statistic = Difference(MeanPerMember(first.seeds), MeanPerMember(second.seeds))
    return infer_clusters(sites, joint, statistic, rows, places, rules)


class RowVariance(NamedTuple):
    """What coordinates shared by several layers add to a variance, and how many rows that rests on."""

    variance: float
    freedom: float


def _row_variance(influence_M: FloatArray, row_M: IntArray, layer_M: IntArray) -> RowVariance:
    """Sum over rows of (sum of influences)^2, minus what is within one layer, which clusters of layers hold already.

    This is the two-way cluster variance of Cameron, Gelbach and Miller (2011) less the part of the layers: rows minus
    the intersection of rows and layers; never below 0.
    """
    if not len(row_M):
        return RowVariance(0.0, 1.0)
    _, row = np.unique(row_M, return_inverse=True)
    by_row = np.bincount(row, weights=influence_M)
    _, both = np.unique(np.stack([row_M, layer_M]), axis=1, return_inverse=True)
    within = np.bincount(both.ravel(), weights=influence_M)
    square = by_row**2
    excess = float(square.sum() - (within**2).sum())
    count = np.bincount(row).astype(np.float64)
    effective = float((count**2).sum()) ** 2 / float((count**4).sum())
    return RowVariance(max(excess, 0.0), max(effective - 1.0, 1.0))


def infer_clusters(
    sites: IntArray,
    sums_JQ: FloatArray,
    statistic: MeanPerMember | Difference,
    rows: RowVariance,
    places: Places,
    rules: Rules,
) -> Clustered:
    """`inference.infer` with sites and with layers as the units that vary, whichever has the larger standard error,
    and with what rows add."""
    by_site = infer(sums_JQ, statistic, resamples=rules.resamples, rng_seed=rules.rng_seed)
    chosen = by_site
    cluster: Cluster = "site"
    layers, position = np.unique(places.layer_of_site[sites], return_inverse=True)
    if 1 < len(layers) < len(sites):
        joint = np.zeros((len(layers), sums_JQ.shape[1]))
        np.add.at(joint, position, sums_JQ)
        by_layer = infer(joint, statistic, resamples=rules.resamples, rng_seed=rules.rng_seed, units="layers")
        if by_layer.reference is not None and not by_layer.se <= by_site.se:
            chosen, cluster = by_layer._replace(sites=len(sites)), "layer"
    widened = chosen.with_extra(rows.variance, rows.freedom)
    if widened.reference is None:
        return Clustered(widened, cluster, 0.0, 0.0)
    row_share = rows.variance / widened.se**2
    return Clustered(widened, cluster, row_share, widened.reference.seed_share - row_share)


def to_estimate(inferred: Inference, n: int) -> Estimate:
    """An inference as a record for the report; `n` counts neurons."""
    return Estimate(
        value=inferred.value,
        se=inferred.se,
        ci90=inferred.equivalence_interval(),
        ci95=inferred.interval(0.95),
        n=n,
        sites=inferred.sites,
        seeds=len(inferred.per_seed),
        method=inferred.method,
        reason=inferred.reason,
    )


def exponential(log_values: Sequence[float]) -> tuple[float, ...]:
    """Ratios of log ratios; infinity where they exceed what a float holds."""
    return tuple(math.exp(value) if not value > 700 else math.inf for value in log_values)


def limits(log_limits: tuple[float, float]) -> tuple[float, float]:
    """Both ends of an interval of ratios, from those of log ratios."""
    low, high = exponential(log_limits)
    return low, high


def called(estimate: Estimate, band: float) -> Verdict:
    """The verdict of a log ratio by the band, a ratio above 1 (`results.decide`)."""
    return decide(estimate.ci90, estimate.ci95, math.log(band))


def ratio_effect(design: Design, drift_SN: FloatArray, places: Places, rules: Rules) -> RatioEffect:
    """One comparison of one group: estimate, tests, gate and verdict. Holm's adjustment is left to the caller.

    `drift_SN` float64 [S, N], in any unit: a factor common to all neurons of a site changes nothing.
    """
    sums = ratio_sums(design, drift_SN, places)
    found = infer_ratio(sums, places, rules)
    inferred, compared = found.inferred, int(sums.sums[:, 0].sum())
    estimate = to_estimate(inferred, compared)
    log_band = math.log(rules.band)
    comparable = not design.because
    low, high = estimate.ci95
    within = -log_band < estimate.ci90[0] and estimate.ci90[1] < log_band
    return RatioEffect(
        comparison=design.name,
        log_ratio=estimate,
        ratio=exponential([estimate.value])[0],
        ratio_ci90=limits(estimate.ci90),
        ratio_ci95=limits(estimate.ci95),
        p=inferred.p_value(),
        p_holm=NAN,
        p_equivalence=inferred.p_equivalence(log_band),
        verdict=called(estimate, rules.band) if comparable else "inconclusive",
        comparable=comparable,
        not_comparable_because=design.because,
        smallest_more=exponential([inferred.smallest_more(log_band)])[0],
        below_band=within and (low > 0 or high < 0),
        beyond_band=low > log_band or high < -log_band,
        n_members=design.members,
        n_compared=compared,
        n_without_control=design.without_control,
        n_undefined=design.undefined,
        sites=len(sums.sites),
        sites_left_out=design.sites_left_out,
        effective_controls=design.effective_controls,
        balance=design.balance,
        cluster=found.cluster,
        row_share=found.row_share,
        seed_share=found.seed_share,
        per_seed=tuple(
            to_estimate(infer_ratio(sums.of_seed(seed), places, rules).inferred, compared) for seed in range(sums.seeds)
        ),
        reasons=dict.fromkeys(RATIO_FIELDS, inferred.reason) if inferred.reason else {},
    )


def injected_control(
    design: Design,
    drift_SN: FloatArray,
    member_N: BoolArray,
    without: RatioEffect,
    places: Places,
    rules: Rules,
    factor: float = INJECTED,
) -> InjectedControl:
    """The comparison `without` made again on the drift with that of the members multiplied by `factor`."""
    injected = ratio_effect(design, np.where(member_N, drift_SN * factor, drift_SN), places, rules)
    return InjectedControl(
        factor=factor,
        log_ratio=injected.log_ratio,
        verdict=called(injected.log_ratio, rules.band),
        found=injected.log_ratio.ci95[0] > without.log_ratio.value,
    )
