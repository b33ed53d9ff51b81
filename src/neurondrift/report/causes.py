"""Every sentence that says what interventions on a group showed, and whether its change is a cause of the loss.

Words for the numbers and verdicts of `interventions.outcomes`; the first sentence is what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neurondrift.base.roles import TAKING
from neurondrift.report import wording
from neurondrift.report.findings.interventions import (
    CauseFound,
    InterventionEffect,
    NullMeasure,
    Reference,
    References,
    ShareOfChange,
    SmallestFound,
)
from neurondrift.report.reading import is_stopped, outcome_of, p_of, planned_draws
from neurondrift.report.wording import finite, is_safety
from neurondrift.statistics.design.levels import ALPHA, POWER

#: How versions that judged no standing are read: their verdicts stood on p alone.
OLDER_SMALLEST = 0.1


def intervention_findings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `interventions.outcomes.summarise` gives, with its conclusion in words."""
    sentences = intervention_sentences(summary)
    return {**summary, "conclusion": " ".join(sentences), "sentences": sentences}


def intervention_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What was lost; then for each safety group what pruning, undoing, transplanting, patching and holding it did to
    the primary outcome (and to refusals, where they are the other one), and whether its change is a cause. Nothing
    where no whole group was acted on."""
    effects: Sequence[InterventionEffect] = summary["effects"]
    references: References = summary["references"]
    causes: Sequence[CauseFound] = summary["causes"]
    whole = [effect for effect in effects if effect["dose"] == 1]
    about = [effect for effect in whole if is_safety(effect)] or whole
    if not about:
        return []
    outcome = OUTCOMES[outcome_of(summary)]
    tests = int(summary.get("holm_tests", len(whole)))
    smallest = float(summary.get(outcome.smallest, OLDER_SMALLEST))
    before, after = (_reference(references[name], outcome) for name in ("before", "after"))
    sentences = [_loss_sentence(references, outcome)]
    for group in dict.fromkeys(effect["group"] for effect in about):
        own = {effect["intervention"]: effect for effect in about if effect["group"] == group}
        sentences += _left_out(next(iter(own.values())))
        sentences += [
            _intervention_sentence(effect, outcome, lost=before - after, tests=tests) for effect in own.values()
        ]
        sentences += [
            _cause_sentence(cause, own, outcome, tests=tests, smallest=smallest)
            for cause in causes
            if cause["group"] == group
        ]
    return sentences


class Words(NamedTuple):
    """How an outcome is spoken of, and where it stands in the findings."""

    measure: str
    share: str
    difference: str
    smallest: str
    carried: str  # what a group carries that something is taken from
    does: Mapping[str, str]
    cause: str


OUTCOMES = {
    "margin": Words(
        measure="margin_harmful",
        share="margin_share",
        difference="margin_harmful_minus_ordinary",
        smallest="smallest_margin",
        carried="margin that fine-tuning took",
        does={
            "prune": "takes {share} as much margin as fine-tuning did",
            "unalign": "takes {share} as much margin as fine-tuning did",
            "rewind": "brings {share} of the lost margin back",
            "transplant": "loses {share} of it",
            "patch": "brings {share} of the lost margin back",
            "patch_back": "loses {share} of it",
            "freeze": "keeps {share} of it",
        },
        cause="the lost margin",
    ),
    "refusals": Words(
        measure="harmful",
        share="share",
        difference="harmful_minus_ordinary",
        smallest="smallest_effect",
        carried="refusals",
        does={
            "rewind": "brings {share} of the lost refusals back",
            "transplant": "loses {share} of them",
            "patch": "brings {share} of the lost refusals back",
            "patch_back": "loses {share} of them",
            "freeze": "keeps {share} of them",
        },
        cause="refusals",
    ),
}
ACTS = {
    "prune": "Pruning {group} before fine-tuning",
    "unalign": "Undoing only the alignment of {group} before fine-tuning",
    "rewind": "Undoing only the change of {group}",
    "transplant": "Putting only the change of {group} into the model from before",
    "patch": "Giving only {group} back its outputs from before",
    "patch_back": "Giving only {group} in the model from before its outputs of after",
    "freeze": "Holding only {group} during training",
}


def _reference(reference: Reference, outcome: Words) -> float:
    if outcome.measure == "harmful":
        return _known(reference["harmful"]["rate"])
    return _known(reference["margin"]["harmful"])


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _loss_sentence(references: References, outcome: Words) -> str:
    ends = references["before"], references["after"]
    before, after = (_reference(end, outcome) for end in ends)
    if outcome.measure != "harmful":
        text = (
            f"On the {ends[1]['margin']['n']} harmful requests asked here, fine-tuning took the refusal margin from "
            f"{before:+.2f} to {after:+.2f} nats"
        )
        if "harmful" in ends[0] and "harmful" in ends[1]:
            rates = [_known(end["harmful"]["rate"]) for end in ends]
            text += f", and the share refused of coherent answers from {rates[0]:.2f} to {rates[1]:.2f}"
        return f"{text}." if before > after else f"{text}: no margin was lost, so that there is no loss to explain."
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


def _intervention_sentence(effect: InterventionEffect, outcome: Words, *, lost: float, tests: int) -> str:
    intervention = effect["intervention"]
    measure: NullMeasure = effect["measures"][outcome.measure]  # type: ignore[literal-required]
    acts = ACTS[intervention].format(group=effect["group"])
    if is_stopped(effect):
        return f"{acts}: {p_of(effect, measure)}, stopped after {effect['draws']} of {planned_draws(effect)} draws."
    value = finite(measure["value"])
    if value is None:
        return f"{acts} leaves no answer that can be read."
    is_margin = outcome.measure != "harmful"
    if intervention in TAKING and not (is_margin and lost > 0):
        number = f"the margin at {value:+.2f} nats" if is_margin else f"refusals at {value:.2f}"
        text = f"{acts} leaves {number} ({_beside(effect, measure, _mean(measure, is_margin), tests)})"
        return text + _what_else_broke(effect) + _standing_of_pruned(effect, outcome) + "."
    if not lost > 0:
        number = f"a margin of {value:+.2f} nats" if is_margin else f"refusals of {value:.2f}"
        return f"{acts} gives {number} ({_beside(effect, measure, _mean(measure, is_margin), tests)})."
    found: ShareOfChange = effect[outcome.share]  # type: ignore[literal-required]
    does = outcome.does[intervention].format(share=_share(found["group"]))
    text = f"{acts} {does} ({_beside(effect, measure, _share(found['null']), tests)})"
    if intervention in TAKING:
        return text + _what_else_broke(effect) + _standing_of_pruned(effect, outcome) + "."
    return f"{text}{_specific(effect, outcome)}{_other_outcome(effect, outcome)}{_passes_on(effect)}."


def _passes_on(effect: InterventionEffect) -> str:
    """What patching shows where a group stands out: outputs, whatever has changed them."""
    if effect["intervention"] not in ("patch", "patch_back") or effect.get("standing") != "stands_out":
        return ""
    return "; so the loss passes through its outputs, more than through those of as many comparable neurons"


def _mean(measure: NullMeasure, is_margin: bool) -> str:
    mean = _known(measure["null_mean"])
    return f"{mean:+.2f}" if is_margin else f"{mean:.2f}"


def _other_outcome(effect: InterventionEffect, outcome: Words) -> str:
    """What became of refusals, where the margin is the primary outcome."""
    share = effect.get("share") if outcome.measure != "harmful" else None
    own, null = (finite(share[name]) if share else None for name in ("group", "null"))
    if own is None:
        return ""
    return f"; of the refusals {_share(own)} (random groups {_share(null)})"


def _what_else_broke(effect: InterventionEffect) -> str:
    """How well a pruned model still writes: one that no longer can does not refuse either."""
    answers = effect["measures"].get("answers")
    after, by_chance = (finite(answers.get(name)) if answers else None for name in ("perplexity", "null_perplexity"))
    if after is None:
        return ""
    beside = "" if by_chance is None else f" (random groups {by_chance:,.0f})"
    return f", and the perplexity of ordinary answers at {after:,.0f}{beside}"


def _standing_of_pruned(effect: InterventionEffect, outcome: Words) -> str:
    """Whether a pruned group stands out; else what would have."""
    found = effect.get("found")
    match effect.get("standing"):
        case "stands_out":
            return "; it stands out among as many comparable neurons"
        case "opposite":
            return "; it stands out among as many comparable neurons, in the other direction"
        case "small" | "not" if found is not None:
            return (
                f"; it does not stand out among as many comparable neurons: {_could_have_found(found, outcome.carried)}"
            )
    return ""


def _beside(effect: InterventionEffect, measure: NullMeasure, null: str, tests: int) -> str:
    """What the random groups gave, and how far apart they and the group are."""
    text = f"matched random groups {null}; {p_of(effect, measure)}"
    p_holm = finite(measure.get("p_holm"))
    if tests > 1 and p_holm is not None:
        text += f", corrected for {tests} tests {wording.probability(p_holm)}"
    return f"{text}, {effect['draws']} draws"


def _specific(effect: InterventionEffect, outcome: Words) -> str:
    """The difference between harmful and ordinary prompts: what raises both is no return of refusals."""
    difference: NullMeasure | None = effect.get(outcome.difference)  # type: ignore[assignment]
    own, null = (finite(difference[name]) if difference else None for name in ("value", "null_mean"))
    if own is None or null is None:
        return ""
    return f", harmful minus ordinary requests {wording.effect(own)} (random groups {wording.effect(null)})"


def _share(value: float | None) -> str:
    return f"{round(_known(value), 2) + 0.0:.2f}"  # never "-0.00"


def _cause_sentence(
    cause: CauseFound, own: Mapping[str, InterventionEffect], outcome: Words, *, tests: int, smallest: float
) -> str:
    group, named = cause["group"], ", ".join(cause["interventions"])
    found = [own[name].get("found") for name in cause["interventions"] if name in own]
    match cause["verdict"]:
        case "cause":
            return (
                f"So the change of {group} is a cause of the loss: it stands out among as many comparable neurons, by "
                f"more than {smallest:g} of {outcome.cause} ({named})."
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
