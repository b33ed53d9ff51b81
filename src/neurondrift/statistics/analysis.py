"""The analysis of a study: every group in every metric, contrasts, overlaps, and Holm's adjustment of their tests.

Owns the order of the steps; a single comparison is in `comparison`, the inference in `inference`, what goes with
behaviour in `descriptive`. Shapes: N neurons.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from neurondrift.base.errors import ConfigError, GroupError
from neurondrift.base.roles import NEGATIVE_CONTROLS, Role, role_of_name
from neurondrift.statistics import estimates, inference
from neurondrift.statistics.comparison import (
    Chosen,
    Population,
    Settings,
    compare,
    group_effect,
    permutations,
    tested,
)
from neurondrift.statistics.descriptive import BehaviourSeries, associate
from neurondrift.statistics.estimates import BoolArray, MatchedEffect, MatchedSums
from neurondrift.statistics.matching import refine_bins
from neurondrift.statistics.results import Contrast, GroupEffect, Overlap, StudyResult, decide

DEFAULT_CONTRASTS = (("safety_set_difference", "utility_top"), ("safety_top", "utility_top"))


def analyze(
    population: Population,
    groups: Mapping[str, NDArray[np.bool_]],
    *,
    metrics: Sequence[str],
    seed_labels: Sequence[str],
    sesoi: float = 0.2,
    resamples: int = 2000,
    bins: int = 10,
    rng_seed: int = 0,
    primary_metric: str = "relative",
    contrasts: Sequence[tuple[str, str]] = DEFAULT_CONTRASTS,
    roles: Mapping[str, Role | None] | None = None,
    behaviour: BehaviourSeries | None = None,
) -> StudyResult:
    """Compare the drift of each group with that of matched neurons outside it.

    The effect g is the mean over members of (drift - mean drift of the non-members in the same stratum of
    site and |w|), averaged over members, divided by the root of the members' mean within-stratum variance
    (members and controls about their own means, n - 2 degrees of freedom) and Hedges-corrected; averaged
    over seeds. Intervals and p-values: `neurondrift.statistics.inference`.

    Parameters
    ----------
    population
        The neurons and their drift.
    groups
        Name -> members, bool [N].
    metrics
        Metrics to analyse, keys of ``population.drift``.
    seed_labels
        One label per training seed.
    sesoi
        Smallest effect of interest, in units of g.
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
        Name -> what the group is to the study. The group ``random`` is the comparison of Cohen's d; it and any
        ``control`` are negative controls, outside the Holm family. A group that is left out has the role that its
        name tells of (`base.roles`).
    behaviour
        Refusals and drift at the same steps.

    Returns
    -------
    StudyResult

    Raises
    ------
    GroupError
        A group is empty, of the wrong length or type, or unknown in `contrasts`.
    ConfigError
        A metric, label, or number that does not fit.
    """
    members = {name: _members(name, chosen, len(population.site)) for name, chosen in groups.items()}
    primary = _validate(population, members, metrics, seed_labels, sesoi, resamples, bins, rng_seed, primary_metric)
    pairs = _known_contrasts(contrasts, members)
    settings = Settings(sesoi, resamples, rng_seed)
    roles = {name: (roles or {}).get(name, role_of_name(name)) for name in members}
    measured: dict[str, BoolArray] = {
        metric: np.asarray(np.isfinite(population.drift[metric]).all(axis=0), dtype=np.bool_) for metric in metrics
    }
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
            effects.append(group_effect(population, comparison, permuted[metric], settings))
    differences = [
        _contrast(first, second, metric, matched[first, metric], matched[second, metric], settings)
        for first, second in pairs
        for metric in metrics
    ]
    effects, differences, family_size = _adjust(effects, differences)
    return StudyResult(
        metrics=tuple(metrics),
        groups=tuple(members),
        seed_labels=tuple(seed_labels),
        primary_metric=primary,
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
    )


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


def _contrast(first: str, second: str, metric: str, a: MatchedSums, b: MatchedSums, settings: Settings) -> Contrast:
    """g of one group minus g of another; a site enters both sums when it is drawn."""
    sites = np.union1d(a.sites, b.sites)
    width = 2 + 2 * a.seeds
    sums = np.zeros((len(sites), 2 * width))
    sums[np.searchsorted(sites, a.sites), :width] = a.sums
    sums[np.searchsorted(sites, b.sites), width:] = b.sums
    statistic = estimates.Difference(
        *(MatchedEffect(m.seeds, estimates.hedges_correction(float(m.freedom.sum()))) for m in (a, b))
    )
    inferred = inference.infer(sums, statistic, resamples=settings.resamples, rng_seed=settings.rng_seed)
    difference = tested(inferred, a.n_matched + b.n_matched, settings.sesoi)
    return Contrast(
        first=first,
        second=second,
        metric=metric,
        difference=difference.estimate,
        p=difference.p,
        p_holm=float("nan"),
        p_equivalence=difference.p_equivalence,
        verdict=difference.verdict,
        detectable=difference.detectable,
        reasons=difference.reasons,
    )


def _family(roles: Mapping[str, Role | None]) -> str:
    """Holm's family in words: which tests the p-values are adjusted for."""
    outside = [role for role in NEGATIVE_CONTROLS if role == "random" or role in roles.values()]
    return f"overall effects of all groups but {' and '.join(map(repr, outside))}, and contrasts, in all metrics"


def _adjust(effects: list[GroupEffect], differences: list[Contrast]) -> tuple[list[GroupEffect], list[Contrast], int]:
    """Holm-adjusted p-values over the family: every test but those of the negative controls."""
    raw = [effect.p if effect.role not in NEGATIVE_CONTROLS else float("nan") for effect in effects]
    raw += [difference.p for difference in differences]
    adjusted = inference.holm(raw).tolist()
    outside = "negative control: outside the family of tests"
    new_effects = []
    for effect, p in zip(effects, adjusted, strict=False):
        reason = outside if effect.role in NEGATIVE_CONTROLS else effect.g.reason
        new_effects.append(replace(effect, p_holm=p, reasons={**effect.reasons, "p_holm": reason}))
    new_differences = [
        replace(d, p_holm=p, reasons={**d.reasons, "p_holm": d.difference.reason})
        for d, p in zip(differences, adjusted[len(effects) :], strict=True)
    ]
    return new_effects, new_differences, int(np.isfinite(raw).sum())


def _overlaps(members: Mapping[str, BoolArray]) -> tuple[Overlap, ...]:
    out = []
    for (first, a), (second, b) in itertools.combinations(members.items(), 2):
        shared = int((a & b).sum())
        out.append(Overlap(first=first, second=second, shared=shared, jaccard=shared / int((a | b).sum())))
    return tuple(out)
