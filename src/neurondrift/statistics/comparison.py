"""One group in one metric: the population it is chosen from, its matched comparison, and every figure of its effect.

Which comparisons a study makes is in `analysis`. Shapes: N neurons of the population, M of them measured (finite drift
in every seed), S seeds, J sites, Q sums per site.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neurondrift.base.errors import DataError
from neurondrift.base.roles import Role
from neurondrift.statistics import estimates, inference
from neurondrift.statistics.estimates import BoolArray, FloatArray, IntArray, MatchedEffect, MatchedSums
from neurondrift.statistics.inference import Inference
from neurondrift.statistics.matching import balance
from neurondrift.statistics.results import (
    Estimate,
    GroupEffect,
    MatchedCounts,
    RawFigures,
    SiteEffect,
    Subgroup,
    Verdict,
    decide,
)

THIRDS = ("first third", "middle third", "last third")
UNDEFINED_DRIFT = "drift not finite in at least one seed (for example a weight vector of zero norm)"
NO_INTERVAL = "descriptive figure: no interval"
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Population:
    """All neurons of the adapted sites and their drift.

    Attributes
    ----------
    site
        Site code of each neuron, int [N]: an index into `site_names`.
    site_names, module_type, layer
        Per site: its name, its kind (such as ``q_proj``) and its decoder block, or None.
    row
        Output row of each neuron in its site, int [N].
    norm
        Row norm of w0, float64 [N]: the matching variable |w|.
    drift
        Metric name -> float64 [n_seeds, n]; NaN where undefined.
    """

    site: IntArray
    site_names: tuple[str, ...]
    module_type: tuple[str, ...]
    layer: tuple[int | None, ...]
    row: IntArray
    norm: FloatArray
    drift: dict[str, FloatArray]

    def __post_init__(self) -> None:
        n, sites = len(self.site), len(self.site_names)
        if n == 0 or sites == 0:
            raise DataError(
                "There are no neurons to analyse",
                received=(n, sites),
                allowed="at least one site",
                fix="check that the drift snapshots cover the adapted sites",
            )
        if len(self.module_type) != sites or len(self.layer) != sites:
            raise DataError(
                "Module types and layers do not fit the sites",
                received=(len(self.module_type), len(self.layer)),
                allowed=f"{sites} of each",
            )
        if np.min(self.site) < 0 or np.max(self.site) >= sites:
            raise DataError(
                "A site code lies outside the site names",
                received=int(np.max(self.site)),
                allowed=f"0 to {sites - 1}",
            )
        for name, values in {"row": self.row, "norm": self.norm}.items():
            if np.shape(values) != (n,):
                raise DataError(f"{name} does not fit the neurons", received=np.shape(values), allowed=f"({n},)")
        if not self.drift:
            raise DataError("There is no drift metric to analyse", allowed="at least one array [n_seeds, n]")
        seeds = {np.shape(values)[0] if np.ndim(values) == 2 else 0 for values in self.drift.values()}
        if len(seeds) != 1 or 0 in seeds or any(np.shape(v)[1] != n for v in self.drift.values()):
            raise DataError(
                "The drift arrays do not fit",
                received={k: np.shape(v) for k, v in self.drift.items()},
                allowed=f"one shape [n_seeds, {n}] for all metrics",
            )


class Settings(NamedTuple):
    """What every estimate of a study shares."""

    sesoi: float
    resamples: int
    rng_seed: int


class Chosen(NamedTuple):
    """A group among all neurons: its members, the strata that were made for it, and the group drawn at random that
    Cohen's d compares it with (None: there is no other)."""

    name: str
    role: Role | None
    member_N: BoolArray
    stratum_N: IntArray
    random_N: BoolArray | None


class Comparison(NamedTuple):
    """A group in one metric, cut down to the measured neurons."""

    group: Chosen
    metric: str
    member_M: BoolArray
    site_M: IntArray
    stratum_M: IntArray
    random_M: BoolArray | None
    drift_SM: FloatArray
    matched: MatchedSums


def compare(population: Population, group: Chosen, measured_N: BoolArray, metric: str) -> Comparison:
    """The matched comparison of a group among the neurons measured in one metric."""
    drift_SM = np.asarray(population.drift[metric], dtype=np.float64)
    site_M = np.asarray(population.site, dtype=np.int64)
    member_M, stratum_M, random_M = group.member_N, group.stratum_N, group.random_N
    if not measured_N.all():
        drift_SM, site_M = drift_SM[:, measured_N], site_M[measured_N]
        member_M, stratum_M = member_M[measured_N], stratum_M[measured_N]
        random_M = None if random_M is None else random_M[measured_N]
    site_of_stratum = np.zeros(int(stratum_M.max()) + 1 if len(stratum_M) else 0, dtype=np.int64)
    site_of_stratum[stratum_M] = site_M
    sums = estimates.matched_sums(drift_SM, member_M, stratum_M, site_of_stratum, len(population.site_names))
    return Comparison(group, metric, member_M, site_M, stratum_M, random_M, drift_SM, sums)


def permutations(name: str, comparisons: Mapping[str, Comparison], settings: Settings) -> dict[str, float]:
    """Sharp-null p per metric; metrics with the same measured neurons share their permutations."""
    out: dict[str, float] = {}
    batches: dict[bytes, list[str]] = {}
    for metric, comparison in comparisons.items():
        key = comparison.member_M.tobytes() + comparison.stratum_M.tobytes()
        batches.setdefault(key, []).append(metric)
    for batch in batches.values():
        first = comparisons[batch[0]]
        if not first.member_M.any():
            out.update(dict.fromkeys(batch, NAN))
            continue
        drifts = [comparisons[metric].drift_SM for metric in batch]
        values = np.stack([(drift_SM / estimates.raw_scale(drift_SM)[:, None]).mean(axis=0) for drift_SM in drifts])
        rng = np.random.default_rng([settings.rng_seed, zlib.crc32(name.encode())])
        p = inference.permutation_p(values, first.member_M, first.stratum_M, resamples=settings.resamples, rng=rng)
        out.update(zip(batch, p.tolist(), strict=True))
    return out


def infer_matched(matched: MatchedSums, settings: Settings) -> Inference:
    """g of a matched comparison, with its standard error and reference distribution."""
    statistic = MatchedEffect(matched.seeds, estimates.hedges_correction(float(matched.freedom.sum())))
    return inference.infer(matched.sums, statistic, resamples=settings.resamples, rng_seed=settings.rng_seed)


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


class Tested(NamedTuple):
    """A standardised effect with its tests and verdict, and why any of its p-values is undefined."""

    estimate: Estimate
    p: float
    p_equivalence: float
    verdict: Verdict
    detectable: float
    reasons: dict[str, str]


def tested(inferred: Inference, n: int, sesoi: float) -> Tested:
    """The tests and the verdict that an inference about a standardised effect allows; `n` counts neurons."""
    estimate = to_estimate(inferred, n)
    return Tested(
        estimate,
        inferred.p_value(),
        inferred.p_equivalence(sesoi),
        decide(estimate.ci90, estimate.ci95, sesoi),
        inferred.detectable(),
        {field: inferred.reason for field in ("p", "p_equivalence", "detectable") if inferred.reason},
    )


def group_effect(
    population: Population, comparison: Comparison, p_permutation: float, settings: Settings
) -> GroupEffect:
    """Everything about one group in one metric; Holm's adjustment is left to the caller."""
    group, matched = comparison.group, comparison.matched
    effect = tested(infer_matched(matched, settings), matched.n_matched, settings.sesoi)
    n_members, n_measured = int(group.member_N.sum()), int(comparison.member_M.sum())
    undefined = {"p_permutation": "no stratum holds both members and controls"} if np.isnan(p_permutation) else {}
    return GroupEffect(
        group=group.name,
        role=group.role,
        metric=comparison.metric,
        n_members=n_members,
        n_measured=n_measured,
        n_undefined=n_members - n_measured,
        undefined_reason=UNDEFINED_DRIFT if n_members > n_measured else "",
        matched=MatchedCounts(
            n_unmatched=matched.n_unmatched,
            n_controls=matched.n_controls,
            strata=matched.strata,
            strata_unmatched=matched.strata_unmatched,
        ),
        raw=_raw_figures(comparison),
        g=effect.estimate,
        p=effect.p,
        p_holm=NAN,
        p_permutation=p_permutation,
        p_equivalence=effect.p_equivalence,
        verdict=effect.verdict,
        detectable=effect.detectable,
        per_seed=_per_seed(matched, settings),
        by_module=_subgroups(matched, list(population.module_type), settings),
        by_layer_third=_subgroups(matched, _third_of_site(population), settings),
        by_site=_sites(matched, population),
        balance=balance(population.site, population.norm, group.member_N, group.stratum_N, len(population.site_names)),
        reasons=effect.reasons | undefined,
    )


def _raw_figures(comparison: Comparison) -> RawFigures:
    """Means, medians and ratios of the members, their controls and all others."""
    member_M, drift_SM, matched = comparison.member_M, comparison.drift_SM, comparison.matched
    seeds, n_in, n_out = len(drift_SM), int(member_M.sum()), int((~member_M).sum())
    inside_JQ, outside_JQ = _raw_sums(comparison, member_M), _raw_sums(comparison, ~member_M)
    controls_JQ = np.concatenate([matched.sums[:, :1], matched.expected], axis=1)
    mean = estimates.mean_statistic(seeds, estimates.raw_scale(drift_SM) if len(member_M) else np.ones(seeds))
    mean_of_controls = estimates.mean_statistic(seeds, np.ones(seeds))
    return RawFigures(
        mean_members=_plain([inside_JQ], mean, n_in),
        mean_controls=_plain([controls_JQ], mean_of_controls, matched.n_controls),
        mean_others=_plain([outside_JQ], mean, n_out),
        median_members=_median(comparison, [_median_of(values_M[member_M]) for values_M in drift_SM], n_in),
        median_controls=_median(
            comparison,
            [estimates.stratified_median(v, comparison.stratum_M, member_M) if n_in else NAN for v in drift_SM],
            matched.n_controls,
        ),
        median_others=_median(comparison, [_median_of(values_M[~member_M]) for values_M in drift_SM], n_out),
        ratio_unmatched=_plain([inside_JQ, outside_JQ], estimates.ratio_statistic(seeds), n_in + n_out),
        ratio_matched=_ratio_matched(matched),
        d_random=_d_random(comparison, inside_JQ, n_in),
    )


def _raw_sums(comparison: Comparison, chosen_M: BoolArray) -> FloatArray:
    """`raw_sums` of some of the measured neurons, up to the last site that has any. `[J, Q]`."""
    sites = int(comparison.site_M.max()) + 1 if len(comparison.site_M) else 1
    return estimates.raw_sums(comparison.drift_SM, chosen_M, comparison.site_M, sites)


def _plain(arms_JQ: list[FloatArray], statistic: estimates.Statistic, n: int) -> Estimate:
    """A statistic of arms laid side by side, each with its counts in the first column, over sites that have any."""
    present_J = np.sum([arm_JQ[:, 0] for arm_JQ in arms_JQ], axis=0) > 0
    return to_estimate(inference.infer_plain(np.concatenate(arms_JQ, axis=1)[present_J], statistic), n)


def _ratio_matched(matched: MatchedSums) -> Estimate:
    """The mean of the members over the mean of their controls."""
    seeds = matched.seeds
    sums_JQ = np.concatenate([matched.expected, matched.sums[:, 2 : 2 + seeds]], axis=1)
    inferred = inference.infer_plain(sums_JQ[matched.sums[:, 0] > 0], estimates.matched_ratio_statistic(seeds))
    return to_estimate(inferred, matched.n_matched)


def _median_of(values: FloatArray) -> float:
    return float(np.median(values)) if len(values) else NAN


def _median(comparison: Comparison, of_seeds: list[float], n: int) -> Estimate:
    """A median, averaged over seeds."""
    return _without_interval(
        float(np.mean(of_seeds)),
        n=n,
        sites=len(comparison.matched.sites),
        seeds=len(of_seeds),
        method="median, averaged over seeds",
        reason=NO_INTERVAL,
    )


def _d_random(comparison: Comparison, inside_JQ: FloatArray, n_in: int) -> Estimate:
    """Cohen's d of the members against the group drawn at random."""
    seeds, random_M = len(comparison.drift_SM), comparison.random_M
    if random_M is None:
        reason = "no group 'random' other than this one to compare with"
        return _without_interval(NAN, n=n_in, sites=0, seeds=seeds, method="Cohen's d", reason=reason)
    arms_JQ = [inside_JQ, _raw_sums(comparison, random_M)]
    return _plain(arms_JQ, estimates.cohens_d_statistic(seeds), n_in + int(random_M.sum()))


def _without_interval(value: float, *, n: int, sites: int, seeds: int, method: str, reason: str) -> Estimate:
    return Estimate(
        value=value,
        se=NAN,
        ci90=(NAN, NAN),
        ci95=(NAN, NAN),
        n=n,
        sites=sites,
        seeds=seeds,
        method=method,
        reason=reason,
    )


def _per_seed(matched: MatchedSums, settings: Settings) -> tuple[Estimate, ...]:
    """g of each seed alone; its interval covers sites only."""
    seeds = matched.seeds
    out = []
    for seed in range(seeds):
        alone = matched._replace(
            sums=matched.sums[:, [0, 1, 2 + seed, 2 + seeds + seed]], expected=matched.expected[:, [seed]]
        )
        out.append(to_estimate(infer_matched(alone, settings), matched.n_matched))
    return tuple(out)


def _third_of_site(population: Population) -> list[str]:
    """The third of the network's depth of each site; empty where it has no layer."""
    layers = sorted({layer for layer in population.layer if layer is not None})
    rank = {layer: index for index, layer in enumerate(layers)}
    return ["" if layer is None else THIRDS[rank[layer] * 3 // len(layers)] for layer in population.layer]


def _subgroups(matched: MatchedSums, label_of_site: list[str], settings: Settings) -> tuple[Subgroup, ...]:
    labels = np.array(label_of_site, dtype=object)[matched.sites]
    out = []
    for name in dict.fromkeys(label for label in label_of_site if label):
        keep = labels == name
        if not keep.any():
            continue
        part = matched.subset(keep)
        effect = tested(infer_matched(part, settings), part.n_matched, settings.sesoi)
        out.append(
            Subgroup(name=name, g=effect.estimate, p=effect.p, verdict=effect.verdict, reason=effect.estimate.reason)
        )
    return tuple(out)


def _sites(matched: MatchedSums, population: Population) -> tuple[SiteEffect, ...]:
    out = []
    for row, site in enumerate(matched.sites.tolist()):
        statistic = MatchedEffect(matched.seeds, estimates.hedges_correction(float(matched.freedom[row])))
        g = float(statistic(matched.sums[row]).mean())
        out.append(
            SiteEffect(
                site=population.site_names[site],
                module_type=population.module_type[site],
                layer=population.layer[site],
                n=int(matched.sums[row, 0]),
                g=g,
                reason="" if np.isfinite(g) else "no variation of drift within strata",
            )
        )
    return tuple(out)
