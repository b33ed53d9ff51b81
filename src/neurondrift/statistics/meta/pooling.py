"""What several studies say of one group: models are the unit, points of one model share their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neurondrift.statistics.meta.random_effects import RandomEffects, dependent_mean, random_effects
from neurondrift.statistics.results import Verdict, decide

Unit = Literal["model", "point"]


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The log ratio of a group over several studies, and the verdict that its intervals allow.

    Attributes
    ----------
    unit
        `model`: the mean of each model is one effect, and models are independent. `point`: all are of one model, and
        the interval holds however closely their errors go together.
    points, models
        How many went in.
    over
        The meta-analysis over the units, of log ratios.
    verdict
        By the rule of one study (`results.decide`), at the band's logarithm.
    ratio, ratio_ci90, ratio_ci95, ratio_prediction95
        Exponentials of the effect and its limits.
    below_band
        The 95 % interval excludes 1, yet the 90 % interval lies within the band.
    p_equivalence
        Of a mean outside of the band: the larger of two one-sided tests.
    """

    unit: Unit
    points: int
    models: int
    over: RandomEffects
    verdict: Verdict
    ratio: float
    ratio_ci90: tuple[float, float]
    ratio_ci95: tuple[float, float]
    ratio_prediction95: tuple[float, float]
    below_band: bool
    p_equivalence: float


def pooled(log_ratios: Sequence[float], ses: Sequence[float], models: Sequence[str], *, band: float) -> Pooled:
    """One group in one metric over several points.

    Parameters
    ----------
    log_ratios, ses, models
        Of each point: the log of the ratio to comparable neurons, its standard error, and which model it is of.
    band
        The ratio within which groups count as moving alike, above 1.

    Returns
    -------
    Pooled
        Over models where there are two or more: each is the mean of its points (`dependent_mean`), and those are
        combined by `random_effects`. Over points otherwise, by `dependent_mean`.

    Raises
    ------
    ConfigError
        As `random_effects`; a band that is not above 1.
    """
    named = list(dict.fromkeys(models))
    of_model = [
        dependent_mean(
            [value for value, model in zip(log_ratios, models, strict=True) if model == each],
            [se for se, model in zip(ses, models, strict=True) if model == each],
        )
        for each in named
    ]
    unit: Unit = "model" if len(named) > 1 else "point"
    if unit == "model":
        over = random_effects([one.effect for one in of_model], [one.se for one in of_model])
    else:
        over = of_model[0] if of_model else random_effects([], [])
    sesoi = math.log(band) if band > 0 else math.nan
    excludes = over.ci95[0] > 0 or over.ci95[1] < 0
    verdict = decide(over.ci90, over.ci95, sesoi)
    return Pooled(
        unit=unit,
        points=len(log_ratios),
        models=len(named),
        over=over,
        verdict=verdict,
        ratio=math.exp(over.effect),
        ratio_ci90=_exp(over.ci90),
        ratio_ci95=_exp(over.ci95),
        ratio_prediction95=_exp(over.prediction95),
        below_band=verdict == "similar" and excludes,
        p_equivalence=_outside(over, sesoi),
    )


def _outside(over: RandomEffects, sesoi: float) -> float:
    from scipy import stats

    if not (math.isfinite(over.ci95[0]) and over.se > 0):
        return math.nan
    nearer = (sesoi - abs(over.effect)) / over.se
    return float(stats.norm.sf(nearer) if over.bounded else stats.t.sf(nearer, over.k - 1))


def _exp(limits: tuple[float, float]) -> tuple[float, float]:
    return math.exp(limits[0]), math.exp(limits[1])
