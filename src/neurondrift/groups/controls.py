"""Matched controls: random groups with the same counts in every stratum of site and |w|."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from neurondrift.errors import GroupError
from neurondrift.groups.group import Group, Indices

# Standardised mean difference of |w| beyond which the draw of a site is tilted.
IMBALANCE = 0.02


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
        `provenance["borrowed"]` counts the members whose stratum had too few candidates, so that the
        nearest |w| outside it was taken. A site in which |w| stays unbalanced by more than 0.02 SD is drawn
        anew, with a tilt towards larger (smaller) |w| that makes the means agree at the price of the exact counts;
        `provenance["imbalance"]` is the greatest standardised mean difference of a site of at least 30 members
        that is left (None: no such site).

    Raises
    ------
    GroupError
        A site with fewer candidates than members.
    """
    results = []
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        members, borrowed, worst = {}, 0, None
        for site, own in group.members.items():
            values = np.abs(np.asarray(magnitudes[site])).reshape(-1)
            eligible = np.ones(len(values), dtype=bool)
            for other in (group, *exclude):
                eligible[other.members.get(site, [])] = False
            picked, short = _matched_in_site(values, own, eligible, bins, generator, site)
            members[site], borrowed = picked, borrowed + short
            if len(own) >= 30:
                worst = max(worst or 0.0, abs(imbalance(values[own], values[picked])))
        noted = {
            "rule": "matched",
            "of": dict(group.provenance),
            "seed": seed,
            "draw": draw,
            "bins": bins,
            "borrowed": borrowed,
            "imbalance": None if worst is None else round(worst, 4),
        }
        results.append(group.with_members(members, noted))
    return results


def _matched_in_site(
    values: npt.NDArray[Any],
    own: Indices,
    eligible: npt.NDArray[np.bool_],
    bins: int,
    generator: np.random.Generator,
    site: str,
) -> tuple[Indices, int]:
    """The control's members of one site, and how many of them are borrowed from another stratum."""
    candidates = np.flatnonzero(eligible)
    if len(candidates) < len(own):
        raise GroupError(
            f"{site} has too few candidates for a matched control",
            received=f"{len(own)} members, {len(candidates)} others",
            fix="take a smaller fraction",
        )
    inner = np.quantile(values[own], np.linspace(0, 1, bins + 1)[1:-1]) if bins > 1 else np.empty(0)
    bin_of_own = np.searchsorted(inner, values[own], side="right")
    wanted = np.bincount(bin_of_own, minlength=bins)
    pools = _by_bin(values, candidates, inner, values[own].min(), values[own].max())
    drawn = [
        pool[generator.choice(len(pool), size=min(int(count), len(pool)), replace=False, shuffle=False)]
        for pool, count in zip(pools, wanted, strict=True)
    ]
    picked, borrowed = np.concatenate(drawn), 0
    if short := [b for b in range(bins) if len(drawn[b]) < wanted[b]]:
        missing = [np.sort(values[own[bin_of_own == b]])[: wanted[b] - len(drawn[b])] for b in short]
        nearest = _nearest_unused(values, candidates, picked, np.concatenate(missing))
        picked, borrowed = np.concatenate([picked, nearest]), len(nearest)
    if abs(imbalance(values[own], values[picked])) > IMBALANCE:
        picked = _tilted(values, own, picked, pools, wanted, generator)
    return np.sort(picked).astype(np.int64), borrowed


def _by_bin(
    values: npt.NDArray[Any], candidates: Indices, inner: npt.NDArray[Any], low: float, high: float
) -> list[Indices]:
    """The candidates of each stratum, within the members' range of |w|."""
    within = candidates[(values[candidates] >= low) & (values[candidates] <= high)]
    bin_of_within = np.searchsorted(inner, values[within], side="right").astype(np.int16)  # 16 bits sort by radix
    order = np.argsort(bin_of_within, kind="stable")
    bounds = np.searchsorted(bin_of_within[order], np.arange(1, len(inner) + 1))
    return np.split(within[order], bounds)


def imbalance(own: npt.NDArray[Any], control: npt.NDArray[Any]) -> float:
    """Standardised mean difference: difference of the means over the root of the mean variance; 0 where that is 0."""
    if len(own) < 2 or len(control) < 2:
        return 0.0
    spread = float(np.sqrt((own.var(dtype=np.float64) + control.var(dtype=np.float64)) / 2))
    return float(own.mean(dtype=np.float64) - control.mean(dtype=np.float64)) / spread if spread > 0 else 0.0


def _tilted(
    values: npt.NDArray[Any],
    own: Indices,
    drawn: Indices,
    pools: list[Indices],
    wanted: npt.NDArray[np.int64],
    generator: np.random.Generator,
) -> Indices:
    """A draw that favours large (or small) |w| just enough for the means to agree; `drawn` where none is better.

    Where members lie beyond every candidate, equal counts alone leave the control too small. Candidates are then
    drawn without replacement with probability ∝ (share of their stratum) · exp(tilt · |w|), as the largest of
    log-probability + Gumbel noise (Kool et al. 2019); the tilt is found by bisection at fixed noise.
    """
    pool = np.concatenate(pools)
    if len(pool) <= len(own):
        return drawn
    sizes = np.array([len(part) for part in pools])
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = np.repeat(np.log(wanted / sizes), sizes) + generator.gumbel(size=len(pool))
    spread = float(values[own].std()) or 1.0
    scaled = (values[pool] - values[own].mean()) / spread

    def draw(tilt: float) -> Indices:
        key = tilt * scaled + chance
        return pool[np.argpartition(key, len(pool) - len(own))[len(pool) - len(own) :]]

    def left(picked: Indices) -> float:
        return imbalance(values[own], values[picked])

    best = drawn
    sign = 1.0 if left(drawn) > 0 else -1.0
    low, high = 0.0, 0.25
    for _ in range(16):
        picked = draw(sign * high)
        if abs(left(picked)) < abs(left(best)):
            best = picked
        if abs(left(best)) <= IMBALANCE or left(picked) * sign <= 0:
            break
        low, high = high, high * 2
    for _ in range(12):
        if abs(left(best)) <= IMBALANCE:
            break
        middle = (low + high) / 2
        picked = draw(sign * middle)
        low, high = (middle, high) if left(picked) * sign > 0 else (low, middle)
        if abs(left(picked)) < abs(left(best)):
            best = picked
    return best


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
