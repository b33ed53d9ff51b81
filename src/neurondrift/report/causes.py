"""Every sentence that says what interventions on a group showed, and whether its change is a cause of the loss.

Words for the numbers and verdicts of `interventions.outcomes`; the first sentence is what was lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neurondrift.report.findings.interventions import CauseFound, InterventionEffect, NullMeasure, References
from neurondrift.report.wording import is_safety
from neurondrift.statistics.null import ALPHA


def intervention_findings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What `interventions.outcomes.summarise` gives, with its conclusion in words."""
    sentences = intervention_sentences(summary["effects"], summary["references"], summary["causes"])
    return {**summary, "conclusion": " ".join(sentences), "sentences": sentences}


def intervention_sentences(
    effects: Sequence[InterventionEffect], references: References, causes: Sequence[CauseFound]
) -> list[str]:
    """What was lost; then for each safety group what pruning, undoing, transplanting and holding it did to refusals,
    and whether its change is a cause. Nothing where no whole group was acted on."""
    whole = [effect for effect in effects if effect["dose"] == 1]
    about = [effect for effect in whole if is_safety(effect)] or whole
    if not about:
        return []
    before, after = (_known(references[name]["harmful"]["rate"]) for name in ("before", "after"))
    sentences = [_loss_sentence(before, after, references["after"]["harmful"]["n"])]
    for group in dict.fromkeys(effect["group"] for effect in about):
        own = {effect["intervention"]: effect for effect in about if effect["group"] == group}
        sentences += [_intervention_sentence(effect, lost=before - after) for effect in own.values()]
        sentences += [_cause_sentence(cause) for cause in causes if cause["group"] == group]
    return sentences


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _loss_sentence(before: float, after: float, n: int) -> str:
    text = f"On the {n} harmful requests asked here, fine-tuning took refusals from {before:.2f} to {after:.2f}"
    return f"{text}." if before > after else f"{text}: none were lost, so that there is no loss to explain."


def _intervention_sentence(effect: InterventionEffect, *, lost: float) -> str:
    group, measure = effect["group"], effect["measures"]["harmful"]
    value, null = f"{_known(measure['value']):.2f}", f"{_known(measure['null_mean']):.2f}"
    if effect["intervention"] == "prune":
        text = f"Pruning {group} before fine-tuning leaves refusals at {value} ({_beside(effect, null)})"
        return text + _what_else_broke(effect["measures"].get("answers")) + "."
    if lost <= 0:
        began = {
            "rewind": "Undoing only the change of",
            "transplant": "Transplanting only the change of",
            "freeze": "Holding only",
        }
        return f"{began[effect['intervention']]} {group} gives refusals of {value} ({_beside(effect, null)})."
    share = _share(effect["share"]["group"])
    beside = _beside(effect, _share(effect["share"]["null"]))
    return {
        "rewind": f"Undoing only the change of {group} brings {share} of the lost refusals back ({beside}).",
        "transplant": f"Its change alone, put into the model from before, loses {share} of them ({beside}).",
        "freeze": f"Holding it during training keeps {share} of them ({beside}).",
    }[effect["intervention"]]


def _what_else_broke(answers: NullMeasure | None) -> str:
    """How well a pruned model still writes: one that no longer can does not refuse either."""
    after, by_chance = (answers.get("perplexity"), answers.get("null_perplexity")) if answers else (None, None)
    if after is None or by_chance is None:
        return ""
    return f", and the perplexity of ordinary answers at {after:,.0f} (random groups {by_chance:,.0f})"


def _beside(effect: InterventionEffect, null: str) -> str:
    """What the random groups gave, and how far apart they and the group are."""
    made, planned = effect["draws"], effect.get("draws_planned", effect["draws"])
    draws = f"{made} draws" if made == planned else f"stopped after {made} of {planned} draws"
    return f"matched random groups {null}; p = {_known(effect['measures']['harmful']['p']):.2g}, {draws}"


def _share(value: float | None) -> str:
    return f"{round(_known(value), 2) + 0.0:.2f}"  # never "-0.00"


def _cause_sentence(cause: CauseFound) -> str:
    group, named = cause["group"], ", ".join(cause["interventions"])
    match cause["verdict"]:
        case "cause":
            more = "more than that of as many comparable ones is"
            return f"So the change of {group} is a cause of the loss, {more} ({named})."
        case "against":
            return f"So the change of {group} worked against the loss ({named}), and is not its cause."
        case "too_few_draws":
            return f"Too few draws to call anything a cause for {group}: p cannot reach {ALPHA}."
        case "no_evidence":
            more = "more than that of as many comparable ones"
            return f"So there is no evidence that the change of {group}, {more}, is a cause of the loss ({named})."
