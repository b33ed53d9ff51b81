"""What the tables, the figures and the sentences ask of the findings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from neurondrift.base.roles import NEGATIVE_CONTROLS, POSITIVE_CONTROLS, Role, role_of_name
from neurondrift.report.findings.attribution import AttributionFindings, MarginAt, MarginChange
from neurondrift.report.findings.interventions import InterventionEffect, Interventions, NullMeasure
from neurondrift.report.findings.ratios import RatioEffect
from neurondrift.report.findings.statistical import (
    Analysis,
    Behaviour,
    Effect,
    Findings,
    Perplexity,
    RateChange,
    RefusalRate,
    StudyFacts,
    TrajectoryPoint,
)
from neurondrift.report.wording import KINDS, clean, finite, probability, role_of
from neurondrift.statistics.design.levels import ALPHA

#: How versions that recorded no kinds began the weakness that puts all else in doubt.
OLDER_NEGATIVE_CONTROL = "the random group, a negative control"
#: Kinds of weaknesses that come first, in this order: controls of known answer that failed.
FAILED = ("positive_control", "negative_control", "injected_control")
#: Kinds that weigh less where their group judges nothing.
OF_A_GROUP = ("not_comparable", "unmatched", "undefined_drift", "unbalanced", "few_sites")


def study_of(results: Findings) -> StudyFacts:
    """What was studied; empty where that was not recorded."""
    return results.get("study") or {}


def analysis_of(results: Findings) -> Analysis | None:
    """The analysis part; None where drift was not analysed."""
    return results.get("analysis")


def sentences_of(results: Findings) -> list[str]:
    """The conclusion of the analysis, the answer first; empty where drift was not analysed."""
    analysis = analysis_of(results)
    return conclusion_of(analysis) if analysis else []


def conclusion_of(part: Analysis | Interventions) -> list[str]:
    """The sentences that a part concludes with; of older versions, which kept no list, the paragraph as one."""
    return part.get("sentences") or [text for text in [part["conclusion"]] if text]


def weaknesses_of(results: Findings) -> tuple[str, ...]:
    """What weakens the conclusion; a control that fails comes first, as it puts all else in doubt, and last what is
    said of groups that judge nothing."""
    analysis = analysis_of(results)
    if analysis is None:
        return ()
    details = analysis.get("weakness_details", [])
    kinds = {detail["text"]: detail["kind"] for detail in details}
    judging = analysis.get("judging", [])
    aside = {d["text"] for d in details if d["kind"] in OF_A_GROUP and d["numbers"]["group"] not in judging}

    def place(text: str) -> int:
        if text.startswith(OLDER_NEGATIVE_CONTROL):
            return FAILED.index("negative_control")
        return FAILED.index(kinds[text]) if kinds.get(text) in FAILED else len(FAILED) + (text in aside)

    return tuple(clean(text) for text in sorted(analysis["weaknesses"], key=place))


def is_older(results: Findings) -> bool:
    """Whether the analysis is of a version that knew no ratios: its verdicts rested on g."""
    analysis = analysis_of(results)
    return analysis is not None and "band" not in analysis


def judged_by_matching(results: Findings) -> bool:
    """Whether covariates were balanced, so that the matched comparison judges; else that by site and norm does."""
    analysis = analysis_of(results)
    return analysis is not None and analysis.get("comparison_that_judges") == "matched"


def judged(effect: Effect) -> RatioEffect | None:
    """The ratio of the comparison that judges a group; None in findings of versions that knew none."""
    return effect.get("effect_matched") or effect.get("effect_norm")


def comparisons_of(effect: Effect) -> list[RatioEffect]:
    """The ratios of a group, that of the comparison that judges first."""
    return [found for found in (effect.get("effect_matched"), effect.get("effect_norm")) if found is not None]


def primary_of(results: Findings) -> str:
    """The primary metric."""
    analysis = analysis_of(results)
    return analysis["primary_metric"] if analysis else "relative"


def metrics_of(results: Findings) -> list[str]:
    """The analysed metrics, the primary one first."""
    analysis = analysis_of(results)
    return sorted(analysis["metrics"], key=lambda metric: metric != primary_of(results)) if analysis else []


def metrics_among(results: Findings, named: Iterable[str]) -> list[str]:
    """The metrics that are named, in the order of `metrics_of`, any others after them."""
    known = set(named)
    analysed = [metric for metric in metrics_of(results) if metric in known]
    return analysed + sorted(known - set(analysed))


def effects_of(results: Findings, metric: str | None = None) -> list[Effect]:
    """The effects in one metric (default: in all, primary metric first); safety groups first, random last."""
    analysis = analysis_of(results)
    if analysis is None:
        return []
    metrics = [metric] if metric is not None else metrics_of(results)
    chosen = [effect for name in metrics for effect in analysis["effects"] if effect["metric"] == name]
    order = group_order(results)
    return sorted(chosen, key=lambda e: (metrics.index(e["metric"]), *order(e["group"])))


class Roles(dict[str, Role | None]):
    """Group -> what it is to the study; of a group that the analysis does not hold, what its name tells of."""

    def __missing__(self, group: str) -> Role | None:
        return role_of_name(group)


def roles_of(results: Findings) -> Roles:
    """What each analysed group is to the study."""
    analysis = analysis_of(results)
    return Roles({effect["group"]: role_of(effect) for effect in (analysis["effects"] if analysis else [])})


def group_order(results: Findings) -> Callable[[str], tuple[bool, bool, bool, bool]]:
    """Sort key of groups (the sort is stable): those that judge first, then others that the question is about, then
    others, positive controls, negative controls."""
    roles, analysis = roles_of(results), analysis_of(results)
    judging = analysis.get("judging", []) if analysis else []
    return lambda group: (
        group not in judging,
        roles[group] != "safety",
        roles[group] in (*POSITIVE_CONTROLS, *NEGATIVE_CONTROLS),
        roles[group] in NEGATIVE_CONTROLS,
    )


def drawn_groups(results: Findings, groups: Iterable[str]) -> list[str]:
    """The groups that fit into a figure, in their order: of the negative controls the random group alone."""
    roles = roles_of(results)
    return [
        group
        for group in in_group_order(results, groups)
        if roles[group] not in NEGATIVE_CONTROLS or roles[group] == "random"
    ]


def in_group_order(results: Findings, groups: Iterable[str]) -> list[str]:
    """Every group once, in that order."""
    return sorted(dict.fromkeys(groups), key=group_order(results))


def trajectories_of(results: Findings, metric: str | None = None) -> list[TrajectoryPoint]:
    """Mean drift at the snapshots, in one metric (default: in all)."""
    points = results.get("trajectories") or []
    return [point for point in points if metric in (None, point["metric"])]


def behaviour_of(results: Findings) -> Behaviour | None:
    """The behaviour part; None where behaviour was not measured."""
    return results.get("behaviour")


def rates_of(results: Findings, seed: int | None = None, kind: str | None = None) -> list[RefusalRate]:
    """The measured rates of a seed and a kind of prompt, in the order of the steps."""
    chosen = [rate for rate in _rates(results) if seed in (None, rate["seed"]) and kind in (None, rate["kind"])]
    return sorted(chosen, key=lambda rate: rate["step"] or 0)


def rates_before_alignment(results: Findings) -> dict[str, RefusalRate]:
    """Kind of prompt -> its rate before the alignment; empty where there was none."""
    behaviour = behaviour_of(results)
    return {rate["kind"]: rate for rate in (behaviour["before_alignment"] or [])} if behaviour else {}


def behaviour_seeds(results: Findings) -> list[int | None]:
    """Seeds with measured behaviour, in their order."""
    return list(dict.fromkeys(rate["seed"] for rate in _rates(results)))


def kinds_of(results: Findings) -> list[str]:
    """The kinds of prompts measured, harmful first."""
    known = list(KINDS)
    return sorted(
        dict.fromkeys(rate["kind"] for rate in _rates(results)),
        key=lambda kind: known.index(kind) if kind in known else len(known),
    )


def perplexities_of(results: Findings) -> dict[tuple[int | None, int | None], Perplexity]:
    """Seed and step -> perplexity of held-out answers."""
    behaviour = behaviour_of(results)
    return {(value["seed"], value["step"]): value for value in behaviour["perplexity"]} if behaviour else {}


def changes_of(results: Findings) -> list[RateChange]:
    """The rates on the same prompts at the first and the last evaluated step."""
    behaviour = behaviour_of(results)
    return behaviour["changes"] if behaviour else []


def attribution_of(results: Findings) -> AttributionFindings | None:
    """What the change does; None where it was not measured."""
    return results.get("attribution")


def margins_of(results: Findings, seed: int | None) -> list[MarginAt]:
    """The margins of a seed in the order of the steps; None: those before the alignment."""
    behaviour = behaviour_of(results)
    if behaviour is None:
        return []
    if seed is None:
        return behaviour.get("margins_before_alignment", [])
    chosen = [margin for margin in behaviour.get("margins", []) if margin["seed"] == seed]
    return sorted(chosen, key=lambda margin: margin["step"] or 0)


def margin_changes_of(results: Findings) -> list[MarginChange]:
    """The margin of the same prompts at the first and the last evaluated step."""
    behaviour = behaviour_of(results)
    return behaviour.get("margin_changes", []) if behaviour else []


def _rates(results: Findings) -> list[RefusalRate]:
    behaviour = behaviour_of(results)
    return behaviour["rates"] if behaviour else []


def is_same_model(fingerprint: str, known: str | None) -> bool:
    """Whether figures of the model `fingerprint` stand beside findings of the model `known`; None: it is not known."""
    return known in (None, fingerprint)


def interventions_of(results: Findings) -> Interventions | None:
    """The interventions on the model of these findings; None where there are none, or those of another model."""
    interventions = results.get("interventions")
    known = study_of(results).get("model_fingerprint")
    return interventions if interventions and is_same_model(interventions["model_fingerprint"], known) else None


def whole_groups(interventions: Interventions) -> list[InterventionEffect]:
    """The interventions on whole groups."""
    return [effect for effect in interventions["effects"] if effect["dose"] == 1]


def planned_draws(effect: InterventionEffect) -> int:
    """How many random groups an intervention was to be compared with."""
    return effect.get("draws_planned", effect["draws"])


def is_stopped(effect: InterventionEffect) -> bool:
    """Whether fewer random groups were drawn than planned, as the comparison was settled."""
    return effect["draws"] < planned_draws(effect)


def draws_made(effect: InterventionEffect) -> str:
    """How many random groups there are, and of how many where they were stopped: 2 of 20."""
    return f"{effect['draws']} of {planned_draws(effect)}" if is_stopped(effect) else str(effect["draws"])


def p_of(effect: InterventionEffect, measure: NullMeasure) -> str:
    """The p-value of an intervention in words: p = 0.048; of a null that was stopped only that it is above 0.1."""
    if is_stopped(effect):
        return f"p > {2 * ALPHA:g}"
    value = finite(measure["p"])
    return "p undefined" if value is None else f"p = {probability(value)}"


def outcome_of(interventions: Mapping[str, Any]) -> str:
    """The primary outcome of interventions: `margin`, or `refusals`."""
    return str(interventions.get("outcome", "refusals"))


def has_outcome(interventions: Interventions, outcome: str) -> bool:
    """Whether an outcome was measured."""
    name = "margin" if outcome == "margin" else "harmful"
    return all(name in interventions["references"][end] for end in ("before", "after"))


def band_of(measure: NullMeasure) -> list[float | None]:
    """The range of the random groups."""
    return [measure["null_low"], measure["null_high"]]
