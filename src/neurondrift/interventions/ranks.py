"""Removing directions from the outputs of a model's sites, and putting them back.

A reversible context, like the other interventions, and what refusals do within it. Owns no subspace:
`importance.subspaces` makes them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from neurondrift.behaviour.evaluate import judge_answers, perplexity, refusal_rate
from neurondrift.config import Study
from neurondrift.data import load_examples
from neurondrift.errors import ModelError
from neurondrift.importance.subspaces import Projection, projection, random_directions, safety_only
from neurondrift.progress import progress
from neurondrift.sites import Site, is_quantised, is_sharded, linear_sites


@contextlib.contextmanager
def remove_rank(model: nn.Module, projections: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """W ← W - P W at every site named, within the block; every bit is back when it is left, also by an exception.

    Parameters
    ----------
    model
        A causal language model. Under an adapter its base weights are changed and the adapter is left alone.
    projections
        Site name -> the two factors of P, `[out, k]` and `[k, out]`, for example `projection(U)` (ActSVD's removal) or
        `safety_only(U_s, U_u)` of `importance.subspaces`.

    Raises
    ------
    ModelError
        A site that the model does not have, of another size, or whose weight is quantised or sharded. Nothing is
        changed then.

    Notes
    -----
    The product is formed in float64 (float32 where the device has no float64) and rounded once to the weight's
    dtype. The weights of the sites named are kept beside the model meanwhile: as much memory again.
    """
    sites = linear_sites(model)
    for name, change in projections.items():
        if name not in sites:
            raise ModelError("The model has no such site to remove directions from", received=name)
        if is_quantised(sites[name].tensor) or is_sharded(sites[name].tensor):
            raise ModelError(f"The weight of {name} is quantised or sharded and cannot be changed in place")
        (left, right), outputs = change, sites[name].shape[0]
        if left.shape[0] != outputs or right.shape[1] != outputs:
            raise ModelError(
                f"The directions do not fit the outputs of {name}", received=left.shape[0], allowed=str(outputs)
            )
    originals: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, change in projections.items():
                weight = sites[name].weight
                exact = torch.float32 if weight.device.type == "mps" else torch.float64
                left, right = (factor.to(device=weight.device, dtype=exact) for factor in change)
                originals[name] = weight.clone()
                weight.copy_(weight.to(exact) - left @ (right @ weight.to(exact)))
        yield
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                sites[name].weight.copy_(original)


def removal_effects(
    study: Study,
    model: Any,
    tokenizer: Any,
    sites: Mapping[str, Site],
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
                    name: projection(random_directions(sites[name].shape[0], part.shape[1], generator))
                    for name, part in safety.items()
                }
            with remove_rank(model, chosen):
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
