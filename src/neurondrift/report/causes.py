"""Every sentence that says what interventions on a group showed, and whether its change is a cause of the loss.

Words for the numbers and verdicts of `interventions.outcomes`; the first sentence is what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neurondrift.report import wording
from neurondrift.report.findings.interventions import (
    CauseFound,
    InterventionEffect,
    NullMeasure,
    Reference,
    References,
    SmallestFound,
)
from neurondrift.report.reading import is_stopped, p_of, planned_draws
from neurondrift.report.wording import finite, is_safety
from neurondrift.statistics.design.levels import ALPHA, POWER

#: How versions that judged no standing are read: their verdicts stood on p alone.
OLDER_SMALLEST = 0.1


def intervention_findings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `interventions.outcomes.summarise` gives, with its conclusion in words."""
    sentences = intervention_sentences(summary)
    return {**summary, "conclusion": " ".join(sentences), "sentences": sentences}


def intervention_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was lost; then for each safety group what pruning, undoing, transplanting and holding it did to refusals,
    and whether its change is a cause. Nothing where no whole group was acted on."""
    effects: Sequence[InterventionEffect] = summary["effects"]
    references: References = summary["references"]
    causes: Sequence[CauseFound] = summary["causes"]
    whole = [effect for effect in effects if effect["dose"] == 1]
    about = [effect for effect in whole if is_safety(effect)] or whole
    if not about:
        return []
    tests = int(summary.get("holm_tests", len(whole)))
    smallest = float(summary.get("smallest_effect", OLDER_SMALLEST))
    before, after = (_known(references[name]["harmful"]["rate"]) for name in ("before", "after"))
    sentences = [_loss_sentence(references)]
    for group in dict.fromkeys(effect["group"] for effect in about):
        own = {effect["intervention"]: effect for effect in about if effect["group"] == group}
        sentences += _left_out(next(iter(own.values())))
        sentences += [_intervention_sentence(effect, lost=before - after, tests=tests) for effect in own.values()]
        sentences += [
            _cause_sentence(cause, own, tests=tests, smallest=smallest) for cause in causes if cause["group"] == group
        ]
    return sentences


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _loss_sentence(references: References) -> str:
    ends = references["before"], references["after"]
    before, after = (_known(end["harmful"]["rate"]) for end in ends)
    asked = ends[1]["harmful"].get("asked", ends[1]["harmful"]["n"])
    text = (
        f"On the {asked} harmful requests asked here, fine-tuning took the share refused of coherent answers from "
        f"{before:.2f} to {after:.2f}"
    )
    not_counted = [_not_counted(end) for end in ends]
    if any(not_counted):
        text += f" ({not_counted[0]} answers before and {not_counted[1]} after are incoherent or undecided)"
    if math.isnan(before - after):
        return f"{text}: without answers that can be read there is no loss to explain."
    return f"{text}." if before > after else f"{text}: none were lost, so that there is no loss to explain."


def _not_counted(reference: Reference) -> int:
    harmful = reference["harmful"]
    return harmful.get("incoherent", 0) + harmful.get("undecided", 0)


def _left_out(effect: InterventionEffect) -> list[str]:
    """The members that are in neither the group's interventions nor the random groups'."""
    support = effect.get("support")
    if support is None or not support["left_out"]:
        return []
    return [
        f"Of the {support['members']:,} members of {effect['group']}, {support['left_out']:,} in "
        f"{support['sites_left_out']} of {support['sites']} sites have no comparable neurons and are left out of all "
        "that follows."
    ]


def _intervention_sentence(effect: InterventionEffect, *, lost: float, tests: int) -> str:
    group, measure = effect["group"], effect["measures"]["harmful"]
    acts = {
        "prune": f"Pruning {group} before fine-tuning",
        "rewind": f"Undoing only the change of {group}",
        "transplant": f"Putting only the change of {group} into the model from before",
        "freeze": f"Holding only {group} during training",
    }[effect["intervention"]]
    if is_stopped(effect):
        return f"{acts}: {p_of(effect, measure)}, stopped after {effect['draws']} of {planned_draws(effect)} draws."
    value = finite(measure["value"])
    if value is None:
        return f"{acts} leaves no answer that can be read."
    if effect["intervention"] == "prune":
        text = f"{acts} leaves refusals at {value:.2f} ({_beside(effect, _rate(measure), tests)})"
        return text + _what_else_broke(effect["measures"].get("answers")) + _standing_of_pruned(effect) + "."
    if not lost > 0:
        return f"{acts} gives refusals of {value:.2f} ({_beside(effect, _rate(measure), tests)})."
    share = _share(effect["share"]["group"])
    does = {"rewind": f"brings {share} of the lost refusals back", "transplant": f"loses {share} of them"}.get(
        effect["intervention"], f"keeps {share} of them"
    )
    return f"{acts} {does} ({_beside(effect, _share(effect['share']['null']), tests)}){_specific(effect)}."


def _rate(measure: NullMeasure) -> str:
    return f"{_known(measure['null_mean']):.2f}"


def _what_else_broke(answers: NullMeasure | None) -> str:
    """How well a pruned model still writes: one that no longer can does not refuse either."""
    after, by_chance = (finite(answers.get(name)) if answers else None for name in ("perplexity", "null_perplexity"))
    if after is None or by_chance is None:
        return ""
    return f", and the perplexity of ordinary answers at {after:,.0f} (random groups {by_chance:,.0f})"


def _standing_of_pruned(effect: InterventionEffect) -> str:
    """Whether a pruned group stands out; else what would have."""
    found = effect.get("found")
    match effect.get("standing"):
        case "stands_out":
            return "; it stands out among as many comparable neurons"
        case "opposite":
            return "; it stands out among as many comparable neurons, in the other direction"
        case "small" | "not" if found is not None:
            return f"; it does not stand out among as many comparable neurons: {_could_have_found(found, 'refusals')}"
    return ""


def _beside(effect: InterventionEffect, null: str, tests: int) -> str:
    """What the random groups gave, and how far apart they and the group are."""
    measure = effect["measures"]["harmful"]
    text = f"matched random groups {null}; {p_of(effect, measure)}"
    p_holm = finite(measure.get("p_holm"))
    if tests > 1 and p_holm is not None:
        text += f", corrected for {tests} tests {wording.probability(p_holm)}"
    return f"{text}, {effect['draws']} draws"


def _specific(effect: InterventionEffect) -> str:
    """The difference between harmful and ordinary prompts: what raises both is no return of refusals."""
    difference = effect.get("harmful_minus_ordinary")
    own, null = (finite(difference[name]) if difference else None for name in ("value", "null_mean"))
    if own is None or null is None:
        return ""
    return f", harmful minus ordinary requests {wording.effect(own)} (random groups {wording.effect(null)})"


def _share(value: float | None) -> str:
    return f"{round(_known(value), 2) + 0.0:.2f}"  # never "-0.00"


def _cause_sentence(cause: CauseFound, own: Mapping[str, InterventionEffect], *, tests: int, smallest: float) -> str:
    group, named = cause["group"], ", ".join(cause["interventions"])
    found = [own[name].get("found") for name in cause["interventions"] if name in own]
    match cause["verdict"]:
        case "cause":
            return (
                f"So the change of {group} is a cause of the loss: it stands out among as many comparable neurons, by "
                f"more than {smallest:g} of refusals ({named})."
            )
        case "against":
            return f"So the change of {group} worked against the loss ({named}), and is not its cause."
        case "too_few_draws":
            return f"Too few draws to call anything a cause for {group}{_draws_that_would_do(found, tests)}."
        case "no_evidence":
            return (
                f"So there is no evidence that the change of {group}, more than that of as many comparable neurons, is "
                f"a cause of the loss ({named}){_best(found)}."
            )


def _best(found: Sequence[SmallestFound | None]) -> str:
    """What the most sensitive of the designs could have found; nothing where all were stopped, or none is recorded."""
    known = [each for each in found if each is not None and each["reason"] in ("", "not_even_all")]
    if not known:
        return ""
    return f": {_could_have_found(min(known, key=_least), 'loss')}"


def _least(found: SmallestFound) -> float:
    """The share that a group must carry, for the order; those that no group can reach come last."""
    share = finite(found["share"])
    return math.inf if share is None else share


def _could_have_found(found: SmallestFound, what: str) -> str:
    power = f"with {100 * POWER:.0f} % power"
    share = finite(found["share"])
    if found["reason"] == "too_few_draws" and share is not None:
        return (
            f"{found['draws']} draws are needed, with which a group that carries {_percent(share)} % or more of the "
            f"{what} would stand out {power}"
        )
    if share is not None:
        return f"a group that carries {_percent(share)} % or more of the {what} would have stood out {power}"
    if found["reason"] == "not_even_all":
        return f"not even a group that carries all of the {what} would have stood out {power}"
    return "what this design could have found is not known"


def _percent(share: float) -> int:
    """Rounded up, so that no more is promised than holds."""
    return math.ceil(100 * share - 1e-9)


def _draws_that_would_do(found: Sequence[SmallestFound | None], tests: int) -> str:
    known = [each for each in found if each is not None and each["reason"] != "stopped"]
    if not known:
        return f": p cannot reach {ALPHA}"
    text = f": no p-value can be {ALPHA} or less after correction for {tests} test{'s' if tests > 1 else ''}"
    able = [each for each in known if finite(each["share"]) is not None]
    if able:
        return f"{text}; {_could_have_found(min(able, key=_least), 'loss')}"
    text += f"; {min(each['draws'] for each in known)} draws are needed"
    if all(each["reason"] == "not_even_all" for each in known):
        text += ", and even with those a group that carries all of the loss would not stand out"
    return text
