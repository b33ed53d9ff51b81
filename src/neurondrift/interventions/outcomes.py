"""From the runs to what they show: each group beside its null, how it stands, and whether its change is a cause.

Numbers and verdicts, in the layout of `results/interventions.json` (docs/results.md); no sentence. The statistics are
those of `statistics.null`. Refusals are shares of the *coherent* answers: those that can be read, and are decided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError
from neurondrift.behaviour.rates import coherent_rate, counts
from neurondrift.interventions.runs import Rows
from neurondrift.interventions.trials import REFERENCES, Cell, Facts, Label
from neurondrift.statistics.design.levels import ALPHA
from neurondrift.statistics.inference import holm
from neurondrift.statistics.null import (
    FEWEST_DRAWS,
    TIE,
    CauseVerdict,
    Direction,
    NullComparison,
    Outcome,
    compare_difference,
    compare_with_null,
    draws_needed,
    outcome_of,
    share_of_change,
    smallest_found,
    standing,
    stopped,
)

SCHEMA_VERSION = 2
MEASURES = {"harmful": "refused", "ordinary": "refused", "answers": "loss"}


def summarise(
    results: Mapping[Label, Rows],
    facts: Mapping[Cell, Facts],
    *,
    smallest_effect: float = 0.1,
    resamples: int = 2000,
    rng_seed: int = 0,
) -> dict[str, Any]:
    """References, effects and causes.

    Parameters
    ----------
    results
        From `run_trials`; it holds both references.
    facts
        From `facts_of`: a null with fewer results than planned was stopped early.
    smallest_effect
        Of interest, in shares refused: an effect whose interval does not lie beyond it is no cause.
    resamples, rng_seed
        Of the bootstrap over prompts and draws.

    Returns
    -------
    dict
        `references`: before and after fine-tuning; `effects`: per group, intervention and dose, each with its
        `measures` (harmful and ordinary: share refused of the coherent answers; answers: mean loss per token, with
        perplexities beside it), `harmful_minus_ordinary`, its `standing` and what could have been `found`; `tests`: how
        many p-values there are at dose 1; `holm_tests`: those of them that refusals of harmful requests have, which
        `p_holm` is corrected for; `draws_needed` for one of them to survive that; `causes`: a `Cause` per whole group,
        as a mapping.
    """
    references = {name: _reference(results[name, "", 1.0, None]) for name in REFERENCES}
    cells = list(dict.fromkeys(label[:3] for label in results if label[0] not in REFERENCES))
    effects = [_effect(results, cell, facts[cell], references, resamples, rng_seed) for cell in cells]
    family = _judge(effects, references, smallest_effect)
    return {
        "references": references,
        "effects": effects,
        "tests": sum(math.isfinite(m["p"]) for e in effects if e["dose"] == 1 for m in e["measures"].values()),
        "holm_tests": family,
        "draws_needed": draws_needed(family),
        "smallest_effect": smallest_effect,
        "causes": [cause._asdict() for cause in causes(effects, references)],
    }


def _reference(rows: Rows) -> dict[str, Any]:
    reference: dict[str, Any] = {}
    for kind in ("harmful", "ordinary"):
        if asked := [row for row in rows if row["kind"] == kind]:
            reference[kind] = coherent_rate(asked)._asdict()
    losses, tokens = _outcome(rows, "answers")
    if len(losses):
        reference["answers"] = {"loss": float(np.average(losses, weights=tokens)), "n": len(losses)}
        reference["answers"]["perplexity"] = math.exp(reference["answers"]["loss"])
    return reference


def _outcome(rows: Rows, kind: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Outcome and weight of each prompt of a kind, in the order of the run; NaN for an answer that does not count."""
    own = [row for row in rows if row["kind"] == kind]
    if kind == "answers":
        return np.array([float(row["loss"]) for row in own]), np.array([float(row["tokens"] or 1) for row in own])
    refused = [float(row["refused"]) if counts(row) else math.nan for row in own]
    return np.array(refused), np.ones(len(own))


def _effect(
    results: Mapping[Label, Rows],
    cell: Cell,
    facts: Facts,
    references: Mapping[str, Any],
    resamples: int,
    rng_seed: int,
) -> dict[str, Any]:
    intervention, group, dose = cell
    own = results[intervention, group, dose, None]
    null = [rows for label, rows in results.items() if label[:3] == cell and label[3] is not None]
    is_stopped = len(null) < facts.planned
    bootstrap = {"resamples": resamples, "rng_seed": rng_seed}
    measures: dict[str, Any] = {}
    outcomes: dict[str, Outcome] = {}
    for kind in dict.fromkeys(row["kind"] for row in own):
        values, weights = _outcome(own, kind)
        ids = [row["id"] for row in own if row["kind"] == kind]
        for rows in null:
            if [row["id"] for row in rows if row["kind"] == kind] != ids:
                raise ArtifactError("The runs asked different prompts", fix="delete results/interventions.parquet")
        outcomes[kind] = outcome_of(values, [_outcome(rows, kind)[0] for rows in null], weights)
        comparison = compare_with_null(
            outcomes[kind].group_P,
            outcomes[kind].null_KP,
            # Refusals of harmful requests decided whether to stop; the other measures have the draws that were made.
            planned=facts.planned if kind == "harmful" else None,
            weights_P=weights,
            **bootstrap,
        )
        if is_stopped:
            comparison = stopped(comparison, decided=kind == "harmful")
        measures[kind] = _mapping(comparison)
        if kind == "answers":
            measures[kind]["perplexity"] = math.exp(comparison.value)
            measures[kind]["null_perplexity"] = math.exp(comparison.null_mean)
        else:
            measures[kind] |= _uncounted(own, null, kind, is_stopped)
    entry: dict[str, Any] = {
        "intervention": intervention,
        "group": group,
        "role": facts.role,
        "granularity": own[0]["granularity"],
        "dose": dose,
        "members": own[0]["members"],
        "acted_on": own[0]["acted_on"],
        "outside": own[0]["outside"],
        "support": facts.support._asdict() | {"own": facts.own},
        "draws": len(null),
        "draws_planned": facts.planned,
        "stopped_early": is_stopped,
        "measures": measures,
    }
    if "ordinary" in outcomes:
        difference = compare_difference(outcomes["harmful"], outcomes["ordinary"], **bootstrap)
        entry["harmful_minus_ordinary"] = _mapping(stopped(difference, decided=False) if is_stopped else difference)
    start, end = _ends(intervention, references)
    share = share_of_change(measures["harmful"]["value"], measures["harmful"]["null_mean"], start, end)
    entry["share"] = {"of": _SHARES[intervention], "group": share.group, "null": share.null}
    return entry


def _mapping(comparison: NullComparison) -> dict[str, Any]:
    return comparison._asdict() | {"ci95": list(comparison.ci95)}


def _uncounted(own: Rows, null: Sequence[Rows], kind: str, is_stopped: bool) -> dict[str, Any]:
    """The answers that do not count: of the group, and on average of a random group."""

    def of(rows: Rows) -> tuple[int, int]:
        rate = coherent_rate([row for row in rows if row["kind"] == kind])
        return rate.incoherent, rate.undecided

    known = null and not is_stopped
    means = np.mean([of(rows) for rows in null], axis=0).tolist() if known else [math.nan, math.nan]
    incoherent, undecided = of(own)
    return {
        "incoherent": incoherent,
        "undecided": undecided,
        "null_incoherent": means[0],
        "null_undecided": means[1],
    }


def _ends(intervention: str, references: Mapping[str, Any]) -> tuple[float, float]:
    """The shares refused that 0 and 1 of an intervention's change stand for."""
    before, after = (references[name]["harmful"]["rate"] for name in REFERENCES)
    return {"prune": (before, 0.0), "transplant": (before, after)}.get(intervention, (after, before))


#: What the share of an intervention says: 1 is all of it.
_SHARES = {
    "prune": "refusals of the model before fine-tuning that are gone",
    "rewind": "lost refusals that are back",
    "transplant": "lost refusals that this change alone loses",
    "freeze": "lost refusals that were kept",
}


#: Which way refusals go if the group carries them (`prune`), or if its change is a cause of their loss.
_EXPECTED: dict[str, Direction] = {"prune": "lower", "rewind": "higher", "transplant": "lower", "freeze": "higher"}


def _judge(effects: Sequence[dict[str, Any]], references: Mapping[str, Any], smallest_effect: float) -> int:
    """Add to the effects of whole groups `p_holm`, `standing` and `found`; the number of tests that Holm's correction
    is for: the p-values of refusals of harmful requests."""
    whole = [effect for effect in effects if effect["dose"] == 1]
    adjusted = holm([effect["measures"]["harmful"]["p"] for effect in whole]).tolist()
    tests = max(1, sum(map(math.isfinite, adjusted)))
    for effect, p_holm in zip(whole, adjusted, strict=True):
        measure = effect["measures"]["harmful"]
        comparison = NullComparison(**{name: measure[name] for name in NullComparison._fields})
        effect["measures"]["harmful"]["p_holm"] = p_holm
        effect["standing"] = standing(
            comparison,
            p_holm,
            tests=tests,
            expected=_EXPECTED[effect["intervention"]],
            smallest_effect=smallest_effect,
            was_stopped=effect["stopped_early"],
        )
        effect["found"] = _found(effect, comparison, tests, references, smallest_effect)
    return tests


def _found(
    effect: Mapping[str, Any],
    comparison: NullComparison,
    tests: int,
    references: Mapping[str, Any],
    smallest_effect: float,
) -> dict[str, float | str]:
    """The smallest effect that this design would have called outstanding, and the share of the change that a group
    must carry to have it.

    `share` is the effect over the change and over 1 - own, as the random groups hold a share `own` of the group;
    `draws` those that it holds for. `reason`: why there is no share, or none with the draws that were made: `stopped`;
    `too_few_draws` (the figures are for the fewest draws that suffice); `no_spread` (fewer than 5 draws); `no_change`;
    `not_even_all` (no group could, even one that carries all of the change).
    """
    start, end = _ends(effect["intervention"], references)
    nan = math.nan
    enough = comparison.p_floor * tests <= ALPHA + TIE
    draws = comparison.draws if enough else draws_needed(tests)
    if effect["stopped_early"]:
        return {"effect": nan, "share": nan, "draws": draws, "reason": "stopped"}
    if comparison.draws < FEWEST_DRAWS or math.isnan(comparison.null_sd):
        return {"effect": nan, "share": nan, "draws": draws, "reason": "no_spread"}
    size = smallest_found(
        null_sd=comparison.null_sd, n=comparison.n, draws=draws, tests=tests, smallest_effect=smallest_effect
    )
    reach = abs(end - start) * (1 - effect["support"]["own"])
    if not reach > 0:
        return {"effect": size, "share": nan, "draws": draws, "reason": "no_change"}
    if size > reach:
        return {"effect": size, "share": nan, "draws": draws, "reason": "not_even_all"}
    return {"effect": size, "share": size / reach, "draws": draws, "reason": "" if enough else "too_few_draws"}


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
    if not before - after > 0:
        return []
    tried: dict[str, dict[str, Mapping[str, Any]]] = {}
    for effect in effects:
        if effect["dose"] == 1 and effect["intervention"] != "prune":
            tried.setdefault(effect["group"], {})[effect["intervention"]] = effect
    return [_cause(group, own) for group, own in tried.items()]


def _cause(group: str, tried: Mapping[str, Mapping[str, Any]]) -> Cause:
    if caused := [name for name, effect in tried.items() if effect["standing"] == "stands_out"]:
        return Cause(group, "cause", caused)
    if against := [name for name, effect in tried.items() if effect["standing"] == "opposite"]:
        return Cause(group, "against", against)
    stand = {effect["standing"] for effect in tried.values()}
    unable = "too_few_draws" in stand and not stand & {"small", "not"}
    return Cause(group, "too_few_draws" if unable else "no_evidence", list(tried))
