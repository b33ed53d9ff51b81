"""How the experts of a mixture are stored: which way round their weights lie, and the order of gate and up rows.

transformers' own declarations come first (`is_transposed`, `is_concatenated` of its experts interface). Where a
module declares nothing, the shapes tell: what goes into the experts and what comes out of them is of one width, and
what is between has twice the width in a fused weight into them. Unfused ones do not tell: both ways fit their shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

INTO = ("gate_up_proj", "up_proj", "gate_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether a module stores the experts of a layer as 3-D parameters, in transformers' way."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and (hasattr(module, "num_experts") or down.ndim == 3)


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
    into = next((tensor for key in INTO if (tensor := getattr(module, key, None)) is not None), None)
    down: Any = getattr(module, "down_proj", None)
    return None if into is None or down is None else told_by_shapes(tuple(into.shape), tuple(down.shape))


def told_by_shapes(into: Sequence[int], down: Sequence[int]) -> bool | None:
    """Whether `[experts, a, b]` weights into and out of the hidden units are stored `[in, out]`; None: unsure."""
    (a, b), (c, d) = into[-2:], down[-2:]
    straight = b == c and a == 2 * d
    turned = a == d and b == 2 * c
    return turned if straight != turned else None


def is_interleaved(module: nn.Module) -> bool:
    """Whether a fused gate-and-up weight holds gate and up rows in turn, rather than the gate's first."""
    return getattr(module, "is_concatenated", True) is False
