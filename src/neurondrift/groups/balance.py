"""Balance of |w| of a group and its control in one site: how far off it is, how near it can be, and draws within it.

Knows arrays and indices; no strata are formed here and no groups read.
Shapes: N places of a site, K members of the group, M candidates. Draws are indices into the N.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.groups.group import Indices

# Standardised mean difference of |w| beyond which a site counts as unbalanced.
LIMIT = 0.05
# The same for sums that were brought up to date instead of taken anew.
WITHIN = LIMIT * (1 - 1e-9)
# Swaps that `shuffled` proposes for each member.
SWAPS = 100


def imbalance(own_K: npt.NDArray[Any], control_K: npt.NDArray[Any]) -> float:
    """Standardised mean difference: difference of the means over the root of the mean variance.

    0 for equal means and where there are fewer than 2 values, infinite where different means have no variance.
    """
    if len(own_K) < 2 or len(control_K) < 2:
        return 0.0
    difference = own_K.mean(dtype=np.float64) - control_K.mean(dtype=np.float64)
    spread = np.sqrt((own_K.var(dtype=np.float64) + control_K.var(dtype=np.float64)) / 2)
    return float(_standardised(difference, spread))


def _standardised(difference: Any, spread: Any) -> npt.NDArray[np.float64]:
    difference = np.asarray(difference, dtype=np.float64)
    without = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.divide(difference, spread, out=without, where=spread > 0)


class Ends(NamedTuple):
    """A control made of the smallest and the largest candidates only, and whether the limit lies within what controls
    can reach. If so, the control is the least unbalanced of its kind; if not, no control's mean of |w| is nearer."""

    nearest: Indices
    balanceable: bool


def at_the_ends(values_N: npt.NDArray[Any], own_K: Indices, candidates_M: Indices) -> Ends:
    """Can a choice of k candidates bring the mean of |w| near enough to the members'?

    Let m and v be mean and variance of a choice, and a and s² those of the k members. It is not too small where
    m + δ √((s² + v) / 2) ≥ a. In each single chosen value (the others fixed) the left side is convex, so that it does
    not fall when that value is exchanged for the smallest or for the largest that is unused. Hence its maximum is
    reached by the j smallest and k - j largest candidates for some j: k + 1 sums decide. The same holds for too large.
    What lies between the two can still be missed where values are coarse (`any_subset`).
    """
    k, m = len(own_K), len(candidates_M)
    order = np.argpartition(values_N[candidates_M], sorted({k - 1, m - k}))
    low, high = candidates_M[order[:k]], candidates_M[order[m - k :]]
    low, high = low[np.argsort(values_N[low], kind="stable")], high[np.argsort(-values_N[high], kind="stable")]
    centre = values_N[own_K].mean(dtype=np.float64)

    def sums(power: int) -> npt.NDArray[np.float64]:
        smallest = np.cumsum(np.append(0.0, (values_N[low].astype(np.float64) - centre) ** power))
        largest = np.cumsum(np.append(0.0, (values_N[high].astype(np.float64) - centre) ** power))
        return smallest + largest[::-1]

    total = sums(1)
    off = _off(total, sums(2), k, values_N[own_K].var(dtype=np.float64))
    balanceable = bool(off.min() <= LIMIT and off.max() >= -LIMIT)
    # A difference that stays is not hidden behind a greater variance: there the means decide.
    j = int(np.argmin(np.abs(off if balanceable else total)))
    return Ends(np.concatenate([low[:j], high[: k - j]]), balanceable)


def _off(total: Any, squares: Any, k: int, variance: float) -> npt.NDArray[np.float64]:
    """`imbalance` of choices of k values from the sums of their (squared) distances from the members' mean."""
    mean = total / k
    return _standardised(-mean, np.sqrt((variance + np.maximum(squares / k - mean**2, 0.0)) / 2))


def swapped(
    values_N: npt.NDArray[Any], own_K: Indices, candidates_M: Indices, drawn_K: Indices, generator: np.random.Generator
) -> Indices:
    """`drawn_K` with members exchanged for unused candidates, at random, until the site is balanced.

    Each step looks at every pair of a drawn and an unused candidate and takes any of the swaps that balance the site,
    each with the same chance; where there is none, any of those that bring it nearer; without these it ends.
    """
    centre, variance = values_N[own_K].mean(dtype=np.float64), values_N[own_K].var(dtype=np.float64)
    picked_K, unused = drawn_K.copy(), np.setdiff1d(candidates_M, drawn_K, assume_unique=True)
    while True:
        inside = values_N[picked_K].astype(np.float64)[:, None] - centre  # [k, 1]
        outside = values_N[unused].astype(np.float64) - centre  # [m - k]
        total, squares = inside.sum(), (inside**2).sum()
        now = abs(float(_off(total, squares, len(own_K), variance)))
        after = np.abs(_off(total - inside + outside, squares - inside**2 + outside**2, len(own_K), variance))
        balanced = np.flatnonzero(after <= WITHIN)
        choice = balanced if len(balanced) else np.flatnonzero(after < now * (1 - 1e-9))
        if not len(choice):
            return picked_K
        leaves, enters = divmod(int(choice[generator.integers(len(choice))]), len(unused))
        picked_K[leaves], unused[enters] = unused[enters], picked_K[leaves]
        if len(balanced):
            return picked_K


def shuffled(
    values_N: npt.NDArray[Any], own_K: Indices, candidates_M: Indices, drawn_K: Indices, generator: np.random.Generator
) -> Indices:
    """`drawn_K`, a balanced draw, after a random walk among the balanced draws.

    A Metropolis walk: a random member and a random unused candidate are swapped wherever that leaves the site balanced,
    so that in the long run every balanced draw in reach has the same chance, however `drawn_K` was come by.
    """
    k = len(own_K)
    pool = np.concatenate([drawn_K, np.setdiff1d(candidates_M, drawn_K, assume_unique=True)])  # the first k are drawn
    if len(pool) == k:
        return drawn_K
    distances = (values_N[pool].astype(np.float64) - values_N[own_K].mean(dtype=np.float64)).tolist()
    variance = float(values_N[own_K].var(dtype=np.float64))
    total, squares = sum(distances[:k]), sum(distance**2 for distance in distances[:k])
    order = list(range(len(pool)))
    leaving = generator.integers(k, size=SWAPS * k).tolist()
    entering = generator.integers(k, len(pool), size=SWAPS * k).tolist()
    for leaves, enters in zip(leaving, entering, strict=True):
        old, new = distances[leaves], distances[enters]
        new_total, new_squares = total - old + new, squares - old**2 + new**2
        mean = new_total / k
        if mean**2 <= WITHIN**2 * (variance + new_squares / k - mean**2) / 2:
            distances[leaves], distances[enters] = new, old
            order[leaves], order[enters] = order[enters], order[leaves]
            total, squares = new_total, new_squares
    return pool[order[:k]]


def any_subset(
    values_N: npt.NDArray[Any], own_K: Indices, candidates_M: Indices, generator: np.random.Generator
) -> Indices:
    """One of all choices of candidates that balance the site, each with the same chance; if none does, the one whose
    mean is nearest."""
    choices = np.array(list(combinations(range(len(candidates_M)), len(own_K))))
    distances = values_N[candidates_M].astype(np.float64)[choices] - values_N[own_K].mean(dtype=np.float64)
    variance = values_N[own_K].var(dtype=np.float64)
    total = distances.sum(axis=1)
    balanced = np.flatnonzero(np.abs(_off(total, (distances**2).sum(axis=1), len(own_K), variance)) <= WITHIN)
    return candidates_M[choices[generator.choice(balanced) if len(balanced) else int(np.argmin(np.abs(total)))]]


def tilted(
    values_N: npt.NDArray[Any],
    own_K: Indices,
    drawn_K: Indices,
    pools: list[Indices],
    wanted: npt.NDArray[np.int64],
    goal: float,
    generator: np.random.Generator,
) -> Indices:
    """A draw that favours large (or small) |w| just enough for the means to agree; `drawn_K` where none is better.

    Where members lie beyond every candidate, equal counts alone leave the control too small. Candidates are then
    drawn without replacement with probability ∝ (share of their stratum) · exp(tilt · |w|), as the largest of
    log-probability + Gumbel noise (Kool et al. 2019); the tilt is found by bisection at fixed noise, until the site
    is within `goal`.
    """
    pool = np.concatenate(pools)
    if len(pool) <= len(own_K):
        return drawn_K
    sizes = np.array([len(part) for part in pools])
    with np.errstate(divide="ignore", invalid="ignore"):
        chance = np.repeat(np.log(wanted / sizes), sizes) + generator.gumbel(size=len(pool))
    spread = float(values_N[own_K].std()) or 1.0
    scaled = (values_N[pool] - values_N[own_K].mean()) / spread

    def draw(tilt: float) -> Indices:
        key = tilt * scaled + chance
        return pool[np.argpartition(key, len(pool) - len(own_K))[len(pool) - len(own_K) :]]

    def left(picked_K: Indices) -> float:
        return imbalance(values_N[own_K], values_N[picked_K])

    best = drawn_K
    sign = 1.0 if left(drawn_K) > 0 else -1.0
    low, high = 0.0, 0.25
    for _ in range(16):
        picked_K = draw(sign * high)
        if abs(left(picked_K)) < abs(left(best)):
            best = picked_K
        if abs(left(best)) <= goal or left(picked_K) * sign <= 0:
            break
        low, high = high, high * 2
    for _ in range(12):
        if abs(left(best)) <= goal:
            break
        middle = (low + high) / 2
        picked_K = draw(sign * middle)
        low, high = (middle, high) if left(picked_K) * sign > 0 else (low, middle)
        if abs(left(picked_K)) < abs(left(best)):
            best = picked_K
    return best
