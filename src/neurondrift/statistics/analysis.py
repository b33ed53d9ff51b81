"""The analysis of a study: every group in every metric, contrasts, overlaps, and Holm's adjustment of their tests.

Owns the order of the steps; a single comparison is in `comparison`, the inference in `inference`, what goes with
behaviour in `descriptive`. Shapes: N neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from neurondrift.base.errors import ConfigError, GroupError
from neurondrift.base.roles import CONTROLS, NEGATIVE_CONTROLS, POSITIVE_CONTROLS, Role, judges, role_of_name
from neurondrift.statistics import estimates, inference
from neurondrift.statistics.comparison import Chosen, Settings, compare, group_effect, permutations
from neurondrift.statistics.descriptive import BehaviourSeries, associate
from neurondrift.statistics.design.matching import refine_bins
from neurondrift.statistics.design.plans import Plans, covariates_of_groups
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import (
    RATIO_FIELDS,
    called,
    exponential,
    infer_difference,
    limits,
    ratio_sums,
    to_estimate,
)
from neurondrift.statistics.estimates import BoolArray, MatchedEffect, MatchedSums
from neurondrift.statistics.results import (
    ComparisonName,
    Contrast,
    ControlCheck,
    GroupEffect,
    Overlap,
    RatioEffect,
    StudyResult,
    decide,
)

DEFAULT_CONTRASTS = (("safety_set_difference", "utility_top"), ("safety_top", "utility_top"))
NOT_COMPARABLE = "not comparable: outside the family of tests"


def analyze(
    population: Population,
    groups: Mapping[str, NDArray[np.bool_]],
    *,
    metrics: Sequence[str],
    seed_labels: Sequence[str],
    band: float = 1.25,
    sesoi: float = 0.2,
    resamples: int = 2000,
    bins: int = 10,
    rng_seed: int = 0,
    primary_metric: str = "relative",
    contrasts: Sequence[tuple[str, str]] = DEFAULT_CONTRASTS,
    roles: Mapping[str, Role | None] | None = None,
    judging: Sequence[str] | None = None,
    match_on: Mapping[str, Sequence[str]] | None = None,
    behaviour: BehaviourSeries | None = None,
) -> StudyResult:
    """Compare the drift of each group with that of comparable neurons outside it.

    The effect is the mean over members of log drift minus that of their weighted controls, pooled over sites with
    their members that are compared as weights and averaged over seeds: the log of a ratio. Two comparisons: `norm`
    (strata of site and |w|, with a regression for what is left of log |w|) and, where the population has covariates,
    `matched` (site; |w| and covariates balanced), which then judges. See `design.designs` for who is compared with
    whom, `design.ratios` for intervals and clusters. Secondary: the standardised mean difference g within the strata.

    Parameters
    ----------
    population
        The neurons, their drift and covariates.
    groups
        Name -> members, bool [N].
    metrics
        Metrics to analyse, keys of ``population.drift``.
    seed_labels
        One label per training seed.
    band
        Ratio within which groups count as moving alike, above 1: 1.25 is 1 / 1.25 to 1.25.
    sesoi
        Smallest effect of interest in units of g. It is recorded and judges nothing.
    resamples
        Bootstrap resamples and label permutations, at least 100.
    bins
        |w| quantile bins per site, before refinement (`refine_bins`).
    rng_seed
        Seed of all resampling, at least 0.
    primary_metric
        The metric that the conclusion is about; the first of `metrics` where it is not among them and the
        default was kept.
    contrasts
        Pairs of groups to compare, each against its own controls. Default pairs with a missing group are
        skipped.
    roles
        Name -> what the group is to the study. The group ``random`` is the comparison of Cohen's d; it and all other
        controls, negative and positive, are outside the Holm family. A group that is left out has the role that its
        name tells of (`base.roles`).
    judging
        The groups that the answer rests on; by default those of the role ``safety`` but `JUDGES_NOTHING`.
    match_on
        Name -> what is balanced in the matched comparison of that group: ``norm`` and keys of
        ``population.covariates``. By default `MATCHED_ON` as far as it is known; without the gradient scale for a
        positive control, which is chosen by it.
    behaviour
        Refusals and drift at the same steps.

    Returns
    -------
    StudyResult

    Raises
    ------
    GroupError
        A group is empty, of the wrong length or type, or unknown in `contrasts`, `judging` or `match_on`.
    ConfigError
        A metric, label, covariate, or number that does not fit.
    """
    members = {name: _members(name, chosen, len(population.site)) for name, chosen in groups.items()}
    primary = _validate(
        population, members, metrics, seed_labels, band, sesoi, resamples, bins, rng_seed, primary_metric
    )
    pairs = _known_contrasts(contrasts, members)
    settings = Settings(band, bins, resamples, rng_seed)
    roles = {name: (roles or {}).get(name, role_of_name(name)) for name in members}
    if judging is None:
        judging = [name for name, role in roles.items() if judges(name, role)]
    on = covariates_of_groups(population, roles, match_on or {})
    for name in (*judging, *(match_on or {})):
        if name not in members:
            raise GroupError("A group is unknown", received=name, allowed=", ".join(members))
    measured: dict[str, BoolArray] = {
        metric: np.asarray(np.isfinite(population.drift[metric]).all(axis=0), dtype=np.bool_) for metric in metrics
    }
    plans = Plans(population, metrics, bins)
    matched: dict[tuple[str, str], MatchedSums] = {}
    effects: list[GroupEffect] = []
    for name, member_N in members.items():
        stratum_N = refine_bins(population.site, population.norm, member_N, bins)
        random = next((other for other in members if roles[other] == "random" and other != name), None)
        group = Chosen(name, roles[name], member_N, stratum_N, None if random is None else members[random])
        comparisons = {metric: compare(population, group, measured[metric], metric) for metric in metrics}
        permuted = permutations(name, comparisons, settings)
        for metric, comparison in comparisons.items():
            matched[name, metric] = comparison.matched
            plan = plans.of(member_N, ~member_N, metric, on[name])
            effects.append(
                group_effect(population, comparison, plan, permuted[metric], settings, judging=name in judging)
            )
    differences = []
    for first, second in pairs:
        apart = _apart(population, members, first, second, settings)
        differences += [_contrast(apart, measured[metric], metric, plans, on, settings) for metric in metrics]
    effects, differences, family_size = _adjust(effects, differences)
    comparison_that_judges: ComparisonName = "matched" if population.covariates else "norm"
    return StudyResult(
        metrics=tuple(metrics),
        groups=tuple(members),
        seed_labels=tuple(seed_labels),
        primary_metric=primary,
        band=band,
        comparison_that_judges=comparison_that_judges,
        judging=tuple(judging),
        sesoi=sesoi,
        resamples=resamples,
        bins=bins,
        rng_seed=rng_seed,
        n_neurons=len(population.site),
        n_sites=len(population.site_names),
        effects=tuple(effects),
        contrasts=tuple(differences),
        family=_family(roles),
        family_size=family_size,
        overlaps=_overlaps(members),
        associations=associate(behaviour) if behaviour is not None else (),
        controls=_checks([effect for effect in effects if effect.metric == primary]),
    )


def _checks(effects: Sequence[GroupEffect]) -> tuple[ControlCheck, ...]:
    """What came of the groups whose answer is known before; where the judging comparison has no counterfactual of
    them, by strata of |w|."""
    out = []
    for effect in effects:
        if effect.role is None or effect.role not in CONTROLS:
            continue
        judged: RatioEffect = effect.primary_effect
        if not judged.comparable and effect.effect_norm.comparable:
            judged = effect.effect_norm
        positive = effect.role in POSITIVE_CONTROLS
        passed = None if judged.verdict == "inconclusive" else judged.verdict == ("more" if positive else "similar")
        out.append(
            ControlCheck(
                group=effect.group,
                role=effect.role,
                comparison=judged.comparison,
                expected="more" if positive else "similar",
                verdict=judged.verdict,
                passed=passed,
                reasons={} if passed is not None else {"passed": "inconclusive"},
            )
        )
    return tuple(out)


def _members(name: str, chosen: NDArray[np.bool_], n: int) -> BoolArray:
    array = np.asarray(chosen)
    if array.dtype != np.bool_ or array.shape != (n,):
        raise GroupError(
            f"Group {name!r} does not fit the neurons",
            received=(str(array.dtype), array.shape),
            allowed=f"a boolean array of shape ({n},)",
        )
    if not array.any():
        raise GroupError(
            f"Group {name!r} has no member among the measured sites",
            fix="select a larger fraction, or adapt the sites where its members live",
        )
    return array


def _validate(
    population: Population,
    members: Mapping[str, BoolArray],
    metrics: Sequence[str],
    seed_labels: Sequence[str],
    band: float,
    sesoi: float,
    resamples: int,
    bins: int,
    rng_seed: int,
    primary_metric: str,
) -> str:
    """Check the settings; the primary metric that holds."""
    if not members:
        raise GroupError("There is no group to analyse", allowed="at least one")
    unknown = [metric for metric in metrics if metric not in population.drift]
    if unknown or not metrics:
        raise ConfigError("A metric is unknown", received=list(metrics), allowed=", ".join(population.drift))
    seeds = len(population.drift[metrics[0]])
    if len(seed_labels) != seeds:
        raise ConfigError(
            "The seed labels do not fit the drift",
            received=list(seed_labels),
            allowed=f"{seeds} label{'s' if seeds > 1 else ''}",
        )
    decide((0.0, 0.0), (0.0, 0.0), sesoi)
    if not 1 < band < np.inf:
        raise ConfigError("The band of equivalence is no ratio above 1", received=band, allowed="such as 1.25")
    for what, value, least in (
        ("number of resamples", resamples, 100),
        ("number of |w| bins", bins, 1),
        ("random seed of the analysis", rng_seed, 0),
    ):
        if value < least:
            raise ConfigError(f"The {what} is too small", received=value, allowed=f"{least} or more")
    if primary_metric in metrics:
        return primary_metric
    if primary_metric != "relative":
        raise ConfigError("The primary metric is not analysed", received=primary_metric, allowed=", ".join(metrics))
    return metrics[0]


def _known_contrasts(contrasts: Sequence[tuple[str, str]], members: Mapping[str, BoolArray]) -> list[tuple[str, str]]:
    known = []
    for first, second in contrasts:
        if first in members and second in members:
            known.append((first, second))
        elif (first, second) not in DEFAULT_CONTRASTS:
            raise GroupError("A contrast names an unknown group", received=(first, second), allowed=", ".join(members))
    return known


class _Apart(NamedTuple):
    """Two groups without the members that they share, and who may be a control of either; comparisons of g."""

    population: Population
    first: Chosen
    second: Chosen
    candidate_N: BoolArray
    shared: int


def _apart(
    population: Population, members: Mapping[str, BoolArray], first: str, second: str, settings: Settings
) -> _Apart:
    a, b = members[first], members[second]
    own = []
    for name, member_N in ((first, a & ~b), (second, b & ~a)):
        stratum_N = refine_bins(population.site, population.norm, member_N, settings.bins)
        own.append(Chosen(name, None, member_N, stratum_N, None))
    return _Apart(population, own[0], own[1], ~(a | b), int((a & b).sum()))


def _contrast(
    apart: _Apart,
    measured_N: BoolArray,
    metric: str,
    plans: Plans,
    on: Mapping[str, tuple[str, ...]],
    settings: Settings,
) -> Contrast:
    """The ratio of one group over that of another, and the difference of g; a site enters both when it is drawn."""
    population, first, second = apart.population, apart.first, apart.second
    drift_SN, places, log_band = population.drift[metric], population.places(), float(np.log(settings.band))
    used = [plans.of(own.member_N, apart.candidate_N, metric, on[own.name]).judging for own in (first, second)]
    sums = [ratio_sums(design, drift_SN, places) for design in used]
    found = infer_difference(sums[0], sums[1], places, settings.rules).inferred
    estimate = to_estimate(found, sum(int(part.sums[:, 0].sum()) for part in sums))
    comparable = not any(design.because for design in used)
    allowed_N = measured_N & (apart.candidate_N | first.member_N | second.member_N)
    a, b = (
        compare(population, own, allowed_N & ~other.member_N, metric).matched
        for own, other in ((first, second), (second, first))
    )
    g = _difference_of_g(a, b, settings)
    reasons = {field: found.reason for field in RATIO_FIELDS if found.reason}
    if g.reason:
        reasons["detectable"] = g.reason
    return Contrast(
        first=first.name,
        second=second.name,
        metric=metric,
        comparison="matched" if all(design.name == "matched" for design in used) else "norm",
        shared=apart.shared,
        log_ratio=estimate,
        ratio=exponential([estimate.value])[0],
        ratio_ci90=limits(estimate.ci90),
        ratio_ci95=limits(estimate.ci95),
        comparable=comparable,
        difference=to_estimate(g, a.n_matched + b.n_matched),
        p=found.p_value(),
        p_holm=float("nan"),
        p_equivalence=found.p_equivalence(log_band),
        verdict=called(estimate, settings.band) if comparable else "inconclusive",
        detectable=g.detectable(),
        reasons=reasons,
    )


def _difference_of_g(a: MatchedSums, b: MatchedSums, settings: Settings) -> inference.Inference:
    sites = np.union1d(a.sites, b.sites)
    width = 2 + 2 * a.seeds
    sums = np.zeros((len(sites), 2 * width))
    sums[np.searchsorted(sites, a.sites), :width] = a.sums
    sums[np.searchsorted(sites, b.sites), width:] = b.sums
    statistic = estimates.Difference(
        *(MatchedEffect(m.seeds, estimates.hedges_correction(float(m.freedom.sum()))) for m in (a, b))
    )
    return inference.infer(sums, statistic, resamples=settings.resamples, rng_seed=settings.rng_seed)


def _family(roles: Mapping[str, Role | None]) -> str:
    """Holm's family in words: which tests the p-values are adjusted for."""
    outside = [role for role in CONTROLS if role == "random" or role in roles.values()]
    return f"overall effects of all groups but {' and '.join(map(repr, outside))}, and contrasts, in all metrics"


def _adjust(effects: list[GroupEffect], differences: list[Contrast]) -> tuple[list[GroupEffect], list[Contrast], int]:
    """Holm-adjusted p-values over the family: the judging comparison of every group but the controls, and contrasts.

    What is not comparable has a p-value, which tests what nobody asks: it stays outside too.
    """
    raw = [
        effect.p if effect.role not in CONTROLS and effect.primary_effect.comparable else float("nan")
        for effect in effects
    ]
    raw += [difference.p if difference.comparable else float("nan") for difference in differences]
    adjusted = inference.holm(raw).tolist()
    new_effects = []
    for effect, p in zip(effects, adjusted, strict=False):
        primary = effect.primary_effect
        reason = primary.log_ratio.reason or NOT_COMPARABLE
        if effect.role in NEGATIVE_CONTROLS:
            reason = "negative control: outside the family of tests"
        elif effect.role in CONTROLS:
            reason = "positive control: outside the family of tests"
        primary = replace(primary, p_holm=p, reasons={**primary.reasons, "p_holm": reason})
        other = {**effect.effect_norm.reasons, "p_holm": "not the comparison that judges: outside the family of tests"}
        effect = replace(effect, p_holm=p, reasons={**effect.reasons, "p_holm": reason})
        if effect.effect_matched is None:
            effect = replace(effect, effect_norm=primary)
        else:
            effect = replace(effect, effect_norm=replace(effect.effect_norm, reasons=other), effect_matched=primary)
        new_effects.append(effect)
    new_differences = [
        replace(d, p_holm=p, reasons={**d.reasons, "p_holm": d.log_ratio.reason or NOT_COMPARABLE})
        for d, p in zip(differences, adjusted[len(effects) :], strict=True)
    ]
    return new_effects, new_differences, int(np.isfinite(raw).sum())


def _overlaps(members: Mapping[str, BoolArray]) -> tuple[Overlap, ...]:
    out = []
    for (first, a), (second, b) in itertools.combinations(members.items(), 2):
        shared = int((a & b).sum())
        out.append(Overlap(first=first, second=second, shared=shared, jaccard=shared / int((a | b).sum())))
    return tuple(out)
