"""What the layouts have in common: a number that may be undefined, its limits, and a rate."""

from __future__ import annotations

from typing import TypedDict

#: Null where undefined.
Number = float | None
#: `[low, high]`, each null where undefined.
Limits = list[float | None]


class RateOfPrompts(TypedDict):
    """A share of `n` prompts with its Wilson limits."""

    rate: Number
    low: Number
    high: Number
    refusals: int
    n: int
