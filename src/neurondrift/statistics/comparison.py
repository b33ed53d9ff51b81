"""One group in one metric: the population it is chosen from, its matched comparison, and every figure of its effect.

Which comparisons a study makes is in `analysis`. Shapes: N neurons of the population, M of them measured (finite drift
in every seed), S seeds, J sites, Q sums per site.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from neurondrift.base.roles import Role
from neurondrift.statistics import estimates, inference
from neurondrift.statistics.design.matching import balance
from neurondrift.statistics.design.plans import Designs
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import (
    Places,
    RatioSums,
    Rules,
    called,
    exponential,
    infer_ratio,
    injected_control,
    limits,
    ratio_effect,
    ratio_sums,
    to_estimate,
)
from neurondrift.statistics.estimates import BoolArray, FloatArray, IntArray, MatchedEffect, MatchedSums
from neurondrift.statistics.inference import Inference
from neurondrift.statistics.results import (
    Estimate,
    GroupEffect,
    MatchedCounts,
    RawFigures,
    SiteEffect,
    Subgroup,
)

THIRDS = ("first third", "middle third", "last third")
UNDEFINED_DRIFT = "drift not finite in at least one seed (for example a weight vector of zero norm)"
NO_INTERVAL = "descriptive figure: no interval"
NO_COVARIATES = "no covariates beside |w| are known of these neurons"
NAN = float("nan")


class Settings(NamedTuple):
    """What every estimate of a study shares."""

    band: float
    bins: int
    resamples: int
    rng_seed: int

    @property
    def rules(self) -> Rules:
        """What an inference about a ratio needs of them."""
        return Rules(self.band, self.resamples, self.rng_seed)


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


def group_effect(
    population: Population,
    comparison: Comparison,
    plan: Designs,
    p_permutation: float,
    settings: Settings,
    *,
    judging: bool,
) -> GroupEffect:
    """Everything about one group in one metric; Holm's adjustment is left to the caller."""
    group, matched = comparison.group, comparison.matched
    inferred = infer_matched(matched, settings)
    places, rules, drift_SN = population.places(), settings.rules, population.drift[comparison.metric]
    norm = ratio_effect(plan.norm, drift_SN, places, rules)
    balanced = None if plan.matched is None else ratio_effect(plan.matched, drift_SN, places, rules)
    primary = balanced or norm
    sums = ratio_sums(plan.judging, drift_SN, places)
    n_members, n_measured = int(group.member_N.sum()), int(comparison.member_M.sum())
    reasons = {field: primary.log_ratio.reason for field in ("p", "p_equivalence") if primary.log_ratio.reason}
    if inferred.reason:
        reasons["detectable"] = inferred.reason
    if np.isnan(p_permutation):
        reasons["p_permutation"] = "no stratum holds both members and controls"
    if balanced is None:
        reasons["effect_matched"] = NO_COVARIATES

    def parts(labels: list[str]) -> tuple[Subgroup, ...]:
        return _subgroups(matched, sums, labels, places, settings, comparable=primary.comparable)

    return GroupEffect(
        group=group.name,
        role=group.role,
        judging=judging,
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
        effect_norm=norm,
        effect_matched=balanced,
        injected=injected_control(plan.judging, drift_SN, group.member_N, primary, places, rules),
        g=to_estimate(inferred, matched.n_matched),
        p=primary.p,
        p_holm=NAN,
        p_permutation=p_permutation,
        p_equivalence=primary.p_equivalence,
        verdict=primary.verdict,
        detectable=inferred.detectable(),
        per_seed=_per_seed(matched, settings),
        by_module=parts(list(population.module_type)),
        by_layer_third=parts(_third_of_site(population)),
        by_site=_sites(matched, sums, population),
        balance=balance(population.site, population.norm, group.member_N, group.stratum_N, len(population.site_names)),
        reasons=reasons,
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


def _subgroups(
    matched: MatchedSums,
    sums: RatioSums,
    label_of_site: list[str],
    places: Places,
    settings: Settings,
    *,
    comparable: bool,
) -> tuple[Subgroup, ...]:
    labels = np.array(label_of_site, dtype=object)
    out = []
    for name in dict.fromkeys(label for label in label_of_site if label):
        keep = labels[sums.sites] == name
        if not keep.any():
            continue
        part = matched.subset(labels[matched.sites] == name)
        found = infer_ratio(sums.subset(keep), places, settings.rules).inferred
        estimate = to_estimate(found, int(sums.sums[keep, 0].sum()))
        out.append(
            Subgroup(
                name=name,
                g=to_estimate(infer_matched(part, settings), part.n_matched),
                log_ratio=estimate,
                ratio=exponential([estimate.value])[0],
                ratio_ci95=limits(estimate.ci95),
                p=found.p_value(),
                verdict=called(estimate, settings.band) if comparable else "inconclusive",
                reason=estimate.reason,
            )
        )
    return tuple(out)


def _sites(matched: MatchedSums, sums: RatioSums, population: Population) -> tuple[SiteEffect, ...]:
    ratios = dict(zip(sums.sites.tolist(), (sums.sums[:, 1:].mean(axis=1) / sums.sums[:, 0]).tolist(), strict=True))
    out = []
    for row, site in enumerate(matched.sites.tolist()):
        statistic = MatchedEffect(matched.seeds, estimates.hedges_correction(float(matched.freedom[row])))
        g = float(statistic(matched.sums[row]).mean())
        reasons = {} if np.isfinite(g) else {"g": "no variation of drift within strata"}
        if site not in ratios:
            reasons["ratio"] = "no member of this site has a counterfactual"
        out.append(
            SiteEffect(
                site=population.site_names[site],
                module_type=population.module_type[site],
                layer=population.layer[site],
                n=int(matched.sums[row, 0]),
                g=g,
                ratio=exponential([ratios.get(site, NAN)])[0],
                reason="; ".join(reasons.values()),
            )
        )
    return tuple(out)
