"""Matched controls: random groups as large as a group in every site, balanced with it in |w|, drawn in named ways.

Shapes: N places of a site (neurons, or single weights), K members of the group, M candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import GroupError
from neurondrift.groups.balance import LIMIT, Ends, any_subset, at_the_ends, imbalance, shuffled, swapped, tilted
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
    controls = []
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        of_sites = {}
        for site, own_K in group.members.items():
            values_N = np.abs(np.asarray(magnitudes[site])).reshape(-1)
            eligible_N = np.ones(len(values_N), dtype=bool)
            for other in (group, *exclude):
                eligible_N[other.members.get(site, [])] = False
            of_sites[site] = _matched_in_site(values_N, own_K, eligible_N, bins, generator, site)
        noted = {
            "rule": "matched",
            "role": "control",
            "of": dict(group.provenance),
            "seed": seed,
            "draw": draw,
            "bins": bins,
            **_became_of(of_sites),
        }
        controls.append(group.with_members({site: control.members for site, control in of_sites.items()}, noted))
    return controls


class SiteControl(NamedTuple):
    """The control's members in one site `[K]`, sorted; how many of the group's its strata had no candidate for; the
    standardised mean difference of |w| that is left; whether any choice of candidates is balanced."""

    members: Indices
    borrowed: int
    imbalance: float
    balanceable: bool


def _became_of(of_sites: Mapping[str, SiteControl]) -> dict[str, Any]:
    """What a control's provenance says of its balance, over all sites."""
    large = [c.imbalance for c in of_sites.values() if len(c.members) >= 30 and math.isfinite(c.imbalance)]
    return {
        "borrowed": sum(control.borrowed for control in of_sites.values()),
        "imbalance": round(max(large), 4) if large else None,
        "unbalanced_sites": sum(control.imbalance > LIMIT for control in of_sites.values()),
        "unbalanceable_sites": sum(not control.balanceable for control in of_sites.values()),
    }


def _matched_in_site(
    values_N: npt.NDArray[Any],
    own_K: Indices,
    eligible_N: npt.NDArray[np.bool_],
    bins: int,
    generator: np.random.Generator,
    name: str,
) -> SiteControl:
    """The control of one site, by the first of its ways of drawing that has one."""
    candidates_M = np.flatnonzero(eligible_N)
    if len(candidates_M) < len(own_K):
        raise GroupError(
            f"{name} has too few candidates for a matched control",
            received=f"{len(own_K)} members, {len(candidates_M)} others",
            fix="take a smaller fraction",
        )
    site = Site(values_N, own_K, candidates_M, _strata(values_N, own_K, candidates_M, bins), generator)
    ways = WAYS_OF_SMALL_SITES if site.is_small else WAYS_OF_LARGE_SITES
    drawn = next(drawn for way in ways if (drawn := way(site)) is not None)
    members_K = np.sort(drawn.members).astype(np.int64)
    return SiteControl(members_K, len(site.strata.missing), site.off(members_K), drawn.balanceable)


@dataclass
class Site:
    """One site that a control is drawn in. `latest` is the last draw that was made, from which later ways go on."""

    values_N: npt.NDArray[Any]
    own_K: Indices
    candidates_M: Indices
    strata: Strata
    generator: np.random.Generator
    latest: Indices = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @property
    def is_small(self) -> bool:
        return len(self.own_K) * len(self.candidates_M) <= PAIRS

    @cached_property
    def ends(self) -> Ends:
        """The smallest and largest candidates, which tell whether any choice is balanced."""
        return at_the_ends(self.values_N, self.own_K, self.candidates_M)

    def off(self, picked_K: Indices) -> float:
        """How unbalanced a draw is."""
        return abs(imbalance(self.values_N[self.own_K], self.values_N[picked_K]))


class Drawn(NamedTuple):
    """The draw of a way that has one, and whether any choice of candidates is balanced."""

    members: Indices
    balanceable: bool = True


Way: TypeAlias = Callable[[Site], Drawn | None]


def from_strata(site: Site) -> Drawn | None:
    """From every stratum at random as many as the group has there."""
    site.latest = site.strata.draw(site.values_N, site.candidates_M, site.generator)
    return Drawn(site.latest) if site.off(site.latest) <= (LIMIT if site.is_small else GOAL_OF_LARGE) else None


def tilted_within_strata(site: Site) -> Drawn | None:
    """From the strata's candidates, large (or small) |w| favoured until the means agree."""
    strata = site.strata
    site.latest = tilted(
        site.values_N, site.own_K, site.latest, strata.pools, strata.wanted, GOAL_OF_LARGE, site.generator
    )
    return Drawn(site.latest) if site.off(site.latest) <= LIMIT else None


def nearest_where_none_is_balanced(site: Site) -> Drawn | None:
    """Where no choice at all is balanced: the one whose mean |w| is nearest, the same in every draw."""
    return None if site.ends.balanceable else Drawn(site.ends.nearest, balanceable=False)


def tilted_over_all(site: Site) -> Drawn:
    """From all candidates without strata, tilted; or the nearest, where that is less unbalanced."""
    everyone, count = [site.candidates_M], np.array([len(site.own_K)])
    anywhere = tilted(site.values_N, site.own_K, site.latest, everyone, count, GOAL_OF_LARGE, site.generator)
    return Drawn(min(anywhere, site.ends.nearest, key=site.off))


def from_strata_again(site: Site) -> Drawn | None:
    """From the strata again, up to `TRIES` times."""
    return next((drawn for _ in range(TRIES) if (drawn := from_strata(site)) is not None), None)


def one_of_all_choices(site: Site) -> Drawn | None:
    """Where there are few choices: any of all that are balanced, each with the same chance."""
    if math.comb(len(site.candidates_M), len(site.own_K)) > SUBSETS:
        return None
    picked = any_subset(site.values_N, site.own_K, site.candidates_M, site.generator)
    return Drawn(picked, balanceable=site.off(picked) <= LIMIT)


def swapped_until_balanced(site: Site) -> Drawn:
    """Random swaps from the latest draw, then from draws without strata, until one is balanced; then a random walk
    that forgets how it was reached. Where none is, the least unbalanced that was met."""
    of_site = site.values_N, site.own_K, site.candidates_M
    start, best = site.latest, site.ends.nearest
    for _ in range(TRIES):
        best = min(best, swapped(*of_site, start, site.generator), key=site.off)
        if site.off(best) <= LIMIT:
            return Drawn(shuffled(*of_site, best, site.generator))
        start = site.generator.choice(site.candidates_M, len(site.own_K), replace=False)
    return Drawn(best)


#: Tried in this order until one has a draw, which the last always has. docs/methods.md says why (Groups).
WAYS_OF_SMALL_SITES: tuple[Way, ...] = (
    from_strata,
    nearest_where_none_is_balanced,
    from_strata_again,
    one_of_all_choices,
    swapped_until_balanced,
)
WAYS_OF_LARGE_SITES: tuple[Way, ...] = (
    from_strata,
    tilted_within_strata,
    nearest_where_none_is_balanced,
    tilted_over_all,
)


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


def _strata(values_N: npt.NDArray[Any], own_K: Indices, candidates_M: Indices, bins: int) -> Strata:
    low, high = values_N[own_K].min(), values_N[own_K].max()
    if len(own_K) == 1:  # no quantiles: one bin around the member, so that not every draw is the nearest |w|
        reach = LIMIT * values_N.std(dtype=np.float64)
        bins, low, high = 1, low - reach, high + reach
    inner = np.quantile(values_N[own_K], np.linspace(0, 1, bins + 1)[1:-1]) if bins > 1 else np.empty(0)
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
