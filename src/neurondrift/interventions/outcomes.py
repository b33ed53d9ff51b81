"""From the runs to what they show: each group beside its null, and whether its change is a cause of the loss.

Numbers and verdicts, in the layout of `results/interventions.json` (docs/results.md); no sentence. The statistics are
those of `statistics.null`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neurondrift.base.errors import ArtifactError
from neurondrift.behaviour.rates import refusal_rate
from neurondrift.interventions.trials import REFERENCES, Cell, Label, Rows
from neurondrift.statistics.null import ALPHA, CauseVerdict, Direction, compare_with_null, share_of_change

SCHEMA_VERSION = 1
MEASURES = {"harmful": "refused", "ordinary": "refused", "answers": "loss"}


def summarise(
    results: Mapping[Label, Rows], planned: Mapping[Cell, int], *, resamples: int = 2000, rng_seed: int = 0
) -> dict[str, Any]:
    """References, effects and causes.

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
        `references`: before and after fine-tuning; `effects`: per group, intervention and dose, each with its
        `measures` (harmful and ordinary: share refused; answers: mean loss per token, with perplexities beside it);
        `tests`: how many p-values there are at dose 1; `causes`: a `Cause` per whole group, as a mapping.
    """
    references = {name: _reference(results[name, "", 1.0, None]) for name in REFERENCES}
    cells = list(dict.fromkeys(label[:3] for label in results if label[0] not in REFERENCES))
    effects = [_effect(results, cell, planned[cell], references, resamples, rng_seed) for cell in cells]
    tests = sum(len(effect["measures"]) for effect in effects if effect["dose"] == 1)
    return {
        "references": references,
        "effects": effects,
        "tests": tests,
        "causes": [cause._asdict() for cause in causes(effects, references)],
    }


def _reference(rows: Rows) -> dict[str, Any]:
    reference: dict[str, Any] = {}
    for kind in ("harmful", "ordinary"):
        flags = [bool(row["refused"]) for row in rows if row["kind"] == kind]
        if flags:
            reference[kind] = refusal_rate(flags)._asdict()
    losses, tokens = _outcome(rows, "answers")
    if len(losses):
        reference["answers"] = {"loss": float(np.average(losses, weights=tokens)), "n": len(losses)}
        reference["answers"]["perplexity"] = math.exp(reference["answers"]["loss"])
    return reference


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
        comparison = compare_with_null(
            values,
            draws,
            # Refusals of harmful requests decided whether to stop; the other measures have the draws that were made.
            planned=planned if kind == "harmful" else None,
            weights_P=weights,
            resamples=resamples,
            rng_seed=rng_seed,
        )
        measures[kind] = comparison._asdict() | {"ci95": list(comparison.ci95)}
        if kind == "answers":
            measures[kind]["perplexity"] = math.exp(comparison.value)
            measures[kind]["null_perplexity"] = math.exp(comparison.null_mean)
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


#: Which way refusals go if the group's change is a cause of their loss.
_EXPECTED: dict[str, Direction] = {"rewind": "higher", "transplant": "lower", "freeze": "higher"}


class Cause(NamedTuple):
    """Whether a group's change is a cause of the loss, more than any change of its size is.

    `interventions`: those that say so; where nothing does, those that were tried.
    """

    group: str
    verdict: CauseVerdict
    interventions: list[str]


def causes(effects: Sequence[Mapping[str, Any]], references: Mapping[str, Any]) -> list[Cause]:
    """The verdict on each whole group whose change was undone, transplanted or held.

    Empty where fine-tuning lost no refusals: there is nothing to be a cause of.
    """
    before, after = (references[name]["harmful"]["rate"] for name in REFERENCES)
    if before - after <= 0:
        return []
    tried: dict[str, dict[str, Mapping[str, Any]]] = {}
    for effect in effects:
        if effect["dose"] == 1 and effect["intervention"] in _EXPECTED:
            tried.setdefault(effect["group"], {})[effect["intervention"]] = effect["measures"]["harmful"]
    return [_cause(group, measures) for group, measures in tried.items()]


def _cause(group: str, tried: Mapping[str, Mapping[str, Any]]) -> Cause:
    clear = {name: measure["direction"] for name, measure in tried.items() if measure["p"] <= ALPHA}
    if caused := [name for name, direction in clear.items() if direction == _EXPECTED[name]]:
        return Cause(group, "cause", caused)
    if against := [name for name, direction in clear.items() if direction not in (_EXPECTED[name], "equal")]:
        return Cause(group, "against", against)
    able = any(measure["p_floor"] <= ALPHA for measure in tried.values())
    return Cause(group, "no_evidence" if able else "too_few_draws", list(tried))
