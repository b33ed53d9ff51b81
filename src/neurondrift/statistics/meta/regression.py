"""A meta-regression: how the effects of studies go with something that differs between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from neurondrift.statistics.meta.random_effects import UNDEFINED, Limits, arrays, limits

TOO_FEW = "fewer than three studies"
NO_SPREAD = "the studies do not differ in it"


@dataclass(frozen=True, kw_only=True)
class MetaRegression:
    """effect = intercept + slope × moderator over k studies, with what is left of the heterogeneity.

    `se`, `ci95` and `p` are of the slope, with t quantiles on k - 2 degrees of freedom. `tau2` is the variance of the
    true effects about the line. NaN where undefined, with the `reason`.
    """

    k: int
    intercept: float
    slope: float
    se: float
    ci95: Limits
    p: float
    tau2: float
    q: float
    reason: str = ""


def meta_regression(effects: Sequence[float], ses: Sequence[float], moderator: Sequence[float]) -> MetaRegression:
    """Mixed-effects meta-regression on one moderator, by the method of moments with Knapp and Hartung's errors.

    Parameters
    ----------
    effects, ses, moderator
        Of k studies; the standard errors above 0.

    Raises
    ------
    ConfigError
        Lengths that differ, or values that are not finite.

    Notes
    -----
    tau² = max(0, (Q_E - (k - 2)) / (tr W - tr((X'WX)⁻¹ X'W²X))) with W the inverse variances and Q_E the weighted
    residual sum of squares; then weighted least squares with weights 1 / (v + tau²), whose estimated scale is Knapp and
    Hartung's factor. As in `random_effects` that scale is taken to be at least 1. The fits are statsmodels' WLS.

    References
    ----------
    DerSimonian and Laird (1986); Raudenbush (2009), in The Handbook of Research Synthesis; Knapp and Hartung (2003).
    """
    effect_K, se_K = arrays(effects, ses)
    x_K, _ = arrays(moderator, se_K.tolist())
    if len(effect_K) < 3:
        return _undefined(len(effect_K), TOO_FEW)
    if np.ptp(x_K) <= 1e-12 * max(1.0, float(np.abs(x_K).max())):
        return _undefined(len(effect_K), NO_SPREAD)
    from statsmodels.regression.linear_model import WLS

    design_KP = np.column_stack([np.ones_like(x_K), x_K])
    weight_K, df = 1 / se_K**2, len(effect_K) - 2
    fixed = WLS(effect_K, design_KP, weights=weight_K).fit()
    q = float((weight_K * fixed.resid**2).sum())
    cross_PP = np.linalg.inv(design_KP.T @ (weight_K[:, None] * design_KP))
    trace = weight_K.sum() - np.trace(cross_PP @ (design_KP.T @ (weight_K[:, None] ** 2 * design_KP)))
    tau2 = max(0.0, (q - df) / float(trace))
    fit = WLS(effect_K, design_KP, weights=1 / (se_K**2 + tau2)).fit()
    intercept, slope = (float(value) for value in fit.params)
    se = float(np.sqrt(fit.normalized_cov_params[1, 1] * max(1.0, float(fit.scale))))
    return MetaRegression(
        k=len(effect_K),
        intercept=intercept,
        slope=slope,
        se=se,
        ci95=limits(slope, se, df, 0.95),
        p=2 * float(stats.t.sf(abs(slope) / se, df)),
        tau2=tau2,
        q=q,
    )


def _undefined(k: int, reason: str) -> MetaRegression:
    nan = math.nan
    return MetaRegression(k=k, intercept=nan, slope=nan, se=nan, ci95=UNDEFINED, p=nan, tau2=nan, q=nan, reason=reason)
