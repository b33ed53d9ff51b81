"""An outcome against those of random draws: its p-value, when draws may stop, the effect, its interval, its standing.

The interval is over prompts. Takes arrays and returns values.
Shapes: K = draws of the null, P = prompts (or examples), B = resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from neurondrift.base.errors import DataError
from neurondrift.statistics.design.levels import ALPHA, POWER

FloatArray = npt.NDArray[np.float64]
Direction = Literal["higher", "lower", "equal"]
#: What the comparisons of a group with its null say about a cause.
CauseVerdict = Literal["cause", "against", "too_few_draws", "no_evidence"]
#: How a group stands among its random groups. `stands_out` and `opposite`: the p-value survives the correction for all
#: tests and the interval excludes effects below the smallest of interest, in the expected direction or against it;
#: `small`: the p-value survives, the interval does not exclude them; `too_few_draws`: no p-value of so many draws can.
Standing = Literal["stands_out", "opposite", "small", "not", "stopped", "too_few_draws", "undefined"]

#: Distances from the centre that differ by less are ties.
TIE = 1e-12
#: The null's band holds this share of its draws.
BAND = 0.95
#: Fewer draws have no spread to plan by.
FEWEST_DRAWS = 5


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
    the group is exchangeable with its draws, P(p <= a) <= a. Draws without an outcome (NaN) count as extreme and do not
    count for the mean. NaN without draws, and for a group without an outcome.

    References
    ----------
    Phipson & Smyth (2010), Permutation p-values should never be zero. Stat. Appl. Genet. Mol. Biol. 9(1), 39.
    """
    draws = np.asarray(null, dtype=np.float64)
    if not len(draws) or math.isnan(value):
        return math.nan
    return (1 + _as_extreme(value, draws)) / (1 + len(draws))


def _as_extreme(value: float, draws: FloatArray) -> int:
    """How many draws lie at least as far as the value from the mean of all of them, the value among them."""
    known = draws[np.isfinite(draws)]
    centre = (value + known.sum()) / (1 + len(known))
    return int((np.abs(known - centre) >= abs(value - centre) - TIE).sum()) + len(draws) - len(known)


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
    advance, and P(p <= a) <= a holds as without stopping: all that is asked of group and draws is what the whole null
    asks, that they are exchangeable (draws may hold members, and the same group twice). Stopping can only hide evidence
    that later draws would have brought. A group without an outcome (NaN) is never settled.

    References
    ----------
    Besag & Clifford (1991), Sequential Monte Carlo p-values. Biometrika 78(2), 301-304, who report h/l where this
    reports the larger (1 + g)/(1 + l).
    """
    draws = np.asarray(null, dtype=np.float64)
    return not math.isnan(value) and _as_extreme(value, draws) >= max(2, math.floor(2 * ALPHA * (1 + planned) + TIE))


class Outcome(NamedTuple):
    """The group's outcome on each prompt `[P]`, that of each draw `[K, P]`, and the weight of each prompt `[P]` in the
    mean (None: equal). NaN: the prompt does not count in that run."""

    group_P: FloatArray
    null_KP: FloatArray
    weights_P: FloatArray | None = None

    def means(self) -> tuple[float, FloatArray]:
        """The weighted means over the prompts that count, of the group and of each draw; NaN where none does."""
        share = self._weights()[None, :]
        return float(_means(self.group_P[None, :], share)[0, 0]), _means(self.null_KP, share)[0]

    def resampled(self, prompts_BP: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The same for prompts drawn with replacement: `[B]` and `[B, K]`."""
        share_BP = prompts_BP * self._weights()
        return _means(self.group_P[None, :], share_BP)[:, 0], _means(self.null_KP, share_BP)

    def _weights(self) -> FloatArray:
        return np.ones(len(self.group_P)) if self.weights_P is None else self.weights_P


def _means(values_KP: FloatArray, weights_BP: FloatArray) -> FloatArray:
    """Weighted means `[B, K]` over the prompts that have a value."""
    known_KP = np.isfinite(values_KP)
    sums = weights_BP @ np.where(known_KP, values_KP, 0.0).T
    totals = weights_BP @ known_KP.T.astype(np.float64)
    return np.divide(sums, totals, out=np.full(sums.shape, np.nan), where=totals > 0)


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
        The group's outcome for each prompt: 1 for a refusal; or the mean loss of an answer. NaN where the prompt does
        not count in this run, such as one whose answer cannot be read.
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
    outcome = outcome_of(group_P, null_KP, weights_P)
    return _compared([(1.0, outcome)], planned=planned, resamples=resamples, rng_seed=rng_seed)


def compare_difference(
    first: Outcome, second: Outcome, *, planned: int | None = None, resamples: int = 2000, rng_seed: int = 0
) -> NullComparison:
    """The outcome on some prompts minus that on others, such as harmful minus ordinary, of the group and of the same K
    draws. As `compare_with_null`; the prompts of either kind are resampled by themselves, the draws together; `n` is
    the number of prompts of the first kind."""
    return _compared([(1.0, first), (-1.0, second)], planned=planned, resamples=resamples, rng_seed=rng_seed)


def outcome_of(group_P: npt.ArrayLike, null_KP: npt.ArrayLike, weights_P: npt.ArrayLike | None = None) -> Outcome:
    """An `Outcome` of arrays that fit. Raises `DataError` where they do not, or there are no prompts."""
    group, null = np.asarray(group_P, dtype=np.float64), np.asarray(null_KP, dtype=np.float64)
    if null.size == 0:
        null = null.reshape(0, len(group))
    if group.ndim != 1 or null.ndim != 2 or null.shape[1] != len(group) or not len(group):
        raise DataError("Outcomes of group and null do not fit", received=f"{group.shape} and {null.shape}")
    return Outcome(group, null, None if weights_P is None else np.asarray(weights_P, dtype=np.float64))


def _compared(
    parts: Sequence[tuple[float, Outcome]], *, planned: int | None, resamples: int, rng_seed: int
) -> NullComparison:
    """The comparison of a signed sum of outcomes."""
    pairs = [(sign, *outcome.means()) for sign, outcome in parts]
    value = sum(sign * own for sign, own, _ in pairs)
    means: FloatArray = np.sum([sign * null for sign, _, null in pairs], axis=0)
    known = means[np.isfinite(means)]
    draws, n = len(means), len(parts[0][1].group_P)
    if math.isnan(value) or not len(known):
        why = "no random group was drawn" if not draws else "the group has no answer that counts"
        nan, why = math.nan, why if math.isnan(value) or not draws else "no random group has an answer that counts"
        floor = smallest_p(draws if planned is None else planned) if draws else nan
        return NullComparison(value, nan, nan, nan, nan, nan, (nan, nan), nan, floor, "equal", draws, n, why)
    centre = float(known.mean())
    effect = value - centre
    tail = (1 - BAND) / 2
    low, high = (
        np.quantile(known, [tail, 1 - tail]) if len(known) * tail >= 1 else (float(known.min()), float(known.max()))
    )
    differs = any(not np.allclose(part.null_KP, part.group_P, equal_nan=True) for _, part in parts)
    return NullComparison(
        value=value,
        null_mean=centre,
        null_sd=float(known.std(ddof=1)) if len(known) > 1 else math.nan,
        null_low=float(low),
        null_high=float(high),
        effect=effect,
        ci95=_bootstrap(parts, resamples, rng_seed) if differs else (math.nan, math.nan),
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


def _bootstrap(parts: Sequence[tuple[float, Outcome]], resamples: int, rng_seed: int) -> tuple[float, float]:
    generator = np.random.default_rng(rng_seed)
    asked = [
        generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        for n in (len(part.group_P) for _, part in parts)
    ]
    draws = len(parts[0][1].null_KP)
    draws_BK = generator.multinomial(draws, np.full(draws, 1 / draws), size=resamples)
    own_B, null_BK = np.zeros(resamples), np.zeros((resamples, draws))
    for (sign, part), prompts_BP in zip(parts, asked, strict=True):
        own, null = part.resampled(prompts_BP)
        own_B, null_BK = own_B + sign * own, null_BK + sign * null
    weights_BK = np.where(np.isfinite(null_BK), draws_BK, 0)  # a draw without an answer that counts has no mean
    totals_B = weights_BK.sum(axis=1)
    effects_B = own_B[totals_B > 0] - (
        (weights_BK * np.nan_to_num(null_BK)).sum(axis=1)[totals_B > 0] / totals_B[totals_B > 0]
    )
    effects_B = effects_B[np.isfinite(effects_B)]
    if not len(effects_B):
        return math.nan, math.nan
    low, high = np.quantile(effects_B, [0.025, 0.975])
    return float(low), float(high)


def stopped(comparison: NullComparison, *, decided: bool) -> NullComparison:
    """A comparison whose null was stopped: without effect, interval and range, as its draws were made until they looked
    like the group. `decided`: the outcome that decided about the stop, whose p-value (above 2 `ALPHA`) holds; those of
    other outcomes on these draws are not adjusted for it, and go too."""
    nan = math.nan
    return comparison._replace(
        null_mean=nan,
        null_sd=nan,
        null_low=nan,
        null_high=nan,
        effect=nan,
        ci95=(nan, nan),
        p=comparison.p if decided else nan,
        direction="equal",
        reason="stopped",
    )


def standing(
    comparison: NullComparison,
    p_holm: float,
    *,
    tests: int,
    expected: Direction,
    smallest_effect: float,
    was_stopped: bool = False,
) -> Standing:
    """How a group stands among its random groups.

    Parameters
    ----------
    comparison
        With the effect on refusals, a share.
    p_holm
        Its p-value after Holm's correction for all `tests`.
    expected
        The direction of an effect that the group's change causes.
    smallest_effect
        The smallest effect of interest, in the unit of the effect: the interval has to lie beyond it.
    """
    if was_stopped:
        return "stopped"
    if math.isnan(comparison.p):
        return "undefined"
    if p_holm <= ALPHA + TIE:
        low, high = comparison.ci95
        beyond = comparison.direction == "higher" and low > smallest_effect
        beyond = beyond or (comparison.direction == "lower" and high < -smallest_effect)
        if not beyond:
            return "small"
        return "stands_out" if comparison.direction == expected else "opposite"
    return "too_few_draws" if comparison.p_floor * tests > ALPHA + TIE else "not"


def draws_needed(tests: int) -> int:
    """The fewest draws whose smallest p-value is at most `ALPHA` after a correction for so many tests."""
    return max(2, math.ceil(tests / ALPHA - TIE) - 1)


def smallest_found(
    *, null_sd: float, n: int, draws: int, tests: int, smallest_effect: float, power: float = POWER
) -> float:
    """The smallest true effect on a share that `standing` would call `stands_out` with this probability.

    NaN where no p-value of so many draws survives the correction, or their spread is not known; infinite where no
    effect up to 1 is found so often.

    Parameters
    ----------
    null_sd
        Standard deviation of the draws' shares: groups without an effect of their own vary so much.
    n
        Prompts.
    draws, tests
        Draws of the null, and tests that the p-values are corrected for, in the first step of Holm's procedure.
    smallest_effect
        As in `standing`.

    Notes
    -----
    A group with effect d has the estimate d + e, e normal with variance null_sd² + d(1 - d)/n: its own spread, and that
    of a share d of n prompts that turn. It is found where at most floor(ALPHA (1 + K)/tests) - 1 of K normal draws are
    as extreme, and the estimate less 1.96 standard errors (of the prompts, and of the mean of K draws) is beyond the
    smallest effect. The probability is the mean over e.
    """
    effects = np.arange(1, 201) / 200
    of_prompts = effects * (1 - effects) / n
    return _first_found(effects, of_prompts, null_sd, draws, tests, smallest_effect, power)


def smallest_shift(
    *,
    null_sd: float,
    prompt_se: float,
    draws: int,
    tests: int,
    smallest_effect: float,
    most: float,
    power: float = POWER,
) -> float:
    """The same of an outcome that is no share, such as a margin: the smallest true effect, in its own unit.

    Parameters
    ----------
    null_sd
        Standard deviation of the draws' means.
    prompt_se
        Standard error of the difference between a draw and the mean of all on the same prompts (`prompt_error`).
    draws, tests, smallest_effect
        As in `smallest_found`.
    most
        The largest effect that is tried: infinite where none up to it is found so often.

    Notes
    -----
    As in `smallest_found`, with prompt_se² in place of d(1 - d)/n: prompts are taken to differ by as much in what a
    group with an effect does to them as in what a random group does.
    """
    if not math.isfinite(prompt_se) or not most > 0:
        return math.nan
    effects = most * np.arange(1, 201) / 200
    return _first_found(effects, np.full(200, prompt_se**2), null_sd, draws, tests, smallest_effect, power)


def prompt_error(null_KP: npt.ArrayLike) -> float:
    """Standard error over prompts of a draw's difference from the mean of all draws, the mean over draws; NaN for
    fewer than two draws or prompts."""
    null = np.asarray(null_KP, dtype=np.float64)
    if null.ndim != 2 or min(null.shape) < 2:
        return math.nan
    differences_KP = null - null.mean(axis=0)
    return float(differences_KP.std(axis=1, ddof=1).mean() / math.sqrt(null.shape[1]))


def _first_found(
    effects: FloatArray,
    of_prompts: FloatArray,
    null_sd: float,
    draws: int,
    tests: int,
    smallest_effect: float,
    power: float,
) -> float:
    """The first of the effects, each with its variance over prompts, that is found with that probability."""
    extreme = math.floor(ALPHA * (1 + draws) / tests + TIE) - 1
    if extreme < 0 or draws <= 1 or not math.isfinite(null_sd):
        return math.nan
    quantiles = stats.norm.ppf((np.arange(400) + 0.5) / 400)
    for effect, variance in zip(effects.tolist(), of_prompts.tolist(), strict=True):
        estimates = effect + quantiles * math.sqrt(null_sd**2 + variance)
        as_extreme = 2 * stats.norm.sf(np.abs(estimates) / max(null_sd, TIE))
        surprising = stats.binom.cdf(extreme, draws, as_extreme)
        beyond = estimates - stats.norm.ppf(0.975) * math.sqrt(variance + null_sd**2 / draws) > smallest_effect
        if (surprising * beyond).mean() >= power:
            return float(effect)
    return math.inf


class Recovered(NamedTuple):
    """A change as a share of a reference change; NaN where the reference is zero."""

    group: float
    null: float


def share_of_change(value: float, null_mean: float, start: float, end: float) -> Recovered:
    """(value - start) / (end - start), for the group and for the null's mean."""
    if abs(end - start) < TIE:
        return Recovered(math.nan, math.nan)
    return Recovered((value - start) / (end - start), (null_mean - start) / (end - start))
