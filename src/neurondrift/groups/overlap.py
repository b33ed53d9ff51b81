"""How much two groups overlap, how much they would by chance, and how much re-drawn groups of one rule do.

Counts in, figures out: knows nothing of files. An overlap between two models' groups means nothing without two
floors beside it: that of chance, and that of the same model under a re-drawn calibration set (`stability`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from neurondrift.base.errors import GroupError
from neurondrift.groups.group import Group


class Overlap(NamedTuple):
    """Two groups' overlap.

    `shared` members of `first` and `second`; `jaccard` shared / union; `overlap` shared / the smaller; and what
    independent draws of the same sizes within each site would give: `chance_shared` is the exact expectation
    Σ k₁k₂/n over sites (hypergeometric), `chance_jaccard` and `chance_overlap` follow from it.
    """

    first: int
    second: int
    shared: int
    jaccard: float
    overlap: float
    chance_shared: float
    chance_jaccard: float
    chance_overlap: float


def overlap(first: Group, second: Group, *, sites: Iterable[str] | None = None) -> Overlap:
    """Overlap of two groups of the same granularity over `sites` (default: all). NaN where both are empty.

    Raises `GroupError` for different granularities, or where no shapes are known.
    """
    if first.granularity != second.granularity:
        raise GroupError(
            "Groups of neurons and of weights do not overlap", received=f"{first.granularity}, {second.granularity}"
        )
    shapes = {**second.shapes, **first.shapes}
    if not shapes:
        raise GroupError("Neither group says how large its sites are", fix="read at least one of them from Parquet")
    for name in {*first.shapes} & {*second.shapes}:
        if first.shapes[name] != second.shapes[name]:
            raise GroupError(
                f"The groups see {name} in different shapes", received=f"{first.shapes[name]}, {second.shapes[name]}"
            )
    empty = np.empty(0, dtype=np.int64)
    counts = np.zeros(3)
    chance = 0.0
    for site in shapes if sites is None else sites:
        one, two = first.members.get(site, empty), second.members.get(site, empty)
        shared = len(np.intersect1d(one, two, assume_unique=True))
        counts += (len(one), len(two), shared)
        size = shapes[site][0] * (shapes[site][1] if first.granularity == "weight" else 1)
        chance += len(one) * len(two) / size
    one_count, two_count, shared_count = (int(value) for value in counts)
    return Overlap(
        one_count,
        two_count,
        shared_count,
        *_shares(one_count, two_count, shared_count),
        chance,
        *_shares(one_count, two_count, chance),
    )


def _shares(first: int, second: int, shared: float) -> tuple[float, float]:
    """Jaccard and overlap coefficient from sizes and the intersection."""
    union, smaller = first + second - shared, min(first, second)
    return (shared / union if union else float("nan"), shared / smaller if smaller else float("nan"))


def overlap_by(first: Group, second: Group, label_of_site: Callable[[str], Any]) -> dict[Any, Overlap]:
    """Overlap within each class of sites, such as layer or module type, in the order of the sites."""
    classes: dict[Any, list[str]] = {}
    for site in {**first.shapes, **second.shapes}:
        classes.setdefault(label_of_site(site), []).append(site)
    return {label: overlap(first, second, sites=sites) for label, sites in classes.items()}


class Stability(NamedTuple):
    """Overlap between groups of one model from re-drawn examples: over all pairs of draws, mean and range."""

    draws: int
    pairs: int
    members: float
    jaccard: float
    jaccard_low: float
    jaccard_high: float
    overlap: float
    chance_jaccard: float
    chance_overlap: float


def stability(groups: list[Group]) -> Stability:
    """Pairwise overlaps of groups that one rule gave on different draws. Raises `GroupError` for fewer than two."""
    if len(groups) < 2:
        raise GroupError("Stability needs at least two draws", received=len(groups))
    pairs = [overlap(one, two) for index, one in enumerate(groups) for two in groups[index + 1 :]]
    jaccards = [pair.jaccard for pair in pairs]

    def mean(name: str) -> float:
        return float(np.mean([getattr(pair, name) for pair in pairs]))

    return Stability(
        len(groups),
        len(pairs),
        float(np.mean([len(group) for group in groups])),
        mean("jaccard"),
        min(jaccards),
        max(jaccards),
        mean("overlap"),
        mean("chance_jaccard"),
        mean("chance_overlap"),
    )


def as_rows(overlaps: Mapping[Any, Overlap]) -> list[dict[str, Any]]:
    """Overlaps as rows for tables and JSON, the class under `name`."""
    return [{"name": str(name), **of_class._asdict()} for name, of_class in overlaps.items()]
