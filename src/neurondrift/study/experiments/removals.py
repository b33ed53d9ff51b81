"""What refusals and perplexity do while directions are removed from a study's model, beside random removals.

The part of the rank level that generates. Owns the list of removals and the layout of `behaviour` in
`results/subspaces.json`; the directions come from `importance.directions`, the context that removes them and gives
them back is `interventions.acting.removal`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from neurondrift.base.progress import progress
from neurondrift.behaviour.capability import perplexity
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.behaviour.rates import coherent_rate
from neurondrift.importance.directions import Projection, projection, random_directions, safety_only
from neurondrift.interventions.acting.removal import remove_rank
from neurondrift.models.data import load_examples
from neurondrift.models.sites import Sites
from neurondrift.study.settings import Study

#: The removals that are no random ones, in the order in which they are made.
REMOVED = ("none", "safety", "utility", "safety_only")


def removal_effects(
    study: Study,
    model: Any,
    tokenizer: Any,
    sites: Sites,
    directions: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    draws: int,
) -> dict[str, Any]:
    """Refusals of harmful requests (of coherent answers) and perplexity of held-out answers, without and with each
    removal.

    `directions`: subspace -> site -> orthonormal directions. The random removals take as many directions from each
    site as the safety removal. Returns the object `behaviour` of `results/subspaces.json`.
    """
    evaluate = study.evaluate
    prompts = load_examples(evaluate.harmful, require_response=False, kind="harmful")
    answers_set = load_examples(evaluate.answers)
    conditions = []
    with progress("refusals", len(prompts) * (len(REMOVED) + draws)) as advance:
        for label, draw, chosen in _removals(sites, directions, draws=draws, seed=study.seed):
            with remove_rank(sites, chosen):
                rows = judge_answers(
                    model,
                    tokenizer,
                    {"harmful": prompts},
                    judge_name=evaluate.judge,
                    max_new_tokens=evaluate.max_new_tokens,
                    batch_size=evaluate.batch_size,
                    max_length=evaluate.max_length,
                    advance=advance,
                )
                value = perplexity(
                    model, tokenizer, answers_set, batch_size=evaluate.batch_size, max_length=evaluate.max_length
                )
            conditions.append(
                {
                    "removed": label,
                    "draw": draw,
                    "refusals": coherent_rate(rows)._asdict(),
                    "partial": sum(row["verdict"] == "partial" for row in rows),
                    "coherent": sum(bool(row["coherent"]) for row in rows) / len(rows),
                    "perplexity": value,
                }
            )
    return {
        "prompts": len(prompts),
        "answers": len(answers_set),
        "judge": evaluate.judge,
        "conditions": conditions,
        "p_random": {label: _p_random(conditions, label) for label in ("safety", "safety_only", "utility")},
    }


def _removals(
    sites: Sites, directions: Mapping[str, Mapping[str, torch.Tensor]], *, draws: int, seed: int
) -> Iterator[tuple[str, int | None, Mapping[str, Projection]]]:
    """What is removed, the number of the random draw, and the projections: one removal at a time is in memory."""
    safety, utility = directions["safety"], directions["utility"]
    yield "none", None, {}
    yield "safety", None, {name: projection(part) for name, part in safety.items()}
    yield "utility", None, {name: projection(part) for name, part in utility.items()}
    yield "safety_only", None, {name: safety_only(safety[name], utility[name]) for name in safety}
    generator = torch.Generator().manual_seed(seed)
    for draw in range(draws):
        drawn = {
            name: random_directions(sites.shapes[name][0], part.shape[1], generator) for name, part in safety.items()
        }
        yield "random", draw, {name: projection(part) for name, part in drawn.items()}


def _p_random(conditions: Sequence[Mapping[str, Any]], label: str) -> float:
    """The one-sided p-value of a removal: random removals with as few refusals or fewer, or without any answer that
    counts; NaN where the removal itself leaves none."""
    rate = next(c["refusals"]["rate"] for c in conditions if c["removed"] == label)
    null = [c["refusals"]["rate"] for c in conditions if c["removed"] == "random"]
    return math.nan if math.isnan(rate) else (1 + sum(not value > rate for value in null)) / (1 + len(null))
