"""Removing directions from the outputs of a model's sites, and putting them back.

A reversible context, like the other interventions, and what refusals do within it. Owns no subspace:
`importance.subspaces` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from neurondrift.base.progress import progress
from neurondrift.behaviour.capability import perplexity
from neurondrift.behaviour.evaluate import judge_answers
from neurondrift.behaviour.rates import refusal_rate
from neurondrift.importance.directions import Projection, projection, random_directions, safety_only
from neurondrift.interventions.removal import remove_rank
from neurondrift.models.data import load_examples
from neurondrift.models.sites import Sites
from neurondrift.study.settings import Study


def removal_effects(
    study: Study,
    model: Any,
    tokenizer: Any,
    sites: Sites,
    directions: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    draws: int,
) -> dict[str, Any]:
    """Refusals of harmful requests and perplexity of held-out answers, without and with each removal.

    `directions`: subspace -> site -> orthonormal directions. The random removals take as many directions from each
    site as the safety removal. Returns the object `behaviour` of `results/subspaces.json`.
    """
    evaluate = study.evaluate
    prompts = load_examples(evaluate.harmful, require_response=False)
    answers_set = load_examples(evaluate.answers)
    safety, utility = directions["safety"], directions["utility"]
    removals: dict[str, Mapping[str, Projection]] = {
        "none": {},
        "safety": {name: projection(part) for name, part in safety.items()},
        "utility": {name: projection(part) for name, part in utility.items()},
        "safety_only": {name: safety_only(safety[name], utility[name]) for name in safety},
    }
    generator = torch.Generator().manual_seed(study.seed)
    conditions = []
    with progress("refusals", len(prompts) * (len(removals) + draws)) as advance:
        for index in range(len(removals) + draws):
            label, draw = (list(removals)[index], None) if index < len(removals) else ("random", index - len(removals))
            if draw is None:
                chosen = removals[label]
            else:
                chosen = {
                    name: projection(random_directions(sites.shapes[name][0], part.shape[1], generator))
                    for name, part in safety.items()
                }
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
                    "refusals": refusal_rate([row["refused"] for row in rows])._asdict(),
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


def _p_random(conditions: Sequence[Mapping[str, Any]], label: str) -> float:
    """(1 + random removals with as few refusals or fewer) / (1 + random removals)."""
    rate = next(c["refusals"]["rate"] for c in conditions if c["removed"] == label)
    null = [c["refusals"]["rate"] for c in conditions if c["removed"] == "random"]
    return (1 + sum(value <= rate for value in null)) / (1 + len(null))
