"""What a study found, in the layout of `statistical_results.json`: from arrays and rows to the parts of the findings.

Computes no statistic itself and draws nothing; the types of the parts are those of `report.findings`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import numpy.typing as npt

from neurondrift.base.roles import Role, role_of_name
from neurondrift.behaviour.rates import category_interval, mean_of, paired_change, refusal_rate
from neurondrift.drift.bins import WeightDrift, aligned, pooled, weight_drifts
from neurondrift.drift.log import METRICS, DriftLog
from neurondrift.groups.group import Group, role_of
from neurondrift.report.conclusion import analysis_findings
from neurondrift.report.findings.attribution import MarginAt, MarginChange
from neurondrift.report.findings.statistical import (
    Analysis,
    Behaviour,
    DriftDistribution,
    GroupFacts,
    Mean,
    Perplexity,
    RateChange,
    RefusalRate,
    ShortRate,
    TrajectoryPoint,
    WeightRow,
)
from neurondrift.statistics import descriptive
from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.design.matching import refine_bins
from neurondrift.statistics.design.plans import covariates_of_groups
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import Rules
from neurondrift.study.population import MATCHED, Compared, Rows, behaviour_series, load_population, membership
from neurondrift.study.settings import AnalyzeSection

#: The mirrored group is chosen by utility, so it is balanced on the safety score instead, where that is known.
MIRRORED = {"utility_set_difference": ("norm", "safety_score", "gradient_scale")}


class DriftFindings(TypedDict):
    """The parts of the findings that rest on drift."""

    analysis: Analysis
    trajectories: list[TrajectoryPoint]
    distributions: list[DriftDistribution]
    groups: list[GroupFacts]
    weights: list[WeightRow]


class Analysed(NamedTuple):
    """What rests on drift, the last step that all logs have, and the groups as they were compared."""

    parts: DriftFindings
    last_step: int
    compared: Compared


def analysis(
    logs: Mapping[int, DriftLog],
    groups: Mapping[str, Group],
    answers: Mapping[int, Rows],
    settings: AnalyzeSection,
    *,
    bins: int,
    rng_seed: int,
    covariates: Path | None = None,
) -> Analysed:
    """The parts of the findings that rest on drift.

    Parameters
    ----------
    logs
        Training seed -> its drift log. All must cover the same neurons.
    groups
        Name -> group of neurons; members outside the trained sites are left out and counted.
    answers
        Training seed -> rows of judged answers (empty where behaviour was not evaluated).
    settings, bins, rng_seed
        Of the analysis; see `statistics.analyze`.
    covariates
        The file of the neurons' scores and gradients that the stage groups wrote; None: norms are all that is known.

    Returns
    -------
    Analysed

    Raises
    ------
    ArtifactError
        Logs that do not cover the same neurons, or have no snapshot after step 0; covariates of another model.
    GroupError
        A group of another model, or none of whose members lies in a trained site.
    """
    population, steps = load_population(logs, covariates)
    members = {name: membership(population, logs, group, name) for name, group in groups.items()}
    roles = {name: role_of(group, name) for name, group in groups.items()}
    match_on = {
        name: on for name, on in MIRRORED.items() if name in members and {"norm", *population.covariates}.issuperset(on)
    }
    result = analyze(
        population,
        members,
        metrics=METRICS,
        seed_labels=[str(seed) for seed in logs],
        band=settings.band,
        sesoi=settings.smallest_effect,
        resamples=settings.resamples,
        bins=bins,
        rng_seed=rng_seed,
        primary_metric=settings.primary_metric,
        roles=roles,
        match_on=match_on,
        behaviour=behaviour_series(logs, population, members, answers, settings.primary_metric),
    )
    strata = {name: refine_bins(population.site, population.norm, chosen, bins) for name, chosen in members.items()}
    parts = DriftFindings(
        analysis=analysis_findings(result),
        trajectories=trajectories(logs, population, members, strata),
        distributions=distributions(population, members, strata, list(logs)),
        groups=[_group_facts(name, group, int(members[name].sum())) for name, group in groups.items()],
        weights=single_weights(logs, roles),
    )
    compared = Compared(
        population=population,
        members=members,
        roles=roles,
        judging=result.judging,
        on=covariates_of_groups(population, roles, match_on),
        rules=Rules(settings.band, settings.resamples, rng_seed),
        bins=bins,
    )
    return Analysed(parts, steps[-1], compared)


def _group_facts(name: str, group: Group, trained: int) -> GroupFacts:
    provenance = group.provenance
    rule = str(provenance.get("rule", "unknown"))
    for key in ("fraction", "p", "q", "seed"):
        if key in provenance:
            rule += f", {key} = {provenance[key]}"
    return GroupFacts(
        name=name,
        role=role_of(group, name),
        granularity=group.granularity,
        members=len(group),
        members_in_trained_sites=trained,
        sites=len(group.members),
        rule=rule,
    )


def trajectories(
    logs: Mapping[int, DriftLog],
    population: Population,
    members: Mapping[str, npt.NDArray[np.bool_]],
    strata: Mapping[str, npt.NDArray[np.int64]],
) -> list[TrajectoryPoint]:
    """Mean drift of each group and of its matched controls at every snapshot, with intervals over sites."""
    points: list[TrajectoryPoint] = []
    for seed, log in logs.items():
        for step in log.steps():
            snapshot = log.read(steps=[step])
            for metric in METRICS:
                drift = snapshot[metric].to_numpy(dtype=np.float64)
                overall = _mean(drift, population.site)
                points.append(
                    {"seed": seed, "step": step, "group": "all", "metric": metric, "members": overall, "controls": None}
                )
                for name, chosen in members.items():
                    controls = descriptive.control_means(drift, strata[name], chosen)
                    points.append(
                        {
                            "seed": seed,
                            "step": step,
                            "group": name,
                            "metric": metric,
                            "members": _mean(drift[chosen], population.site[chosen]),
                            "controls": _mean(controls, population.site[chosen]),
                        }
                    )
    return points


def _mean(values: npt.NDArray[np.float64], site: npt.NDArray[np.int64]) -> Mean:
    mean, low, high = descriptive.cluster_mean(values, site)
    return Mean(mean=mean, low=low, high=high)


def distributions(
    population: Population,
    members: Mapping[str, npt.NDArray[np.bool_]],
    strata: Mapping[str, npt.NDArray[np.int64]],
    seeds: Sequence[int],
) -> list[DriftDistribution]:
    """How the final drift of the first seed is distributed among members and among their matched controls."""
    shown: list[DriftDistribution] = []
    for name, chosen in members.items():
        weights = descriptive.control_weights(strata[name], chosen)
        for metric in METRICS:
            densities = descriptive.distribution(population.drift[metric][0], chosen, weights)
            if densities is None:
                continue
            shown.append(
                {
                    "group": name,
                    "metric": metric,
                    "seed": seeds[0],
                    "edges": densities.edges.tolist(),
                    "members": densities.members.tolist(),
                    "controls": densities.controls.tolist(),
                    "n_members": int(chosen.sum()),
                    "n_controls": int((weights > 0).sum()),
                }
            )
    return shown


def single_weights(logs: Mapping[int, DriftLog], roles: Mapping[str, Role | None]) -> list[WeightRow]:
    """Drift of the followed groups of weights at every snapshot, beside their matched controls and random weights.

    One row per seed, step and group; none where a log follows no weights. Means and medians are over all members in
    trained sites whose value is defined. `roles` tells which group is the random one; of names that it does not hold,
    the name does.
    """
    rows: list[WeightRow] = []
    for seed, log in logs.items():
        for step in log.steps() if log.follows_weights() else []:
            parts: dict[tuple[str, str], list[WeightDrift]] = {}
            for part in weight_drifts(log.weights(steps=[step])):
                parts.setdefault((part.group, part.metric), []).append(part)
            names = dict.fromkeys(group for group, _ in parts)
            controls = {name + MATCHED for name in names}
            named = [name for name in names if name not in controls]
            random = next((name for name in named if roles.get(name, role_of_name(name)) == "random"), "")
            for name in named:
                row: dict[str, Any] = {"seed": seed, "step": step, "group": name}
                for metric, label in (("absolute", "abs"), ("relative", "relative")):
                    row |= _weight_fields(label, *(parts.get((n, metric)) for n in (name, name + MATCHED, random)))
                rows.append(cast(WeightRow, row))
    return rows


def _weight_fields(
    label: str,
    members: list[WeightDrift] | None,
    controls: list[WeightDrift] | None,
    random: list[WeightDrift] | None,
) -> dict[str, Any]:
    """The fields of one metric: `label` is `abs` or `relative`."""
    own = pooled(members or [])
    fields: dict[str, Any] = {"n": own.count, f"zeros_{label}": own.zeros, f"undefined_{label}": own.undefined}
    for prefix, arm in (("", members), ("matched_", controls), ("random_", random)):
        if arm:
            whole = pooled(arm)
            fields |= {f"{prefix}mean_{label}": whole.mean, f"{prefix}median_{label}": whole.quantile(0.5)}
    fields |= {f"sd_{label}": math.sqrt(own.variance), f"p99_{label}": own.quantile(0.99)}
    if controls:
        edges, counts = aligned([{part.site: part for part in arm} for arm in (members or [], controls)])
        if label == "relative":  # a quotient with weights near zero: its mean rests on few of them
            ratio = descriptive.ratio_of_medians(edges, *counts)
        else:
            ratio = descriptive.ratio_of_means(*_sums_by_site(members or [], controls))
        fields |= {f"ratio_{label}": ratio.value, f"ratio_{label}_ci95": [ratio.low, ratio.high]}
        if ratio.reason:
            fields |= {f"ratio_{label}_reason": ratio.reason, f"ratio_{label}_ci95_reason": ratio.reason}
    return fields


def _sums_by_site(*arms: list[WeightDrift]) -> list[npt.NDArray[np.float64]]:
    """Count and sum of each arm over the sites of all, `[sites, 2]` each."""
    sums = [{part.site: (part.defined, part.defined * part.mean) for part in arm} for arm in arms]
    sites = list(dict.fromkeys(site for arm in sums for site in arm))
    return [np.nan_to_num([arm.get(site, (0.0, 0.0)) for site in sites]) for arm in sums]


def behaviour(
    answers: Mapping[int, Rows],
    perplexities: Mapping[int, Mapping[int, float]],
    before_alignment: Rows,
    *,
    judge: str,
    attack: str,
    system_prompt: str,
    max_new_tokens: int,
    capability: Rows | None = None,
) -> Behaviour | None:
    """The part of the findings that rests on answers: rates with intervals, changes on the same prompts.

    `answers`: training seed -> rows of judged answers; `perplexities`: seed -> step -> value. None where nothing was
    answered.
    """
    if not any(answers.values()):
        return None
    rates: list[RefusalRate] = []
    changes: list[RateChange] = []
    for seed, rows in answers.items():
        steps = sorted({row["step"] for row in rows})
        for kind in _kinds(rows):
            own = {step: [row for row in rows if row["kind"] == kind and row["step"] == step] for step in steps}
            rates += [_rate(chosen, seed=seed, step=step, kind=kind) for step, chosen in own.items()]
            if len(steps) > 1:
                changes.append(_change(own, seed=seed, kind=kind))
    margins = [
        margin
        for seed, rows in answers.items()
        for kind in _kinds(rows)
        for step in sorted({row["step"] for row in rows})
        if (margin := _margin(_at(rows, kind, step), seed=seed, step=step, kind=kind))
    ]
    early = [
        margin
        for kind in _kinds(before_alignment)
        if (margin := _margin(_at(before_alignment, kind, None), seed=None, step=None, kind=kind))
    ]
    unaligned = [
        _rate([row for row in before_alignment if row["kind"] == kind], seed=None, step=None, kind=kind)
        for kind in _kinds(before_alignment)
    ]
    return Behaviour(
        judge=judge,
        attack=attack,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
        rates=rates,
        perplexity=[
            Perplexity(seed=seed, step=step, value=value)
            for seed, by_step in perplexities.items()
            for step, value in by_step.items()
        ],
        before_alignment=unaligned or None,
        changes=changes,
        capability=capability or [],
        margins=margins,
        margins_before_alignment=early,
        margin_changes=[
            change for seed, rows in answers.items() for kind in _kinds(rows) if (change := _lost(rows, seed, kind))
        ],
    )


def _kinds(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))


def _at(rows: Rows, kind: str, step: int | None) -> Rows:
    return [row for row in rows if row["kind"] == kind and row["step"] == step]


def _margin(rows: Rows, *, seed: int | None, step: int | None, kind: str) -> MarginAt | None:
    """The mean margin of the prompts; None where older versions wrote none."""
    known = [float(row["margin"]) for row in rows if row.get("margin") is not None]
    if not known:
        return None
    found = mean_of(known)
    return MarginAt(seed=seed, step=step, kind=kind, mean=found.mean, low=found.low, high=found.high, n=found.n)


def _lost(rows: Rows, seed: int, kind: str) -> MarginChange | None:
    """The change of the margin on the prompts that the first and the last step both have."""
    steps = sorted({row["step"] for row in rows})
    first, last = (
        {row["id"]: float(row["margin"]) for row in _at(rows, kind, step) if row.get("margin") is not None}
        for step in (steps[0], steps[-1])
    )
    both = [last[identifier] - first[identifier] for identifier in first if identifier in last]
    if len(steps) < 2 or not both:
        return None
    found, (start, end) = mean_of(both), (steps[0], steps[-1])
    return MarginChange(
        seed=seed, kind=kind, from_step=start, to_step=end, change=found.mean, ci95=[found.low, found.high], n=found.n
    )


def _rate(rows: Rows, *, seed: int | None, step: int | None, kind: str) -> RefusalRate:
    flags = [bool(row["refused"]) for row in rows]
    own = refusal_rate(flags)
    over = category_interval(flags, [str(row.get("category") or "") for row in rows])
    return RefusalRate(
        seed=seed,
        step=step,
        kind=kind,
        rate=own.rate,
        low=own.low,
        high=own.high,
        refusals=own.refusals,
        n=own.n,
        category_low=over.low,
        category_high=over.high,
        categories=over.categories,
        category_reason=over.reason or None,
        coherent=sum(bool(row["coherent"]) for row in rows) / len(rows),
        success=sum(bool(row.get("success", not row["refused"])) for row in rows) / len(rows),
        undecided=sum(bool(row.get("undecided", False)) for row in rows),
        partial=sum(bool(row.get("partial", False)) for row in rows),
        max_new_tokens=max(int(row.get("max_new_tokens") or 0) for row in rows),
        whole=all(bool(row.get("whole", False)) for row in rows),
        short=_short_rate(rows),
    )


def _short_rate(rows: Rows) -> ShortRate:
    """The same answers judged by their beginnings, as long at every step."""
    alike = refusal_rate([bool(row.get("refused_short", row["refused"])) for row in rows])
    return ShortRate(rate=alike.rate, low=alike.low, high=alike.high)


def _change(rows: Mapping[int, Rows], *, seed: int, kind: str) -> RateChange:
    """From the first step to the last, on the prompts that both have."""
    first, last = min(rows), max(rows)
    ends = [{row["id"]: bool(row["refused"]) for row in rows[step]} for step in (first, last)]
    change = paired_change(*ends)
    return RateChange(
        seed=seed,
        kind=kind,
        from_step=first,
        to_step=last,
        from_rate=change.from_rate,
        to_rate=change.to_rate,
        difference=change.difference,
        p_mcnemar=change.p_mcnemar,
        n=change.n,
    )
