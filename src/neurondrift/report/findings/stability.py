"""The layout of `stability.json`: how far the groups of one model differ when examples are re-drawn."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class StabilityFigures(TypedDict):
    """Overlap between groups of one model from re-drawn examples."""

    draws: int
    pairs: int
    members: float
    jaccard: float
    jaccard_low: float
    jaccard_high: float
    overlap: float
    chance_jaccard: float
    chance_overlap: float


class Stability(TypedDict):
    """The content of `stability.json`: group, then granularity."""

    model_fingerprint: NotRequired[str]
    draws: int
    pool: dict[str, int]
    examples: dict[str, int]
    groups: dict[str, dict[str, StabilityFigures]]
