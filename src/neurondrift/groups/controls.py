"""Matched controls: random groups as large as a group in every site, balanced with it in |w|, drawn in named ways.

Two kinds: *apart*, from the group's non-members; and *exchangeable*, in which the group's labels are permuted among
members and candidates, so that the group is one of its draws and an outcome can be tested against theirs.

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
from neurondrift.groups.strata import Strata, counts, inner_bounds, merged_bounds, strata_of, within

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
    exchangeable: bool = False,
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
    exchangeable
        The draws may hold members of `group`: its labels are permuted among its members and the candidates within
        their range of |w|. The draws and the group then are alike wherever membership says nothing about an outcome,
        which non-members are not: of r members per candidate, m non-members vary less than m members do, by
        √((1 - r)/(1 + r)). Ask only for a group that has candidates (`comparable_part`).

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
    generators = [np.random.default_rng([seed, draw]) for draw in range(draws)]
    of_sites: list[dict[str, SiteControl]] = [{} for _ in generators]
    for site, own_K in group.members.items():
        values_N = np.abs(np.asarray(magnitudes[site])).reshape(-1)
        pool = _pool(values_N, own_K, _others(len(values_N), site, (group, *exclude)), bins, site, exchangeable)
        for made, generator in zip(of_sites, generators, strict=True):
            made[site] = _matched_in_site(values_N, own_K, pool, generator)
    controls = []
    for draw, made in enumerate(of_sites):
        noted = {
            "rule": "matched",
            "role": "control",
            "of": dict(group.provenance),
            "seed": seed,
            "draw": draw,
            "bins": bins,
            **({"exchangeable": True} if exchangeable else {}),
            **_became_of(made),
        }
        controls.append(group.with_members({site: control.members for site, control in made.items()}, noted))
    return controls


def unlike(group: Group, values: Mapping[str, Any], *, candidates: int = 5) -> Group:
    """The others that are unlike a group's members in a second quantity: what its controls are not to be drawn from.

    Parameters
    ----------
    group
        Of neurons or hidden units.
    values
        Site name -> the quantity of every member of the site, `[n]`, not negative: how far something moved them.
    candidates
        How many others for each member are to be left in a site, at least.

    Returns
    -------
    All others but those that are among the k nearest of some member in log value, where k is as small as leaves
    `candidates` for each member. Others without a value, or with 0, are unlike all members that have one.
    """
    apart: dict[str, Indices] = {}
    for site, own_K in group.members.items():
        with np.errstate(divide="ignore"):
            logs_N = np.log(np.asarray(values[site], dtype=np.float64))
        others_M = _others(len(logs_N), site, (group,))
        usable_M = others_M[np.isfinite(logs_N[others_M])]
        members_K = logs_N[own_K][np.isfinite(logs_N[own_K])]
        if not len(members_K) or not len(usable_M):
            continue
        order_KM = np.argsort(np.abs(logs_N[usable_M][None, :] - members_K[:, None]), axis=1, kind="stable")
        # How near an other is to the member to which it is nearest, as a place among that member's others.
        place_KM = np.empty_like(order_KM)
        np.put_along_axis(place_KM, order_KM, np.arange(len(usable_M))[None, :].repeat(len(members_K), 0), axis=1)
        place_M = place_KM.min(axis=0)
        wanted = min(len(usable_M), candidates * len(own_K))
        within = np.sort(place_M)[wanted - 1]
        apart[site] = np.setdiff1d(others_M, usable_M[place_M <= within], assume_unique=True)
    noted = {"rule": "unlike", "candidates": candidates, "of": dict(group.provenance)}
    return group.with_members({site: rest for site, rest in apart.items() if len(rest)}, noted)


class Support(NamedTuple):
    """What of a group has comparable neurons.

    `members` and `sites` of the group; `left_out` and `sites_left_out` of them, as their sites have no candidates of
    comparable |w|; `members_per_candidate`: Σ m r / Σ m over the strata of the rest, r = members / candidates.
    """

    members: int
    left_out: int
    sites: int
    sites_left_out: int
    members_per_candidate: float


def comparable_part(
    group: Group, magnitudes: Mapping[str, Any], *, bins: int = 10, exclude: tuple[Group, ...] = ()
) -> tuple[Group, Support]:
    """The members of a group in the sites that have comparable candidates, which exchangeable draws are made of.

    A site has them where, within the range of its members' |w| (of a single member: 0.05 SD of the site's |w| to either
    side), there are at least as many others as members, and some choice of them is balanced with the members (mean |w|
    within 0.05 standardised). The parameters are those of `matched`. The part may be empty.
    """
    kept: dict[str, Indices] = {}
    members_S, per_candidate_S = [0], [0.0]
    for site, own_K in group.members.items():
        values_N = np.abs(np.asarray(magnitudes[site])).reshape(-1)
        others_M = within(values_N, own_K, _others(len(values_N), site, (group, *exclude)))
        if len(others_M) < len(own_K):
            continue
        if len(own_K) > 1 and not at_the_ends(values_N, own_K, others_M).balanceable:
            continue
        kept[site] = own_K
        members_B, candidates_B = counts(values_N, own_K, others_M, merged_bounds(values_N, own_K, others_M, bins))
        members_S.extend(members_B)
        per_candidate_S.extend(members_B / candidates_B)
    members_of_S = np.array(members_S)
    total = members_of_S.sum()
    support = Support(
        members=len(group),
        left_out=len(group) - int(total),
        sites=len(group.members),
        sites_left_out=len(group.members) - len(kept),
        members_per_candidate=float(members_of_S @ np.array(per_candidate_S) / total) if total else math.nan,
    )
    role = {"role": group.role} if group.role else {}
    noted = {"rule": "comparable", **role, "support": support._asdict(), "of": dict(group.provenance)}
    return (group if not support.left_out else group.with_members(kept, noted)), support


def _others(count: int, site: str, groups: tuple[Group, ...]) -> Indices:
    """The places of a site that no group holds."""
    free_N = np.ones(count, dtype=bool)
    for each in groups:
        free_N[each.members.get(site, [])] = False
    return np.flatnonzero(free_N)


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


class Pool(NamedTuple):
    """Whom a site's controls are drawn from, and in which strata."""

    candidates_M: Indices
    strata: Strata


def _pool(
    values_N: npt.NDArray[Any], own_K: Indices, others_M: Indices, bins: int, name: str, exchangeable: bool
) -> Pool:
    """The candidates: the others of the site; or, exchangeable, the members and the others within their range."""
    if exchangeable:
        others_M = within(values_N, own_K, others_M)
    if len(others_M) < len(own_K):
        raise GroupError(
            f"{name} has too few candidates for a matched control",
            received=f"{len(own_K)} members, {len(others_M)} others",
            fix="take a smaller fraction",
        )
    if not exchangeable:
        return Pool(others_M, strata_of(values_N, own_K, others_M, inner_bounds(values_N, own_K, bins)))
    candidates_M = np.union1d(own_K, others_M)
    return Pool(candidates_M, strata_of(values_N, own_K, candidates_M, merged_bounds(values_N, own_K, others_M, bins)))


def _matched_in_site(
    values_N: npt.NDArray[Any], own_K: Indices, pool: Pool, generator: np.random.Generator
) -> SiteControl:
    """The control of one site, by the first of its ways of drawing that has one."""
    site = Site(values_N, own_K, pool.candidates_M, pool.strata, generator)
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
