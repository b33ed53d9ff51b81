"""Every sentence that says what was found by the analysis, and of an association; of interventions: `report.causes`.

Words for the verdicts, numbers and weaknesses of `statistics`. A conclusion is a list of sentences
whose first is the answer; joined it is the paragraph that a reader takes away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import assert_never, cast

from neurondrift.base.roles import ALIGNMENT_GROUPS, CONTROLS
from neurondrift.report import wording
from neurondrift.report.findings.statistical import Analysis, WeaknessDetail
from neurondrift.statistics.results import Contrast, GroupEffect, RatioEffect, StudyResult, to_json
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
    not_comparable,
    weaknesses,
)

#: Fewer points than this say little about an association, whatever its size.
FEW_POINTS = 10


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
    """The answer first, and what it leaves open; then each group, the thirds, the other metrics, the contrasts, and
    what weakens it."""
    primary = [result.effect(group, result.primary_metric) for group in result.groups]
    about = [effect for effect in primary if effect.judging]
    about = about or [effect for effect in primary if effect.role == "safety"]
    about = about or [effect for effect in primary if effect.role not in CONTROLS] or primary
    also = [effect for effect in primary if effect.role == "safety" and effect not in about]
    first = [effect for effect in about if effect.group in ALIGNMENT_GROUPS]
    others = [effect for effect in about if effect not in first] if first else []
    said = _overall(first or about)
    if others:
        published = wording.published_words([effect.group for effect in others])
        said += f" By {published}: {_overall(others)}"
    sentences = [said, wording.LENGTHS_ALONE]
    sentences += [_effect_sentence(effect, result) for effect in (*about, *also)]
    sentences += [sentence for effect in about for sentence in _thirds(effect)]
    sentences += _other_metrics(about, result)
    sentences += [_contrast_sentence(c) for c in result.contrasts if c.metric == result.primary_metric]
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
            return f"strata leave |w| of {group} off by {difference:+.2f} SD: g is not adjusted for it, the ratio is"
        case FewSites(group=group, sites=sites):
            return f"{group} has compared members in {sites} sites only"
        case FailedControl(group=group, verdict=verdict):
            return (
                f"{group}, a negative control, {wording.moved(wording.VERDICTS[verdict])} comparable neurons: what "
                "else is found here may be as empty"
            )
        case FailedPositive(group=group, verdict=verdict):
            return (
                f"{group}, the positive control, was not found to move further ({wording.VERDICTS[verdict]}): the "
                "outcome is unfit for this run"
            )
        case MissedInjection(group=group, factor=factor):
            return (
                f"the drift of {group} times {factor:g} was not told from its own: a difference of that size would "
                "have been missed"
            )
        case NotComparable(group=group):
            return f"{group} is not comparable with the neurons outside it ({_why(weakness)}): its verdict is withheld"
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


def _why(weakness: NotComparable) -> str:
    return wording.why_not_comparable(
        weakness.because,
        worst=weakness.worst,
        difference=weakness.difference if math.isfinite(weakness.difference) else None,
        without_control=weakness.without_control,
        of_members=weakness.of_members,
    )


def _verdict(effect: RatioEffect) -> str:
    """The verdict of one comparison in words."""
    return wording.verdict(
        {
            "verdict": effect.verdict,
            "comparable": effect.comparable,
            "below_band": effect.below_band,
            "ratio": effect.ratio,
        }
    )


def _overall(effects: list[GroupEffect]) -> str:
    """The answer of the groups that judge; those without a counterfactual are named apart."""
    found = {effect.group: _verdict(effect.primary_effect) for effect in effects}
    alone = [group for group, words in found.items() if words == wording.NOT_COMPARABLE]
    judged = [group for group in found if group not in alone]
    withheld = f"{wording.listed(alone)} cannot be judged, for want of comparable neurons"
    if not judged:
        return f"Inconclusive: {withheld}."
    verdicts = list(dict.fromkeys(found[group] for group in judged))
    if len(verdicts) > 1:
        text = f"The groups differ, under this optimiser ({'; '.join(f'{g}: {found[g]}' for g in judged)})"
    elif verdicts == ["inconclusive"]:
        text = (
            f"Inconclusive: {wording.listed(judged)} cannot be told apart from comparable neurons, nor shown to move "
            "as far, under this optimiser"
        )
    else:
        text = f"Under this optimiser {wording.listed(judged)} {wording.moved(verdicts[0])} comparable neurons"
    text += f"; {withheld}" if alone else ""
    return f"{text}{'' if any(effect.judging for effect in effects) else ' (no group here is one that judges)'}."


def _effect_sentence(effect: GroupEffect, result: StudyResult) -> str:
    judged = effect.primary_effect
    name = effect.group if effect.judging else f"{effect.group} (which judges nothing)"
    if not math.isfinite(judged.log_ratio.se):
        return f"{name}: inconclusive, there is no interval ({judged.log_ratio.reason or wording.NO_REASON})."
    words = _verdict(judged)
    on = wording.listed(["site", *(wording.covariate(each.name) for each in judged.balance if each.gated)])
    seeds = wording.seeds_words(judged.log_ratio.seeds)
    text = (
        f"In {wording.metric_name(effect.metric)}, {name} {wording.moved(words)} comparable neurons "
        f"({_ratio(judged)}; {judged.n_compared:,} of {judged.n_members:,} members in {judged.sites} sites, {seeds}, "
        f"matched on {on}"
    )
    if not judged.comparable:
        text += f"; not comparable: {_why(not_comparable(effect.group, judged))}; the ratio is of unlike neurons"
    elif judged.verdict == "similar":
        low, high = judged.ratio_ci90
        text += (
            f"; 90 % interval {low:.2f} to {high:.2f}, within a factor of {result.band:g}, "
            f"p = {wording.probability(judged.p_equivalence)}"
        )
    elif judged.verdict == "inconclusive":
        text += f"; {_would_have_been_found(judged)}"
    else:
        text += (
            f"; wholly beyond a factor of {result.band:g}"
            if judged.beyond_band
            else f"; whether by more than a factor of {result.band:g} is open"
        )
        if math.isfinite(judged.p_holm):
            text += f"; Holm-adjusted p = {wording.probability(judged.p_holm)}"
            if judged.p_holm > 0.05:
                text += ", so weak: it does not survive the correction for multiple tests"
    return text.replace("= <", "< ") + ")." + _by_norm(effect)


def _ratio(effect: RatioEffect) -> str:
    low, high = effect.ratio_ci95
    return f"×{wording.ratio(effect.ratio)}, 95 % interval {wording.ratio(low)} to {wording.ratio(high)}"


def _would_have_been_found(effect: RatioEffect) -> str:
    if not math.isfinite(effect.smallest_more):
        return "what would have been found is not known"
    return f"a ratio of {wording.ratio(effect.smallest_more)} would be called further with 80 % power"


def _by_norm(effect: GroupEffect) -> str:
    """What the published comparison says, where it says something else than the one that judges."""
    norm = effect.effect_norm
    if effect.effect_matched is None or _verdict(norm) == _verdict(effect.effect_matched):
        return ""
    if not math.isfinite(norm.log_ratio.se):
        return " By site and row norm alone there is no interval."
    return f" By site and row norm alone, the published comparison: {_verdict(norm)} ({_ratio(norm)})."


def _thirds(effect: GroupEffect) -> list[str]:
    """Early and late layers apart."""
    known = [part for part in effect.by_layer_third if math.isfinite(part.ratio)]
    if len(known) < 2:
        return []
    each = []
    for part in known:
        low, high = part.ratio_ci95
        limits = f" ({wording.ratio(low)} to {wording.ratio(high)})" if math.isfinite(low + high) else ""
        each.append(f"{part.name} ×{wording.ratio(part.ratio)}{limits}")
    return [f"Early and late layers of {effect.group}: {', '.join(each)}."]


def _other_metrics(about: Sequence[GroupEffect], result: StudyResult) -> list[str]:
    """Whether the other metrics give the same verdicts; nothing where there is one metric."""
    other = [metric for metric in result.metrics if metric != result.primary_metric]
    differing = [
        f"{effect.group} in {wording.metric_name(metric)} ({_verdict(found.primary_effect)})"
        for effect in about
        for metric in other
        if (found := result.effect(effect.group, metric)).verdict != effect.verdict
    ]
    if differing:
        return [f"The verdict depends on the metric: {', '.join(differing)}."]
    named = wording.listed([wording.metric_name(metric) for metric in other])
    return [f"{wording.sentence_case(named)} give{'s' * (len(other) == 1)} the same verdict."] if other else []


def _contrast_sentence(contrast: Contrast) -> str:
    first, second = contrast.first, contrast.second
    if not all(map(math.isfinite, contrast.ratio_ci95)):
        return f"{first} and {second} cannot be compared."
    low, high = contrast.ratio_ci95
    shared = f", without the {contrast.shared:,} members that they share" if contrast.shared else ""
    words = {
        "more": "moved further than",
        "similar": "moved as far as",
        "protected": "moved less far than",
        "inconclusive": "cannot be told apart from, nor shown to move as far as,",
    }[contrast.verdict]
    if not contrast.comparable:
        words = "cannot be compared with"
    return (
        f"Each against its own controls{shared}, {first} {words} {second} "
        f"(×{wording.ratio(contrast.ratio)}, {wording.ratio(low)} to {wording.ratio(high)})."
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
