"""Matched controls: random groups with the same counts in every stratum of site and |w|."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import GroupError
from neurondrift.groups.balance import LIMIT, any_subset, at_the_ends, imbalance, shuffled, swapped, tilted
from neurondrift.groups.group import Group, Indices

# A site with at most so many pairs of a member and a candidate is small: it draws again, then swaps.
PAIRS = 2**18
# Stratified draws of a small site, and starts of its swaps, before they are given up.
TRIES = 16
# All choices of candidates are looked at instead where there are at most so many.
SUBSETS = 20_000
# Standardised mean difference of |w| beyond which any other site is tilted: what so many members miss is no chance.
GOAL_OF_LARGE = 0.02


def matched(
    group: Group,
    magnitudes: Mapping[str, Any],
    *,
    seed: int,
    draws: int = 1,
    bins: int = 10,
    exclude: tuple[Group, ...] = (),
) -> list[Group]:
    """Random groups with as many members in every stratum (site × |w| bin) as `group`, disjoint from it.

    Parameters
    ----------
    group
        The group to match.
    magnitudes
        Site name -> |w| of every member of the site: `[out]` row norms for neurons, `[out, in]` for weights.
    seed
        Draw i uses `(seed, i)`.
    draws
        How many control groups; they may overlap each other.
    bins
        Strata per site: quantile bins of the *members'* |w|, so that every bin holds about as many members.
    exclude
        Groups that no control may touch either.

    Returns
    -------
    list of Group
        A site in which |w| stays unbalanced (standardised mean difference beyond 0.05) is drawn anew, at the price of
        the exact counts of its strata: see `docs/methods.md`, Groups. `provenance` says what became of it:

        - `borrowed`: members whose stratum had too few candidates, for which the nearest |w| outside it is drawn;
        - `imbalance`: the greatest standardised mean difference left in a site of at least 30 members (None: no such);
        - `unbalanced_sites`: sites of any size that are left beyond 0.05. A site of one member has no such difference
          and never counts;
        - `unbalanceable_sites`: those of them in which no choice of candidates at all is within 0.05. Their control is
          the one whose mean |w| is nearest, and so the same in every draw.

    Raises
    ------
    GroupError
        A site with fewer candidates than members.
    """
    results = []
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        members, borrowed, worst, unbalanced, unbalanceable = {}, 0, None, 0, 0
        for site, own in group.members.items():
            values = np.abs(np.asarray(magnitudes[site])).reshape(-1)
            eligible = np.ones(len(values), dtype=bool)
            for other in (group, *exclude):
                eligible[other.members.get(site, [])] = False
            control = _matched_in_site(values, own, eligible, bins, generator, site)
            members[site] = control.members
            off = abs(imbalance(values[own], values[control.members]))
            borrowed += control.borrowed
            unbalanced += off > LIMIT
            unbalanceable += not control.balanceable
            if len(own) >= 30 and math.isfinite(off):
                worst = max(worst or 0.0, off)
        noted = {
            "rule": "matched",
            "of": dict(group.provenance),
            "seed": seed,
            "draw": draw,
            "bins": bins,
            "borrowed": borrowed,
            "imbalance": None if worst is None else round(worst, 4),
            "unbalanced_sites": unbalanced,
            "unbalanceable_sites": unbalanceable,
        }
        results.append(group.with_members(members, noted))
    return results


class SiteControl(NamedTuple):
    """The control's members in one site, sorted; how many of the group's its strata had no candidate for; whether any
    choice of candidates is balanced."""

    members: Indices
    borrowed: int
    balanceable: bool


def _matched_in_site(
    values: npt.NDArray[Any],
    own: Indices,
    eligible: npt.NDArray[np.bool_],
    bins: int,
    generator: np.random.Generator,
    site: str,
) -> SiteControl:
    """A stratified draw; where it is unbalanced, another that is as random as the limit allows."""
    candidates = np.flatnonzero(eligible)
    if len(candidates) < len(own):
        raise GroupError(
            f"{site} has too few candidates for a matched control",
            received=f"{len(own)} members, {len(candidates)} others",
            fix="take a smaller fraction",
        )
    strata = _strata(values, own, candidates, bins)
    small = len(own) * len(candidates) <= PAIRS

    def off(picked: Indices) -> float:
        return abs(imbalance(values[own], values[picked]))

    def result(picked: Indices, balanceable: bool = True) -> SiteControl:
        return SiteControl(np.sort(picked).astype(np.int64), len(strata.missing), balanceable)

    picked = strata.draw(values, candidates, generator)
    if off(picked) <= (LIMIT if small else GOAL_OF_LARGE):
        return result(picked)
    if not small:
        picked = tilted(values, own, picked, strata.pools, strata.wanted, GOAL_OF_LARGE, generator)
        if off(picked) <= LIMIT:
            return result(picked)
    ends = at_the_ends(values, own, candidates)
    if not ends.balanceable:
        return result(ends.nearest, balanceable=False)
    if not small:
        anywhere = tilted(values, own, picked, [candidates], np.array([len(own)]), GOAL_OF_LARGE, generator)
        return result(min(anywhere, ends.nearest, key=off))
    for _ in range(TRIES):
        picked = strata.draw(values, candidates, generator)
        if off(picked) <= LIMIT:
            return result(picked)
    if math.comb(len(candidates), len(own)) <= SUBSETS:
        picked = any_subset(values, own, candidates, generator)
        return result(picked, balanceable=off(picked) <= LIMIT)
    best = ends.nearest
    for _ in range(TRIES):
        best = min(best, swapped(values, own, candidates, picked, generator), key=off)
        if off(best) <= LIMIT:
            return result(shuffled(values, own, candidates, best, generator))
        picked = generator.choice(candidates, len(own), replace=False)
    return result(best)


class Strata(NamedTuple):
    """The |w| bins of one site: their candidates, how many to draw in each, and the |w| of the members that are left
    without one."""

    pools: list[Indices]
    wanted: npt.NDArray[np.int64]
    missing: npt.NDArray[Any]

    def draw(self, values: npt.NDArray[Any], candidates: Indices, generator: np.random.Generator) -> Indices:
        """At random in every bin; for each member left without a candidate the nearest |w| that is not drawn yet."""
        drawn = [
            pool[generator.choice(len(pool), size=min(int(count), len(pool)), replace=False, shuffle=False)]
            for pool, count in zip(self.pools, self.wanted, strict=True)
        ]
        picked = np.concatenate(drawn)
        if len(self.missing):
            picked = np.concatenate([picked, _nearest_unused(values, candidates, picked, self.missing)])
        return picked


def _strata(values: npt.NDArray[Any], own: Indices, candidates: Indices, bins: int) -> Strata:
    low, high = values[own].min(), values[own].max()
    if len(own) == 1:  # no quantiles: one bin around the member, so that not every draw is the nearest |w|
        reach = LIMIT * values.std(dtype=np.float64)
        bins, low, high = 1, low - reach, high + reach
    inner = np.quantile(values[own], np.linspace(0, 1, bins + 1)[1:-1]) if bins > 1 else np.empty(0)
    bin_of_own = np.searchsorted(inner, values[own], side="right")
    wanted = np.bincount(bin_of_own, minlength=bins)
    pools = _by_bin(values, candidates, inner, low, high)
    missing = [
        np.sort(values[own[bin_of_own == b]])[: wanted[b] - len(pools[b])]
        for b in range(bins)
        if len(pools[b]) < wanted[b]
    ]
    return Strata(pools, wanted, np.concatenate(missing) if missing else np.empty(0))


def _by_bin(
    values: npt.NDArray[Any], candidates: Indices, inner: npt.NDArray[Any], low: float, high: float
) -> list[Indices]:
    """The candidates of each stratum, within the members' range of |w|."""
    within = candidates[(values[candidates] >= low) & (values[candidates] <= high)]
    bin_of_within = np.searchsorted(inner, values[within], side="right").astype(np.int16)  # 16 bits sort by radix
    order = np.argsort(bin_of_within, kind="stable")
    bounds = np.searchsorted(bin_of_within[order], np.arange(1, len(inner) + 1))
    return np.split(within[order], bounds)


def _nearest_unused(values: npt.NDArray[Any], candidates: Indices, used: Indices, targets: npt.NDArray[Any]) -> Indices:
    """For each target value the unused candidate whose value is nearest, each candidate at most once."""
    free = np.setdiff1d(candidates, used, assume_unique=True)
    # Only what is not smaller than every target, and as many below as there are targets, can be picked.
    reach = int((values[free] >= targets.min()).sum()) + len(targets)
    if reach < len(free):
        free = np.sort(free[np.argpartition(values[free], len(free) - reach)[len(free) - reach :]])
    free = free[np.argsort(values[free], kind="stable")]
    sorted_values = values[free]
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
