"""Every sentence that says what was found by the analysis, and of an association; of interventions: `report.causes`.

Words for the verdicts, numbers and weaknesses of `statistics`. A conclusion is a list of sentences
whose first is the answer; joined it is the paragraph that a reader takes away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import assert_never, cast

from neurondrift.base.roles import NEGATIVE_CONTROLS
from neurondrift.report.findings.statistical import Analysis, WeaknessDetail
from neurondrift.statistics.results import GroupEffect, StudyResult, Verdict, to_json
from neurondrift.statistics.weaknesses import (
    FailedControl,
    FailedPositive,
    FewSeeds,
    FewSites,
    MissedInjection,
    NotComparable,
    SharedNeurons,
    Unbalanced,
    UndefinedDrift,
    Unmatched,
    Weakness,
    weaknesses,
)

#: Fewer points than this say little about an association, whatever its size.
FEW_POINTS = 10

_SENTENCE = {
    "more": "drifted more than comparable neurons, as H1 (fragile safety) says",
    "similar": "drifted about as much as comparable neurons, as H2 (pathway creation) says",
    "protected": "drifted less than comparable neurons (protected), which neither H1 nor H2 says",
    "inconclusive": "cannot be told apart from comparable neurons, nor shown to be similar: inconclusive",
}


def analysis_findings(result: StudyResult) -> Analysis:
    """The JSON-safe mapping of a result (`to_json`), with its conclusion, weaknesses and statements in words."""
    encoded = to_json(result)
    weak = weaknesses(result)
    sentences = analysis_sentences(result)
    words = {
        "schema_version": encoded.pop("schema_version"),
        "conclusion": " ".join(sentences),
        "sentences": sentences,
        "weaknesses": [weakness_clause(weakness) for weakness in weak],
        "weakness_details": [_detail(weakness) for weakness in weak],
    }
    for association in encoded["associations"]:
        association["statement"] = " ".join(association_sentences(association["n_points"], association["n_seeds"]))
    return cast(Analysis, words | encoded)


def conclusion(result: StudyResult) -> str:
    """The overall paragraph: what the data support, how strongly, and what weakens it."""
    return " ".join(analysis_sentences(result))


def analysis_sentences(result: StudyResult) -> list[str]:
    """The answer first; then each group, the other metrics, the contrasts, and what weakens it."""
    primary = [result.effect(group, result.primary_metric) for group in result.groups]
    safety = [effect for effect in primary if effect.role == "safety"]
    about = safety or [effect for effect in primary if effect.role not in NEGATIVE_CONTROLS] or primary
    sentences = [_overall(about), *(_effect_sentence(effect, result) for effect in about)]
    sentences += _other_metrics(about, result)
    sentences += [
        _contrast_sentence(c.first, c.second, c.difference.value, c.difference.ci95, c.verdict)
        for c in result.contrasts
        if c.metric == result.primary_metric
    ]
    weak = [weakness_clause(weakness) for weakness in weaknesses(result)]
    if weak:
        sentences.append("What weakens this: " + "; ".join(weak) + ".")
    return sentences


def weakness_clause(weakness: Weakness) -> str:
    """One weakness in words, without a full stop."""
    match weakness:
        case FewSeeds():
            return _few_seeds(weakness.seeds)
        case Unmatched(group=group, members=members, strata=strata):
            return (
                f"{members} of {weakness.of_members} members of {group} have no control "
                f"({strata} of {weakness.of_strata} strata)"
            )
        case UndefinedDrift(group=group, members=members):
            return f"{members} members of {group} have no defined drift"
        case Unbalanced(group=group, difference=difference):
            return f"matching left |w| of {group} off by {difference:+.2f} SD"
        case FewSites(group=group, sites=sites):
            return f"{group} has matched members in {sites} sites only"
        case FailedControl(role=role, verdict=verdict):
            return f"the {role} group, a negative control, is found {verdict}"
        case FailedPositive(group=group, verdict=verdict):
            return f"{group}, a positive control, is found {verdict}: this outcome is unfit for this run"
        case MissedInjection(group=group, factor=factor):
            return f"the drift of {group}, multiplied by {factor:g}, was not found"
        case NotComparable(group=group, because=because):
            return f"{group} has no comparable neurons ({', '.join(because)})"
        case SharedNeurons(first=first, second=second, shared=shared, jaccard=jaccard):
            return f"{first} and {second} share {shared} neurons (Jaccard {jaccard:.2f})"
        case _:
            assert_never(weakness)


def _few_seeds(seeds: int) -> str:
    if seeds == 1:
        return (
            "one training seed: the interval covers sites, not run-to-run variation; "
            "another run may differ by more than the interval says"
        )
    if seeds == 2:
        return "two training seeds: too few to estimate run-to-run variation, which the interval leaves out"
    return f"{seeds} training seeds: run-to-run variation rests on {seeds - 1} degrees of freedom"


def _detail(weakness: Weakness) -> WeaknessDetail:
    numbers = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in dataclasses.asdict(weakness).items()
    }
    return {"kind": weakness.kind, "text": weakness_clause(weakness), "numbers": numbers}


def _overall(effects: list[GroupEffect]) -> str:
    names = " and ".join(effect.group for effect in effects)
    verdicts = {effect.verdict for effect in effects}
    if len(verdicts) > 1:
        return f"The groups disagree, so the data support neither hypothesis as a whole ({names})."
    verdict = verdicts.pop()
    support = {
        "more": "support H1 (fragile safety)",
        "similar": "support H2 (pathway creation)",
        "protected": "support neither H1 nor H2: the neurons are protected",
        "inconclusive": "cannot decide between H1 and H2",
    }[verdict]
    return f"The data {support}, judged by {names}."


def _effect_sentence(effect: GroupEffect, result: StudyResult) -> str:
    low, high = effect.g.ci95
    if not math.isfinite(effect.g.se):
        return f"{effect.group}: {_SENTENCE['inconclusive']} (no interval: {effect.g.reason})."
    text = (
        f"In {effect.metric} drift, {effect.group} {_SENTENCE[effect.verdict]} "
        f"(g = {effect.g.value:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}; {effect.g.n} neurons in "
        f"{effect.g.sites} sites, {effect.g.seeds} seed{'s' if effect.g.seeds > 1 else ''}"
    )
    if effect.verdict == "similar":
        text += f"; 90 % interval within {result.sesoi:g} of 0, p = {effect.p_equivalence:.2g}"
        if low > 0 or high < 0:
            text += "; a difference exists but is smaller than the smallest effect of interest"
    elif effect.verdict == "inconclusive":
        text += f"; an effect of {effect.detectable:.2f} would have been found with 80 % power"
    else:
        size = "small" if abs(effect.g.value) < 0.5 else "medium" if abs(effect.g.value) < 0.8 else "large"
        text += f"; {size}; Holm-adjusted p = {effect.p_holm:.2g}" if math.isfinite(effect.p_holm) else f"; {size}"
        if math.isfinite(effect.p_holm) and effect.p_holm > 0.05:
            text += ", so weak: it does not survive the correction for multiple tests"
    return text + ")."


def _other_metrics(about: Sequence[GroupEffect], result: StudyResult) -> list[str]:
    """Whether the other metrics give the same verdicts; nothing where there is one metric."""
    other = [metric for metric in result.metrics if metric != result.primary_metric]
    differing = [
        f"{effect.group} in {metric} ({result.effect(effect.group, metric).verdict})"
        for effect in about
        for metric in other
        if result.effect(effect.group, metric).verdict != effect.verdict
    ]
    if differing:
        return [f"The verdict depends on the metric: {', '.join(differing)}."]
    return [f"The metrics {', '.join(other)} give the same verdict."] if other else []


def _contrast_sentence(first: str, second: str, value: float, ci95: tuple[float, float], verdict: Verdict) -> str:
    if not all(map(math.isfinite, ci95)):
        return f"{first} and {second} cannot be compared."
    words = {
        "more": "moved more than",
        "similar": "moved about as much as",
        "protected": "moved less than",
        "inconclusive": "cannot be told apart from",
    }[verdict]
    return (
        f"Each against its own controls, {first} {words} {second} "
        f"(difference in g {value:+.2f}, {ci95[0]:+.2f} to {ci95[1]:+.2f})."
    )


def association_sentences(points: int, seeds: int) -> list[str]:
    """What an association of drift and lost refusals over `points` snapshots of `seeds` runs can and cannot show."""
    sentences = [
        f"{points} snapshots of {seeds} run{'s' if seeds != 1 else ''}.",
        "Drift and lost refusals both grow with training, so they correlate whatever the cause; compare a group with "
        "all neurons, and read no cause into it.",
    ]
    if points < FEW_POINTS:
        sentences.append(f"With {points} points even a perfect correlation says little.")
    if seeds < 3:
        sentences.append("Snapshots of one run are not independent: the p-value is a lower bound.")
    return sentences
