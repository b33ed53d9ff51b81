"""From the runs to `results/interventions.json`: each group beside its null, and the sentences that say what it means.

Owns the layout of that file (docs/results.md). The statistics are those of `statistics.null`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neurondrift.base.errors import ArtifactError
from neurondrift.base.roles import role_of_name
from neurondrift.behaviour.rates import refusal_rate
from neurondrift.interventions.trials import REFERENCES, Cell, Label, Rows
from neurondrift.statistics.null import ALPHA, compare_with_null, share_of_change

SCHEMA_VERSION = 1
MEASURES = {"harmful": "refused", "ordinary": "refused", "answers": "loss"}


def summarise(
    results: Mapping[Label, Rows], planned: Mapping[Cell, int], *, resamples: int = 2000, rng_seed: int = 0
) -> dict[str, Any]:
    """References, effects and conclusion.

    Parameters
    ----------
    results
        From `run_trials`; it holds both references.
    planned
        From `planned_draws`: a null with fewer results was stopped early.
    resamples, rng_seed
        Of the bootstrap over prompts and draws.

    Returns
    -------
    dict
        `references`: before and after fine-tuning; `effects`: one a group, intervention and dose, each with its
        `measures` (harmful and ordinary: share refused; answers: mean loss per token, with perplexities beside it);
        `tests`: how many p-values there are at dose 1; `conclusion`.
    """
    references = {name: _reference(results[name, "", 1.0, None]) for name in REFERENCES}
    cells = list(dict.fromkeys(label[:3] for label in results if label[0] not in REFERENCES))
    effects = [_effect(results, cell, planned[cell], references, resamples, rng_seed) for cell in cells]
    tests = sum(len(effect["measures"]) for effect in effects if effect["dose"] == 1)
    return {
        "references": references,
        "effects": effects,
        "tests": tests,
        "conclusion": conclusion(effects, references),
    }


def _reference(rows: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in ("harmful", "ordinary"):
        flags = [bool(row["refused"]) for row in rows if row["kind"] == kind]
        if flags:
            found[kind] = refusal_rate(flags)._asdict()
    losses, tokens = _outcome(rows, "answers")
    if len(losses):
        found["answers"] = {"loss": float(np.average(losses, weights=tokens)), "n": len(losses)}
        found["answers"]["perplexity"] = math.exp(found["answers"]["loss"])
    return found


def _outcome(rows: Rows, kind: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Outcome and weight of each prompt of a kind, in the order of the run."""
    own = [row for row in rows if row["kind"] == kind]
    values = np.array([float(row[MEASURES[kind]]) for row in own])
    return values, np.array([float(row["tokens"] or 1) for row in own])


def _effect(
    results: Mapping[Label, Rows],
    cell: Cell,
    planned: int,
    references: Mapping[str, Any],
    resamples: int,
    rng_seed: int,
) -> dict[str, Any]:
    intervention, group, dose = cell
    own = results[intervention, group, dose, None]
    null = [rows for label, rows in results.items() if label[:3] == cell and label[3] is not None]
    measures = {}
    for kind in dict.fromkeys(row["kind"] for row in own):
        values, weights = _outcome(own, kind)
        ids = [row["id"] for row in own if row["kind"] == kind]
        for rows in null:
            if [row["id"] for row in rows if row["kind"] == kind] != ids:
                raise ArtifactError("The runs asked different prompts", fix="delete results/interventions.parquet")
        draws = [_outcome(rows, kind)[0] for rows in null]
        found = compare_with_null(
            values,
            draws,
            # Refusals of harmful requests decided whether to stop; the other measures have the draws that were made.
            planned=planned if kind == "harmful" else None,
            weights_P=weights,
            resamples=resamples,
            rng_seed=rng_seed,
        )
        measures[kind] = found._asdict() | {"ci95": list(found.ci95)}
        if kind == "answers":
            measures[kind]["perplexity"] = math.exp(found.value)
            measures[kind]["null_perplexity"] = math.exp(found.null_mean)
    entry = {
        "intervention": intervention,
        "group": group,
        "granularity": own[0]["granularity"],
        "dose": dose,
        "members": own[0]["members"],
        "acted_on": own[0]["acted_on"],
        "outside": own[0]["outside"],
        "draws": len(null),
        "draws_planned": planned,
        "stopped_early": len(null) < planned,
        "measures": measures,
    }
    before, after = (references[name]["harmful"]["rate"] for name in REFERENCES)
    start, end = {"prune": (before, 0.0), "transplant": (before, after)}.get(intervention, (after, before))
    share = share_of_change(measures["harmful"]["value"], measures["harmful"]["null_mean"], start, end)
    entry["share"] = {"of": _SHARES[intervention], "group": share.group, "null": share.null}
    return entry


#: What the share of an intervention says: 1 is all of it.
_SHARES = {
    "prune": "refusals of the model before fine-tuning that are gone",
    "rewind": "lost refusals that are back",
    "transplant": "lost refusals that this change alone loses",
    "freeze": "lost refusals that were kept",
}


def conclusion(effects: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> str:
    """The paragraph on cause: what pruning, undoing, transplanting and holding each safety group did to refusals."""
    whole = [effect for effect in effects if effect["dose"] == 1]
    safety = [effect for effect in whole if role_of_name(effect["group"]) == "safety"] or whole
    if not safety:
        return ""
    before, after = (references[name]["harmful"]["rate"] for name in REFERENCES)
    sentences = [_loss_sentence(before, after, references["after"]["harmful"]["n"])]
    for group in dict.fromkeys(effect["group"] for effect in safety):
        own = {effect["intervention"]: effect for effect in safety if effect["group"] == group}
        sentences += [_sentence(effect, lost=before - after) for effect in own.values()]
        sentences.append(_verdict(group, own, lost=before - after))
    return " ".join(sentences)


def _loss_sentence(before: float, after: float, n: int) -> str:
    text = f"On the {n} harmful requests asked here, fine-tuning took refusals from {before:.2f} to {after:.2f}"
    return f"{text}." if before > after else f"{text}: none were lost, so that there is no loss to explain."


def _sentence(effect: Mapping[str, Any], *, lost: float) -> str:
    group, measure, share = effect["group"], effect["measures"]["harmful"], effect["share"]
    value, null = measure["value"], measure["null_mean"]
    by_null = f"matched random groups {{}}; p = {measure['p']:.2g}, {_draws(effect)}"
    if effect["intervention"] == "prune":
        text = f"Pruning {group} before fine-tuning leaves refusals at {value:.2f} ({by_null.format(f'{null:.2f}')})"
        answers = effect["measures"].get("answers") or {}
        after, by_chance = answers.get("perplexity"), answers.get("null_perplexity")
        if after is None or by_chance is None:
            return f"{text}."
        # A model that can no longer write does not refuse either: how much else broke belongs into the same sentence.
        return f"{text}, and the perplexity of ordinary answers at {after:,.0f} (random groups {by_chance:,.0f})."
    if lost <= 0:
        started = {"rewind": "Undoing only", "transplant": "Transplanting only", "freeze": "Holding only"}
        tail = "the change of " if effect["intervention"] != "freeze" else ""
        return (
            f"{started[effect['intervention']]} {tail}{group} gives refusals of {value:.2f} "
            f"({by_null.format(f'{null:.2f}')})."
        )
    shares = _share(share["group"]), by_null.format(_share(share["null"]))
    return {
        "rewind": f"Undoing only the change of {group} brings {shares[0]} of the lost refusals back ({shares[1]}).",
        "transplant": f"Its change alone, put into the model from before, loses {shares[0]} of them ({shares[1]}).",
        "freeze": f"Holding it during training keeps {shares[0]} of them ({shares[1]}).",
    }[effect["intervention"]]


def _draws(effect: Mapping[str, Any]) -> str:
    made, planned = effect["draws"], effect.get("draws_planned", effect["draws"])
    return f"{made} draws" if made == planned else f"stopped after {made} of {planned} draws"


def _share(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # never "-0.00"


def _verdict(group: str, own: Mapping[str, Mapping[str, Any]], *, lost: float) -> str:
    """Whether the group's change is a cause of the loss, more than any change of its size is."""
    expected = {"rewind": "higher", "transplant": "lower", "freeze": "higher"}
    tried = {name: effect["measures"]["harmful"] for name, effect in own.items() if name in expected}
    if not tried or lost <= 0:
        return ""
    named = ", ".join(tried)
    found = [name for name, m in tried.items() if m["p"] <= ALPHA and m["direction"] == expected[name]]
    against = [name for name, m in tried.items() if m["p"] <= ALPHA and m["direction"] not in (expected[name], "equal")]
    able = [name for name, m in tried.items() if m["p_floor"] <= ALPHA]
    if found:
        return (
            f"So the change of {group} is a cause of the loss, more than that of as many comparable ones is "
            f"({', '.join(found)})."
        )
    if against:
        return f"So the change of {group} worked against the loss ({', '.join(against)}), and is not its cause."
    if not able:
        return f"Too few draws to call anything a cause for {group}: p cannot reach {ALPHA}."
    return (
        f"So there is no evidence that the change of {group}, more than that of as many comparable ones, is a cause of "
        f"the loss ({named})."
    )
