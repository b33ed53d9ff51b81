"""The experts of a mixture, computed expert by expert, so that each product can be seen.

Owns the replacements of an experts module's `forward` while scores are taken: the loop that transformers documents as
its reference, and the one of Llama 4, whose experts each see every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neurondrift.models.sites import Site

# What a product of one expert passes through: site, inputs, output, rows of the flattened batch (None: all).
See = Callable[[Site, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Forward = Callable[..., torch.Tensor]


def is_observable(module: Any) -> bool:
    """Whether an experts module computes as one of the loops here does."""
    return hasattr(module, "_apply_gate") or _sorted_loop_holds(module)


@contextlib.contextmanager
def observed_experts(experts: Mapping[nn.Module, Mapping[tuple[str, int], Site]], see: See) -> Iterator[None]:
    """Experts modules compute expert by expert within the block, each product seen.

    Replaces the `forward` of each module instance (transformers dispatches on a global registry otherwise).
    """
    try:
        for module, sites in experts.items():
            loop = _reference_loop if hasattr(module, "_apply_gate") else _sorted_loop
            module.forward = loop(module, sites, see)
        yield
    finally:
        for module in experts:
            module.__dict__.pop("forward", None)


def _reference_loop(module: Any, sites: Mapping[tuple[str, int], Site], see: See) -> Forward:
    """The plain loop over experts that transformers documents as the reference of its experts interface."""

    def linear(states: torch.Tensor, key: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
        weight = getattr(module, key)[expert]
        bias = getattr(module, f"{key}_bias")[expert] if getattr(module, "has_bias", False) else None
        output = F.linear(states, weight.T if getattr(module, "is_transposed", False) else weight, bias)
        site = sites.get((key, expert))
        return output if site is None else see(site, states, output, rows)

    def forward(hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states)
        up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        for expert in torch.unique(top_k_index).tolist():
            if expert >= module.num_experts:
                continue
            rows, choice = (top_k_index == expert).nonzero(as_tuple=True)  # rows ascending
            states = linear(hidden_states[rows], up, expert, rows)
            states = module._apply_gate(states) if getattr(module, "has_gate", True) else module.act_fn(states)
            states = linear(states, "down_proj", expert, rows)
            if getattr(module, "has_post_expert_norm", False):
                states = module.post_expert_norm(states)
            result.index_add_(0, rows, (states * top_k_weights[rows, choice, None]).to(result.dtype))
        return result

    return forward


def _sorted_loop(module: Any, sites: Mapping[tuple[str, int], Site], see: See) -> Forward:
    """Llama 4: the tokens come once for each expert, weighted already; weights `[experts, in, out]`, gate first."""

    def linear(states: torch.Tensor, key: str, expert: int) -> torch.Tensor:
        output = states @ getattr(module, key)[expert]
        site = sites.get((key, expert))
        return output if site is None else see(site, states, output, None)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        count, width = module.gate_up_proj.shape[:2]
        results = []
        for expert, states in enumerate(hidden_states.view(count, -1, width)):
            gate, up = linear(states, "gate_up_proj", expert).chunk(2, dim=-1)
            results.append(linear(up * module.act_fn(gate), "down_proj", expert))
        return torch.cat(results)

    return forward


@torch.no_grad()
def _sorted_loop_holds(module: Any) -> bool:
    """Whether the module answers random tokens as `_sorted_loop` does."""
    weight = getattr(module, "gate_up_proj", None)
    if weight is None or not hasattr(module, "act_fn") or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * weight.shape[0], weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    try:
        expected = module(tokens)
        found = _sorted_loop(module, {}, lambda site, inputs, output, rows: output)(tokens)
    except (RuntimeError, TypeError, AttributeError):
        return False
    missed = (found.float() - expected.float()).norm()
    return bool(missed <= (1e-4 if weight.dtype == torch.float32 else 0.05) * expected.float().norm())
