"""How the experts of a mixture are stored: which way round their weights lie, and the order of gate and up rows.

transformers' own declarations come first (`is_transposed`, `is_concatenated` of its experts interface). Where a
module declares nothing, the shapes tell: what goes into the experts and what comes out of them is of one width, and
what is between has twice the width in a fused weight into them. Unfused ones do not tell: both ways fit their shapes.
A stack of linear layers of a class of its own (JetMoE's) is asked: a small one of its class shows the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

INTO = ("gate_up_proj", "up_proj", "gate_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module stores the experts of a layer as 3-D parameters, in transformers' way."""
    down = getattr(module, "down_proj", None)
    is_mlp = isinstance(down, nn.Parameter) and (hasattr(module, "num_experts") or down.ndim == 3)
    return is_mlp or is_stack(module)


def is_stack(module: nn.Module) -> bool:
    """Whether a module is one linear layer for each expert: a 3-D `weight` and sizes that name its axes."""
    weight = getattr(module, "weight", None)
    sizes = [getattr(module, name, None) for name in ("num_experts", "output_size", "input_size")]
    return (
        isinstance(weight, nn.Parameter)
        and weight.ndim == 3
        and sorted(weight.shape) == sorted(map(int, filter(None, sizes)))
    )


def is_router(module: nn.Module) -> bool:
    """Whether a module is a mixture's router: a bare `weight` `[experts, hidden]`, no nn.Linear."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, nn.Parameter)
        and weight.ndim == 2
        and hasattr(module, "num_experts")
        and weight.shape[0] == module.num_experts
    )


def is_transposed(module: nn.Module) -> bool | None:
    """Whether experts are stored `[experts, in, out]`; None where it is neither declared nor told by the shapes."""
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool):
        return declared
    if is_stack(module):
        kind: Any = type(module)
        return _stacks_turned(kind)
    into = next((tensor for key in INTO if (tensor := getattr(module, key, None)) is not None), None)
    down: Any = getattr(module, "down_proj", None)
    return None if into is None or down is None else told_by_shapes(tuple(into.shape), tuple(down.shape))


@cache
@torch.no_grad()
def _stacks_turned(kind: Any) -> bool | None:
    """Whether a class of stacked linear layers stores `[experts, in, out]`: a small one of it is made and asked; None
    where it is not made or does not answer as linear layers do."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, generator=generator)
    try:
        module = kind(2, 3, 5)
        weight = torch.randn(module.weight.shape, generator=generator)
        module.weight.copy_(weight)
        found = module(inputs, [1, 1])
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None
    for turned in (False, True):
        if tuple(weight.shape) == ((2, 3, 5) if turned else (2, 5, 3)):
            rows = [F.linear(row, one.T if turned else one) for row, one in zip(inputs, weight, strict=True)]
            return turned if torch.allclose(found, torch.stack(rows), atol=1e-5) else None
    return None


def told_by_shapes(into: Sequence[int], down: Sequence[int]) -> bool | None:
    """Whether `[experts, a, b]` weights into and out of the hidden units are stored `[in, out]`; None: unsure."""
    (a, b), (c, d) = into[-2:], down[-2:]
    straight = b == c and a == 2 * d
    turned = a == d and b == 2 * c
    return turned if straight != turned else None


def is_interleaved(module: nn.Module) -> bool:
    """Whether a fused gate-and-up weight holds gate and up rows in turn, rather than the gate's first."""
    return getattr(module, "is_concatenated", True) is False
