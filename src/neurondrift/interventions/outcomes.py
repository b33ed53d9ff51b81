"""From the runs to what they show: each group beside its null, how it stands, and whether its change is a cause.

Numbers and verdicts, in the layout of `results/interventions.json` (docs/results.md); no sentence. The statistics are
those of `statistics.null`. Refusals are shares of the *coherent* answers: those that can be read, and are decided. The
margin is a mean over prompts, in nats; where it was taken it is the primary outcome, the one that verdicts stand on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError
from neurondrift.base.roles import TAKING
from neurondrift.behaviour.rates import coherent_rate, counts
from neurondrift.interventions.measures import Outcome as Asked
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
    prompt_error,
    share_of_change,
    smallest_found,
    smallest_shift,
    standing,
    stopped,
)

SCHEMA_VERSION = 3
Judging = Literal["margin", "refusals"]


class Measure(NamedTuple):
    """What of the rows a measure is made of."""

    kind: str
    column: str
    outcome: Judging | None  # None: beside either


MEASURES = {
    "harmful": Measure("harmful", "refused", "refusals"),
    "ordinary": Measure("ordinary", "refused", "refusals"),
    "margin_harmful": Measure("harmful", "margin", "margin"),
    "margin_ordinary": Measure("ordinary", "margin", "margin"),
    "answers": Measure("answers", "loss", None),
}
#: The measure that an outcome is judged by.
JUDGED: dict[Judging, str] = {"margin": "margin_harmful", "refusals": "harmful"}


class Scale(NamedTuple):
    """What the effects on an outcome are held against: its values before and after fine-tuning, and the smallest effect
    of interest, in its own unit."""

    outcome: Judging
    before: float
    after: float
    smallest: float

    @property
    def measure(self) -> str:
        return JUDGED[self.outcome]

    @property
    def lost(self) -> float:
        """What fine-tuning took."""
        return self.before - self.after

    def ends(self, intervention: str) -> tuple[float, float]:
        """The values that 0 and 1 of an intervention's change stand for."""
        if intervention in TAKING:  # a margin has no end: as much as fine-tuning took
            return self.before, 0.0 if self.outcome == "refusals" else self.after
        return (self.before, self.after) if intervention in FROM_BEFORE else (self.after, self.before)


#: Interventions that do not act on a change of weights.
OF_NO_CHANGE = (*TAKING, "patch", "patch_back")
#: Interventions on the model from before, whose change is a loss.
FROM_BEFORE = ("transplant", "patch_back")


def judgings(asked: Asked) -> list[Judging]:
    """The outcomes that were asked for, the primary one first."""
    return ["margin", "refusals"] if asked == "both" else [asked]


def scale_of(outcome: Judging, references: Mapping[str, Any], smallest: float) -> Scale:
    """The scale of an outcome. `smallest`: in shares refused; of the margin as a share of what fine-tuning took."""
    if outcome == "refusals":
        before, after = (_number(references[name]["harmful"]["rate"]) for name in REFERENCES)
        return Scale(outcome, before, after, smallest)
    before, after = (_number(references[name]["margin"]["harmful"]) for name in REFERENCES)
    return Scale(outcome, before, after, smallest * abs(before - after))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def summarise(
    results: Mapping[Label, Rows],
    facts: Mapping[Cell, Facts],
    *,
    asked: Asked = "refusals",
    smallest_effect: float = 0.1,
    smallest_margin: float = 0.1,
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
    asked
        Which outcomes count, also where the runs hold more.
    smallest_effect
        Of interest, in shares refused: an effect whose interval does not lie beyond it is no cause.
    smallest_margin
        The same of the margin, as a share of the margin that fine-tuning took.
    resamples, rng_seed
        Of the bootstrap over prompts and draws.

    Returns
    -------
    dict
        `outcome`: the primary one; `references`: before and after fine-tuning; `effects`: per group, intervention and
        dose, each with its `measures` (harmful and ordinary: share refused of the coherent answers; margin_harmful and
        margin_ordinary: mean margin; answers: mean loss per token, with perplexities beside it),
        `harmful_minus_ordinary` and `margin_harmful_minus_ordinary`, the `share` and `margin_share` of the change, its
        `standing` in the primary outcome and what could have been `found`, and `refusals_standing` and
        `refusals_found` where refusals are the secondary one; `tests`: how many p-values there are at dose 1;
        `holm_tests`: those of them that the primary outcome has on harmful prompts, which `p_holm` is corrected for
        (the secondary outcome's by itself); `draws_needed` for one of them to survive that; `causes`: a `Cause` per
        whole group, as a mapping, by the primary outcome.
    """
    kinds = judgings(asked)
    references = {name: _reference(results[name, "", 1.0, None], kinds) for name in REFERENCES}
    smallest = {"refusals": smallest_effect, "margin": smallest_margin}
    scales = [scale_of(kind, references, smallest[kind]) for kind in kinds]
    cells = list(dict.fromkeys(label[:3] for label in results if label[0] not in REFERENCES))
    effects = [_effect(results, cell, facts[cell], scales, resamples, rng_seed) for cell in cells]
    families = [judge(effects, scale, is_primary=at == 0) for at, scale in enumerate(scales)]
    return {
        "outcome": kinds[0],
        "references": references,
        "effects": effects,
        "tests": sum(math.isfinite(m["p"]) for e in effects if e["dose"] == 1 for m in e["measures"].values()),
        "holm_tests": families[0],
        "draws_needed": draws_needed(families[0]),
        "smallest_effect": smallest_effect,
        "smallest_margin": smallest_margin,
        "causes": [cause._asdict() for cause in causes(effects, scales[0])],
    }


def _reference(rows: Rows, kinds: Sequence[Judging]) -> dict[str, Any]:
    reference: dict[str, Any] = {}
    asked = {kind: [row for row in rows if row["kind"] == kind] for kind in ("harmful", "ordinary")}
    if "refusals" in kinds:
        reference |= {kind: coherent_rate(own)._asdict() for kind, own in asked.items() if own}
    if "margin" in kinds:
        means = {kind: float(np.mean([row["margin"] for row in own])) for kind, own in asked.items() if own}
        reference["margin"] = means | {"n": len(asked["harmful"])}
    losses, tokens = _outcome(rows, MEASURES["answers"])
    if len(losses):
        reference["answers"] = {"loss": float(np.average(losses, weights=tokens)), "n": len(losses)}
        reference["answers"]["perplexity"] = math.exp(reference["answers"]["loss"])
    return reference


def _outcome(rows: Rows, measure: Measure) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Outcome and weight of each prompt of a kind, in the order of the run; NaN for an answer that does not count."""
    own = [row for row in rows if row["kind"] == measure.kind]
    if measure.column == "loss":
        return np.array([float(row["loss"]) for row in own]), np.array([float(row["tokens"] or 1) for row in own])
    if measure.column == "margin":
        return np.array([float(row["margin"]) for row in own]), np.ones(len(own))
    refused = [float(row["refused"]) if counts(row) else math.nan for row in own]
    return np.array(refused), np.ones(len(own))


def _effect(
    results: Mapping[Label, Rows],
    cell: Cell,
    facts: Facts,
    scales: Sequence[Scale],
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
    measured = {scale.outcome for scale in scales}
    for name, measure in MEASURES.items():
        ids = [row["id"] for row in own if row["kind"] == measure.kind]
        if not ids or (measure.outcome is not None and measure.outcome not in measured):
            continue
        values, weights = _outcome(own, measure)
        drawn = [] if measure.outcome is None and measured == {"margin"} else null  # they may hold none
        for rows in drawn:
            if [row["id"] for row in rows if row["kind"] == measure.kind] != ids:
                raise ArtifactError("The runs asked different prompts", fix="delete results/interventions.parquet")
        outcomes[name] = outcome_of(values, [_outcome(rows, measure)[0] for rows in drawn], weights)
        decides = name == scales[0].measure
        comparison = compare_with_null(
            outcomes[name].group_P,
            outcomes[name].null_KP,
            # The primary outcome decided whether to stop; the other measures have the draws that were made.
            planned=facts.planned if decides else None,
            weights_P=weights,
            **bootstrap,
        )
        if is_stopped:
            comparison = stopped(comparison, decided=decides)
        measures[name] = _mapping(comparison)
        if name == "answers":
            measures[name]["perplexity"] = math.exp(comparison.value)
            measures[name]["null_perplexity"] = math.exp(comparison.null_mean)
        elif measure.outcome == "margin":
            measures[name]["prompt_error"] = math.nan if is_stopped else prompt_error(outcomes[name].null_KP)
        else:
            measures[name] |= _uncounted(own, null, measure.kind, is_stopped)
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
    for scale in scales:
        prefix = "margin_" if scale.outcome == "margin" else ""
        ordinary = f"{prefix}ordinary"
        if ordinary in outcomes:
            difference = compare_difference(outcomes[scale.measure], outcomes[ordinary], **bootstrap)
            found = stopped(difference, decided=False) if is_stopped else difference
            entry[f"{prefix}harmful_minus_ordinary"] = _mapping(found)
        judged = measures[scale.measure]
        share = share_of_change(judged["value"], judged["null_mean"], *scale.ends(intervention))
        entry[f"{prefix}share"] = {
            "of": _SHARES[scale.outcome][intervention],
            "group": share.group,
            "null": share.null,
        }
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


#: What the share of an intervention says: 1 is all of it.
_SHARES: dict[Judging, dict[str, str]] = {
    "refusals": {
        "prune": "refusals of the model before fine-tuning that are gone",
        "unalign": "refusals of the model before fine-tuning that are gone",
        "rewind": "lost refusals that are back",
        "transplant": "lost refusals that this change alone loses",
        "patch": "lost refusals that are back",
        "patch_back": "lost refusals that these outputs alone lose",
        "freeze": "lost refusals that were kept",
    },
    "margin": {
        "prune": "margin gone, as a share of what fine-tuning took",
        "unalign": "margin gone, as a share of what fine-tuning took",
        "rewind": "lost margin that is back",
        "transplant": "lost margin that this change alone loses",
        "patch": "lost margin that is back",
        "patch_back": "lost margin that these outputs alone lose",
        "freeze": "lost margin that was kept",
    },
}


#: Which way an outcome goes if the group carries it (`prune`), or if its change is a cause of the loss.
_EXPECTED: dict[str, Direction] = {
    "prune": "lower",
    "unalign": "lower",
    "rewind": "higher",
    "transplant": "lower",
    "patch": "higher",
    "patch_back": "lower",
    "freeze": "higher",
}


def judge(effects: Sequence[dict[str, Any]], scale: Scale, *, is_primary: bool = True) -> int:
    """Add to the effects of whole groups `p_holm`, and how they stand and what would have been found; the number of
    tests that Holm's correction is for: the p-values of this outcome on harmful prompts."""
    whole = [effect for effect in effects if effect["dose"] == 1]
    adjusted = holm([effect["measures"][scale.measure]["p"] for effect in whole]).tolist()
    tests = max(1, sum(map(math.isfinite, adjusted)))
    prefix = "" if is_primary else f"{scale.outcome}_"
    for effect, p_holm in zip(whole, adjusted, strict=True):
        measure = effect["measures"][scale.measure]
        comparison = NullComparison(**{name: measure[name] for name in NullComparison._fields})
        measure["p_holm"] = p_holm
        effect[f"{prefix}standing"] = standing(
            comparison,
            p_holm,
            tests=tests,
            expected=_EXPECTED[effect["intervention"]],
            smallest_effect=scale.smallest,
            was_stopped=effect["stopped_early"],
        )
        effect[f"{prefix}found"] = _found(effect, comparison, tests, scale)
    return tests


def _found(effect: Mapping[str, Any], comparison: NullComparison, tests: int, scale: Scale) -> dict[str, float | str]:
    """The smallest effect that this design would have called outstanding, and the share of the change that a group
    must carry to have it.

    `share` is the effect over the change and over 1 - own, as the random groups hold a share `own` of the group;
    `draws` those that it holds for. `reason`: why there is no share, or none with the draws that were made: `stopped`;
    `too_few_draws` (the figures are for the fewest draws that suffice); `no_spread` (fewer than 5 draws); `no_change`;
    `not_even_all` (no group could, even one that carries all of the change).
    """
    start, end = scale.ends(effect["intervention"])
    nan = math.nan
    enough = comparison.p_floor * tests <= ALPHA + TIE
    draws = comparison.draws if enough else draws_needed(tests)
    if effect["stopped_early"]:
        return {"effect": nan, "share": nan, "draws": draws, "reason": "stopped"}
    if comparison.draws < FEWEST_DRAWS or math.isnan(comparison.null_sd):
        return {"effect": nan, "share": nan, "draws": draws, "reason": "no_spread"}
    reach = abs(end - start) * (1 - effect["support"]["own"])
    if scale.outcome == "margin":
        size = smallest_shift(
            null_sd=comparison.null_sd,
            prompt_se=effect["measures"][scale.measure]["prompt_error"],
            draws=draws,
            tests=tests,
            smallest_effect=scale.smallest,
            most=reach,
        )
    else:
        size = smallest_found(
            null_sd=comparison.null_sd, n=comparison.n, draws=draws, tests=tests, smallest_effect=scale.smallest
        )
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


def causes(effects: Sequence[Mapping[str, Any]], scale: Scale) -> list[Cause]:
    """The verdict on each whole group whose change was undone, transplanted or held.

    Pruning says nothing of the change, and patching nothing of the weights: outputs may differ for what feeds them.
    Empty where fine-tuning lost nothing of the outcome: there is nothing to be a cause of.
    """
    if not scale.lost > 0:
        return []
    tried: dict[str, dict[str, Mapping[str, Any]]] = {}
    for effect in effects:
        if effect["dose"] == 1 and effect["intervention"] not in OF_NO_CHANGE:
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
