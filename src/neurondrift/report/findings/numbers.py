"""What the layouts have in common: a number that may be undefined, its limits, an estimate, and a rate."""

from __future__ import annotations

from typing import NotRequired, TypedDict

#: Null where undefined.
Number = float | None
#: `[low, high]`, each null where undefined.
Limits = list[float | None]


class Estimate(TypedDict):
    """A number with its intervals, `[low, high]`; `n` counts neurons, `sites` and `seeds` the clusters."""

    value: Number
    se: Number
    ci90: Limits
    ci95: Limits
    n: int
    sites: int
    seeds: int
    method: str
    reason: str


class RateOfPrompts(TypedDict):
    """A share of `n` prompts with its Wilson limits; of coherent answers, what else was asked is counted beside it."""

    rate: Number
    low: Number
    high: Number
    refusals: int
    n: int
    asked: NotRequired[int]
    incoherent: NotRequired[int]
    undecided: NotRequired[int]
