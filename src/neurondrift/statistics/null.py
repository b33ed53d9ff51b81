"""An outcome against those of random draws: its p-value, when draws may stop, the effect and its interval.

The interval is over prompts. Takes arrays and returns values.
Shapes: K = draws of the null, P = prompts (or examples), B = resamples.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import DataError

FloatArray = npt.NDArray[np.float64]
Direction = Literal["higher", "lower", "equal"]
#: What the comparisons of a group with its null say about a cause.
CauseVerdict = Literal["cause", "against", "too_few_draws", "no_evidence"]

#: A p-value at or below this is called evidence; with K draws it can be reached from K = 19 on.
ALPHA = 0.05
#: Distances from the centre that differ by less are ties.
TIE = 1e-12
#: The null's band holds this share of its draws.
BAND = 0.95


class NullComparison(NamedTuple):
    """An outcome beside the null.

    `value` of the group; `null_mean`, `null_sd` (NaN for fewer than 2 draws), `null_low` and `null_high` (the central
    95 % of the draws; for fewer than 40 these are their smallest and largest) of the K draws; `effect` = value -
    null_mean with `ci95`; `p` two-sided and empirical; `p_floor` the smallest that the planned draws allow (see
    `smallest_p`); `direction` of the effect; `draws` that were made; `n` prompts. `reason` says why something is NaN.
    """

    value: float
    null_mean: float
    null_sd: float
    null_low: float
    null_high: float
    effect: float
    ci95: tuple[float, float]
    p: float
    p_floor: float
    direction: Direction
    draws: int
    n: int
    reason: str


def empirical_p(value: float, null: npt.ArrayLike) -> float:
    """Two-sided (1 + #{draws at least as extreme}) / (1 + K).

    Extreme is the distance from the mean of all K + 1 outcomes, the group's among them. It treats them alike, so where
    the group is exchangeable with its draws, P(p <= a) <= a. NaN without draws.

    References
    ----------
    Phipson & Smyth (2010), Permutation p-values should never be zero. Stat. Appl. Genet. Mol. Biol. 9(1), 39.
    """
    draws = np.asarray(null, dtype=np.float64)
    return (1 + _as_extreme(value, draws)) / (1 + len(draws)) if len(draws) else math.nan


def _as_extreme(value: float, draws: FloatArray) -> int:
    """How many draws lie at least as far as the value from the mean of all of them, the value among them."""
    centre = (value + draws.sum()) / (1 + len(draws))
    return int((np.abs(draws - centre) >= abs(value - centre) - TIE).sum())


def smallest_p(draws: int) -> float:
    """The smallest p-value that K draws allow: 1/(1 + K); 1 for one draw, as two outcomes lie equally far from their
    mean."""
    return 1.0 if draws <= 1 else 1 / (1 + draws)


def is_settled(value: float, null: npt.ArrayLike, *, planned: int) -> bool:
    """Whether a null of `planned` draws may stop after those that were made, for want of evidence.

    It may once h of them are at least as extreme as the value (as in `empirical_p`), where h is the smallest number of
    at least 2 with (1 + h)/(1 + K) > 2 `ALPHA`, K = `planned`: 2 for K up to 28.

    Notes
    -----
    With g as extreme among the l draws made, the p-value of a stopped null is (1 + g)/(1 + l), and g >= h and l <= K
    make it larger than 2 `ALPHA`. So a p-value at or below a <= 2 `ALPHA` is always that of all K draws, fixed in
    advance, and P(p <= a) <= a holds as without stopping. Stopping can only hide evidence that later draws would have
    brought.

    References
    ----------
    Besag & Clifford (1991), Sequential Monte Carlo p-values. Biometrika 78(2), 301-304, who report h/l where this
    reports the larger (1 + g)/(1 + l).
    """
    draws = np.asarray(null, dtype=np.float64)
    return _as_extreme(value, draws) >= max(2, math.floor(2 * ALPHA * (1 + planned) + TIE))


def compare_with_null(
    group_P: npt.ArrayLike,
    null_KP: npt.ArrayLike,
    *,
    planned: int | None = None,
    weights_P: npt.ArrayLike | None = None,
    resamples: int = 2000,
    rng_seed: int = 0,
) -> NullComparison:
    """Compare the group's outcome on P prompts with that of K draws on the same prompts.

    Parameters
    ----------
    group_P
        The group's outcome for each prompt: 1 for a refusal; or the mean loss of an answer.
    null_KP
        The same for each draw of the null.
    planned
        Draws that `p_floor` is of, where the null could be stopped (`is_settled`); default: those that were made.
    weights_P
        Weight of each prompt in the mean, such as the tokens of its answer; equal where None.
    resamples, rng_seed
        Of the bootstrap.

    Returns
    -------
    NullComparison

    Raises
    ------
    DataError
        Shapes that do not fit, or no prompts.

    Notes
    -----
    The interval is the percentile bootstrap of the paired difference: prompts are drawn with replacement, the same for
    the group and for the null, and the K draws are drawn with replacement too. So it covers which prompts were asked
    and how many random groups were drawn; it does not cover another training seed. It is undefined where no prompt
    tells group and null apart.
    """
    group, null = np.asarray(group_P, dtype=np.float64), np.asarray(null_KP, dtype=np.float64)
    if null.size == 0:
        null = null.reshape(0, len(group))
    if group.ndim != 1 or null.ndim != 2 or null.shape[1] != len(group) or not len(group):
        raise DataError("Outcomes of group and null do not fit", received=f"{group.shape} and {null.shape}")
    weights = np.ones(len(group)) if weights_P is None else np.asarray(weights_P, dtype=np.float64)
    share = weights / weights.sum()
    value, means = float(group @ share), null @ share
    draws, n = len(null), len(group)
    if not draws:
        nan = math.nan
        return NullComparison(
            value, nan, nan, nan, nan, nan, (nan, nan), nan, nan, "equal", 0, n, "no random group was drawn"
        )
    effect = value - float(means.mean())
    tail = (1 - BAND) / 2
    low, high = np.quantile(means, [tail, 1 - tail]) if draws * tail >= 1 else (float(means.min()), float(means.max()))
    differs = not np.allclose(null, group)
    interval = _bootstrap(group, null, weights, resamples, rng_seed) if differs else (math.nan, math.nan)
    return NullComparison(
        value=value,
        null_mean=float(means.mean()),
        null_sd=float(means.std(ddof=1)) if draws > 1 else math.nan,
        null_low=float(low),
        null_high=float(high),
        effect=effect,
        ci95=interval,
        p=empirical_p(value, means),
        p_floor=smallest_p(draws if planned is None else planned),
        direction="equal" if abs(effect) < TIE else "higher" if effect > 0 else "lower",
        draws=draws,
        n=n,
        reason=""
        if differs and draws > 1
        else "one random group has no spread"
        if differs
        else "no prompt tells the group and its random groups apart",
    )


def _bootstrap(
    group: FloatArray, null: FloatArray, weights: FloatArray, resamples: int, rng_seed: int
) -> tuple[float, float]:
    generator = np.random.default_rng(rng_seed)
    n, draws = len(group), len(null)
    prompts_BP = generator.multinomial(n, np.full(n, 1 / n), size=resamples) * weights
    prompts_BP = prompts_BP / prompts_BP.sum(axis=1, keepdims=True)
    draws_BK = generator.multinomial(draws, np.full(draws, 1 / draws), size=resamples) / draws
    effects = prompts_BP @ group - np.einsum("bk,kp,bp->b", draws_BK, null, prompts_BP, optimize=True)
    low, high = np.quantile(effects, [0.025, 0.975])
    return float(low), float(high)


class Recovered(NamedTuple):
    """A change as a share of a reference change; NaN where the reference is zero."""

    group: float
    null: float


def share_of_change(value: float, null_mean: float, start: float, end: float) -> Recovered:
    """(value - start) / (end - start), for the group and for the null's mean."""
    if abs(end - start) < TIE:
        return Recovered(math.nan, math.nan)
    return Recovered((value - start) / (end - start), (null_mean - start) / (end - start))
