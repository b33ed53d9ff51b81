"""A random-effects meta-analysis: the mean over studies, its interval, and how much the studies differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from neurondrift.base.errors import ConfigError

Limits = tuple[float, float]
UNDEFINED: Limits = (math.nan, math.nan)
ONE = "one study: nothing to combine"
NONE = "no study with a defined effect and standard error"


@dataclass(frozen=True, kw_only=True)
class RandomEffects:
    """The mean of k effects and their heterogeneity; NaN where undefined, with the `reason`.

    Attributes
    ----------
    k
        Effects that were combined.
    effect
        Their mean under random-effects weights.
    se_dl, se_hksj
        Its standard error after DerSimonian and Laird, and after Hartung, Knapp, Sidik and Jonkman, as published.
    se
        The larger of the two, or what `bounded` says: it gives the intervals and `p`.
    ci90, ci95
        Limits with t quantiles on k - 1 degrees of freedom.
    p
        Of a mean of 0, two-sided.
    tau2, tau
        Variance of the true effects, and its root, in the units of the effects.
    i2
        Share of the observed variance that is not sampling error, 0 to 1.
    q, p_q
        Cochran's Q and its p-value, chi-squared with k - 1 degrees of freedom.
    prediction95
        Limits for the true effect in a further study; undefined below three.
    weights
        Of each effect, as they were given, summing to 1.
    bounded
        Whether the studies share their errors and the interval is the one that holds however closely
        (`dependent_mean`), as it is the wider.
    """

    k: int
    effect: float
    se_dl: float
    se_hksj: float
    se: float
    ci90: Limits
    ci95: Limits
    p: float
    tau2: float
    tau: float
    i2: float
    q: float
    p_q: float
    prediction95: Limits
    weights: tuple[float, ...]
    bounded: bool = False
    reason: str = ""


def arrays(effects: Sequence[float], ses: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Effects and standard errors as float64 `[k]`. Raises `ConfigError` unless all are finite and the errors > 0."""
    effect_K, se_K = np.asarray(effects, dtype=np.float64), np.asarray(ses, dtype=np.float64)
    if effect_K.shape != se_K.shape or effect_K.ndim != 1:
        raise ConfigError("Each effect needs one standard error", received=[effect_K.shape, se_K.shape])
    if not (np.isfinite(effect_K).all() and np.isfinite(se_K).all() and (se_K > 0).all()):
        raise ConfigError("Effects must be finite, and their standard errors finite and above 0")
    return effect_K, se_K


def random_effects(effects: Sequence[float], ses: Sequence[float]) -> RandomEffects:
    """DerSimonian and Laird's random-effects mean with Hartung and Knapp's interval.

    Parameters
    ----------
    effects, ses
        Of k independent studies, in the same units; the standard errors above 0.

    Returns
    -------
    RandomEffects
        With one study its effect, and no interval.

    Raises
    ------
    ConfigError
        Lengths that differ, or values that are not finite.

    Notes
    -----
    From `statsmodels.stats.meta_analysis.combine_effects` with `method_re="dl"`, which does not cut a negative tau² off
    at 0: there its fixed-effect figures are taken, which are those of tau² = 0. Hartung and Knapp's standard error can
    come out far below DerSimonian and Laird's where few studies agree by chance; the interval is the wider of the two
    (their own modification; `test="adhoc"` in metafor). The prediction interval is metafor's: t on k - 1 degrees of
    freedom, and the root of tau² plus the squared standard error.

    References
    ----------
    DerSimonian and Laird (1986), Controlled Clinical Trials 7. Knapp and Hartung (2003), Statistics in Medicine 22.
    Röver, Knapp and Friede (2015), BMC Medical Research Methodology 15. Higgins and Thompson (2002) for I². Higgins,
    Thompson and Spiegelhalter (2009) for the prediction interval.
    """
    effect_K, se_K = arrays(effects, ses)
    if len(effect_K) < 2:
        return _of_few(effect_K, se_K)
    from statsmodels.stats.meta_analysis import combine_effects

    with np.errstate(divide="ignore", invalid="ignore"):  # of a negative tau², whose figures are not taken
        found = combine_effects(effect_K, se_K**2, method_re="dl")
    varies = bool(found.tau2 > 0)
    tau2 = float(found.tau2) if varies else 0.0
    effect = float(found.mean_effect_re if varies else found.mean_effect_fe)
    se_dl = float(found.sd_eff_w_re if varies else found.sd_eff_w_fe)
    se_hksj = float(found.sd_eff_w_re_hksj if varies else found.sd_eff_w_fe_hksj)
    weights = found.weights_rel_re if varies else found.weights_rel_fe
    k, se, q = len(effect_K), max(se_dl, se_hksj), float(found.q)
    return RandomEffects(
        k=k,
        effect=effect,
        se_dl=se_dl,
        se_hksj=se_hksj,
        se=se,
        ci90=limits(effect, se, k - 1, 0.90),
        ci95=limits(effect, se, k - 1, 0.95),
        p=2 * float(stats.t.sf(abs(effect) / se, k - 1)),
        tau2=tau2,
        tau=math.sqrt(tau2),
        i2=max(0.0, float(found.i2)) if q > 0 else 0.0,
        q=q,
        p_q=float(stats.chi2.sf(q, k - 1)),
        prediction95=limits(effect, math.sqrt(tau2 + se**2), k - 1, 0.95) if k > 2 else UNDEFINED,
        weights=tuple(float(weight) for weight in weights),
    )


def dependent_mean(effects: Sequence[float], ses: Sequence[float]) -> RandomEffects:
    """The same for studies that share their errors: points of one model, whose groups and sites are the same.

    The mean and the heterogeneity are those of `random_effects`. However the errors go together, the standard error of
    a weighted mean is at most the weighted mean of the standard errors (the triangle inequality); where the normal
    interval of that bound is wider than Hartung and Knapp's, it is taken, and `bounded` says so. The prediction
    interval then rests on the bound too.
    """
    found = random_effects(effects, ses)
    if found.k < 2:
        return found
    bound = float(np.dot(found.weights, np.asarray(ses, dtype=np.float64)))
    own, other = found.ci95[1] - found.effect, float(stats.norm.ppf(0.975)) * bound
    if other <= own:
        return found
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    values |= {
        "se": bound,
        "bounded": True,
        "ci90": wider(found.ci90, limits(found.effect, bound, math.inf, 0.90)),
        "ci95": limits(found.effect, bound, math.inf, 0.95),
        "p": 2 * float(stats.norm.sf(abs(found.effect) / bound)),
        "prediction95": wider(
            found.prediction95, limits(found.effect, math.sqrt(found.tau2 + bound**2), found.k - 1, 0.95)
        )
        if found.k > 2
        else UNDEFINED,
    }
    return RandomEffects(**values)


def wider(first: Limits, second: Limits) -> Limits:
    """The wider of two intervals about the same value."""
    return first if first[1] - first[0] >= second[1] - second[0] else second


def limits(value: float, se: float, df: float, level: float) -> Limits:
    """Value ± t quantile × standard error; `df` infinite: the normal quantile."""
    upper = 0.5 + level / 2
    reach = float(stats.norm.ppf(upper) if math.isinf(df) else stats.t.ppf(upper, df)) * se
    return value - reach, value + reach


def _of_few(effect_K: NDArray[np.float64], se_K: NDArray[np.float64]) -> RandomEffects:
    """None, or one: nothing is combined."""
    one, nan = len(effect_K) == 1, math.nan
    return RandomEffects(
        k=len(effect_K),
        effect=float(effect_K[0]) if one else nan,
        se_dl=float(se_K[0]) if one else nan,
        se_hksj=nan,
        se=float(se_K[0]) if one else nan,
        ci90=UNDEFINED,
        ci95=UNDEFINED,
        p=nan,
        tau2=nan,
        tau=nan,
        i2=nan,
        q=nan,
        p_q=nan,
        prediction95=UNDEFINED,
        weights=(1.0,) if one else (),
        reason=ONE if one else NONE,
    )
