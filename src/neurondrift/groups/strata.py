"""The strata of a site: bins of the members' |w|, whose candidates they have, and how one draws from them.

Shapes: N places of a site, K members of the group, M candidates, B strata.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.groups.balance import LIMIT
from neurondrift.groups.group import Indices


class Strata(NamedTuple):
    """The |w| bins of one site: their candidates_M, how many to draw in each, and the |w| of the members that are left
    without one."""

    pools: list[Indices]
    wanted: npt.NDArray[np.int64]
    missing: npt.NDArray[Any]

    def draw(self, values_N: npt.NDArray[Any], candidates_M: Indices, generator: np.random.Generator) -> Indices:
        """At random in every bin; for each member left without a candidate the nearest |w| that is not drawn yet."""
        drawn = [
            pool[generator.choice(len(pool), size=min(int(count), len(pool)), replace=False, shuffle=False)]
            for pool, count in zip(self.pools, self.wanted, strict=True)
        ]
        picked = np.concatenate(drawn)
        if len(self.missing):
            picked = np.concatenate([picked, _nearest_unused(values_N, candidates_M, picked, self.missing)])
        return picked


def range_of(values_N: npt.NDArray[Any], own_K: Indices) -> tuple[float, float]:
    """The members' range of |w|; a single member's is widened, so that not every draw is the nearest |w|."""
    low, high = values_N[own_K].min(), values_N[own_K].max()
    reach = LIMIT * values_N.std(dtype=np.float64) if len(own_K) == 1 else 0.0
    return low - reach, high + reach


def within(values_N: npt.NDArray[Any], own_K: Indices, others_M: Indices) -> Indices:
    """The others within the members' range of |w|."""
    low, high = range_of(values_N, own_K)
    return others_M[(values_N[others_M] >= low) & (values_N[others_M] <= high)]


def inner_bounds(values_N: npt.NDArray[Any], own_K: Indices, bins: int) -> npt.NDArray[Any]:
    """The inner bounds of the strata: quantiles of the members' |w|; none for a single member."""
    if bins <= 1 or len(own_K) == 1:
        return np.empty(0)
    return np.quantile(values_N[own_K], np.linspace(0, 1, bins + 1)[1:-1])


def merged_bounds(values_N: npt.NDArray[Any], own_K: Indices, others_M: Indices, bins: int) -> npt.NDArray[Any]:
    """Inner bounds of strata that have members, and at least as many others: bins merged from the largest |w| down.

    `others_M` lie within the members' range, and are at least as many.
    """
    inner = inner_bounds(values_N, own_K, bins)
    members_B, others_B = counts(values_N, own_K, others_M, inner)
    bounds: list[int] = []  # of the inner bounds, those that stay, from the top
    members = others = 0
    for b in range(len(inner), 0, -1):
        members, others = members + int(members_B[b]), others + int(others_B[b])
        if 1 <= members <= others:
            bounds.append(b - 1)
            members = others = 0
    members, others = members + int(members_B[0]), others + int(others_B[0])
    while bounds and not 1 <= members <= others:  # what is left at the bottom joins the stratum above it
        last = bounds.pop()
        above = bounds[-1] if bounds else len(inner)
        members, others = (
            members + int(members_B[last + 1 : above + 1].sum()),
            others + int(others_B[last + 1 : above + 1].sum()),
        )
    return inner[sorted(bounds)]


def counts(
    values_N: npt.NDArray[Any], own_K: Indices, others_M: Indices, inner: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How many members and others each stratum has."""

    def of(places: Indices) -> npt.NDArray[np.int64]:
        return np.bincount(np.searchsorted(inner, values_N[places], side="right"), minlength=len(inner) + 1)

    return of(own_K), of(others_M)


def strata_of(values_N: npt.NDArray[Any], own_K: Indices, candidates_M: Indices, inner: npt.NDArray[Any]) -> Strata:
    low, high = range_of(values_N, own_K)
    bins = len(inner) + 1
    bin_of_own_K = np.searchsorted(inner, values_N[own_K], side="right")
    wanted = np.bincount(bin_of_own_K, minlength=bins)
    pools = _by_bin(values_N, candidates_M, inner, low, high)
    missing = [
        np.sort(values_N[own_K[bin_of_own_K == b]])[: wanted[b] - len(pools[b])]
        for b in range(bins)
        if len(pools[b]) < wanted[b]
    ]
    return Strata(pools, wanted, np.concatenate(missing) if missing else np.empty(0))


def _by_bin(
    values_N: npt.NDArray[Any], candidates_M: Indices, inner: npt.NDArray[Any], low: float, high: float
) -> list[Indices]:
    """The candidates of each stratum, within the members' range of |w|."""
    within = candidates_M[(values_N[candidates_M] >= low) & (values_N[candidates_M] <= high)]
    bin_of_within = np.searchsorted(inner, values_N[within], side="right").astype(np.int16)  # 16 bits sort by radix
    order = np.argsort(bin_of_within, kind="stable")
    bounds = np.searchsorted(bin_of_within[order], np.arange(1, len(inner) + 1))
    return np.split(within[order], bounds)


def _nearest_unused(
    values_N: npt.NDArray[Any], candidates_M: Indices, used: Indices, targets: npt.NDArray[Any]
) -> Indices:
    """For each target value the unused candidate whose value is nearest, each candidate at most once."""
    free = np.setdiff1d(candidates_M, used, assume_unique=True)
    # Only what is not smaller than every target, and as many below as there are targets, can be picked.
    reach = int((values_N[free] >= targets.min()).sum()) + len(targets)
    if reach < len(free):
        free = np.sort(free[np.argpartition(values_N[free], len(free) - reach)[len(free) - reach :]])
    free = free[np.argsort(values_N[free], kind="stable")]
    sorted_values = values_N[free]
    count = len(free)
    # Positions 1 .. count hold the free candidates; `below` and `above` lead past those that have been taken.
    below, above = list(range(count + 2)), list(range(count + 2))

    def follow(links: list[int], position: int) -> int:
        root = position
        while links[root] != root:
            root = links[root]
        while links[position] != root:
            links[position], position = root, links[position]
        return root

    picked = np.empty(len(targets), dtype=np.int64)
    starts = np.searchsorted(sorted_values, targets)
    for index, (target, start) in enumerate(zip(targets.tolist(), starts.tolist(), strict=True)):
        left, right = follow(below, start), follow(above, start + 1)
        if left == 0:
            chosen = right
        elif right == count + 1:
            chosen = left
        else:
            nearer_left = target - sorted_values[left - 1] <= sorted_values[right - 1] - target
            chosen = left if nearer_left else right
        below[chosen], above[chosen] = chosen - 1, chosen + 1
        picked[index] = free[chosen - 1]
    return picked
