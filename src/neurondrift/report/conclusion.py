"""Every sentence that says what was found.

Words for the verdicts of `statistics`: the paragraph that a reader takes away, and what weakens it.
"""

from __future__ import annotations

import math
from typing import Any

from neurondrift.base.roles import NEGATIVE_CONTROLS
from neurondrift.statistics.results import GroupEffect, StudyResult, Verdict, to_json

#: Below this many sites an interval rests on few clusters.
FEW_SITES = 20
#: Standardised mean difference of |w| above which matching is incomplete (Stuart 2010).
UNBALANCED = 0.1
#: Share of members without a control, and Jaccard overlap of two groups, worth a warning.
MANY_UNMATCHED, MUCH_OVERLAP = 0.05, 0.1

_SENTENCE = {
    "more": "drifted more than comparable neurons, as H1 (fragile safety) says",
    "similar": "drifted about as much as comparable neurons, as H2 (pathway creation) says",
    "protected": "drifted less than comparable neurons (protected), which neither H1 nor H2 says",
    "inconclusive": "cannot be told apart from comparable neurons, nor shown to be similar: inconclusive",
}


def analysis_findings(result: StudyResult) -> dict[str, Any]:
    """The JSON-safe mapping of a result (`to_json`), with `conclusion` and `weaknesses` in words."""
    encoded = to_json(result)
    version = {"schema_version": encoded.pop("schema_version")}
    return version | {"conclusion": conclusion(result), "weaknesses": list(weaknesses(result))} | encoded


def conclusion(result: StudyResult) -> str:
    """The overall paragraph: what the data support, how strongly, and what weakens it."""
    primary = [result.effect(group, result.primary_metric) for group in result.groups]
    safety = [effect for effect in primary if effect.role == "safety"]
    about = safety or [effect for effect in primary if effect.role not in NEGATIVE_CONTROLS] or primary
    sentences = [_overall(about), *(_effect_sentence(effect, result) for effect in about)]
    other = [metric for metric in result.metrics if metric != result.primary_metric]
    differing = [
        f"{effect.group} in {metric} ({result.effect(effect.group, metric).verdict})"
        for effect in about
        for metric in other
        if result.effect(effect.group, metric).verdict != effect.verdict
    ]
    if differing:
        sentences.append(f"The verdict depends on the metric: {', '.join(differing)}.")
    elif other:
        sentences.append(f"The metrics {', '.join(other)} give the same verdict.")
    for contrast in result.contrasts:
        if contrast.metric == result.primary_metric:
            sentences.append(
                _contrast_sentence(
                    contrast.first,
                    contrast.second,
                    contrast.difference.value,
                    contrast.difference.ci95,
                    contrast.verdict,
                )
            )
    weak = weaknesses(result)
    if weak:
        sentences.append("What weakens this: " + "; ".join(weak) + ".")
    return " ".join(sentences)


def weaknesses(result: StudyResult) -> tuple[str, ...]:
    """What a careful reader would hold against the conclusion, one clause each."""
    out: list[str] = []
    seeds = len(result.seed_labels)
    if seeds == 1:
        out.append(
            "one training seed: the interval covers sites, not run-to-run variation; "
            "another run may differ by more than the interval says"
        )
    elif seeds == 2:
        out.append("two training seeds: too few to estimate run-to-run variation, which the interval leaves out")
    elif seeds < 6:
        out.append(f"{seeds} training seeds: run-to-run variation rests on {seeds - 1} degrees of freedom")
    for effect in (result.effect(group, result.primary_metric) for group in result.groups):
        if effect.matched.n_unmatched > MANY_UNMATCHED * effect.n_measured:
            out.append(
                f"{effect.matched.n_unmatched} of {effect.n_measured} members of {effect.group} have no control "
                f"({effect.matched.strata_unmatched} of {effect.matched.strata} strata)"
            )
        if effect.n_undefined:
            out.append(f"{effect.n_undefined} members of {effect.group} have no defined drift")
        if abs(effect.balance.after) > UNBALANCED:
            out.append(f"matching left |w| of {effect.group} off by {effect.balance.after:+.2f} SD")
        if effect.g.sites < FEW_SITES:
            out.append(f"{effect.group} has matched members in {effect.g.sites} sites only")
        if effect.role in NEGATIVE_CONTROLS and effect.verdict in ("more", "protected"):
            out.append(f"the {effect.role} group, a negative control, is found {effect.verdict}")
    for overlap in result.overlaps:
        roles = {result.effect(group, result.primary_metric).role for group in (overlap.first, overlap.second)}
        if overlap.jaccard > MUCH_OVERLAP and roles.isdisjoint(NEGATIVE_CONTROLS):
            out.append(
                f"{overlap.first} and {overlap.second} share {overlap.shared} neurons (Jaccard {overlap.jaccard:.2f})"
            )
    return tuple(out)


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
