"""Intervals and tests over clusters: sites, and training seeds where there are three or more.

Sites are the clusters within a run; neurons of a site share its optimiser history and its place in the
network. The same sites return in every seed, so sites and seeds are crossed, not nested. The variance of
an effect averaged over S seeds and J sites has three parts, estimated from the per-site contributions
("influences") U [J, S], which sum to zero over sites:

    V_site = J/(J-1) sum_j mean_s(U_js)^2                       sites (and the noise inside them)
    V_seed = var_s(estimate_s) / S                              seeds, plus interaction
    V_int  = J/(J-1) sum_js (U_js - mean_s U_js)^2 / (S (S-1))  site-by-seed interaction and noise
    V      = V_site + max(V_seed - V_int, 0)

with U from the jackknife over sites (CR3: slightly too wide with few sites, where the sandwich is too
narrow). The reference distribution of (estimate - truth) / sqrt(V) is the symmetric studentised cluster
bootstrap over sites (Student's t below `FEWEST_SITES_FOR_BOOTSTRAP` sites, or `FEWEST_LAYERS_FOR_BOOTSTRAP` layers
where those are the units), its quantiles averaged with those of Student's t on S - 1 degrees of freedom for the seeds,
in the proportions of V (Cochran and Cox's approximation to the Behrens-Fisher problem).

Tried and left, with the false positives of a nominal 5 % test in simulation (7 to 210 unequal sites,
lognormal scales): Student's t on J - 1 df with the sandwich, 6 to 13 %; the equal-tailed bootstrap-t with the
sandwich, 5 to 9 %, and with the jackknife, 5 to 7.5 %; Satterthwaite's df over sites, 0.4 to 5 %; the form
here, 4 to 6 %. With 6 to 8 layers of like size the bootstrap gives 2 to 4 %, Student's t 4.5 to 5.5 %; with 10 it is 4
against 5 %, but Student's t then calls up to 6.4 % wrongly "similar". The equivalence test asks both bootstraps, the
symmetric and the equal-tailed (see `Inference.equivalence_interval`). Over three seeds, with effects that 30, 12 or 6
layers share or not: Satterthwaite's df give 2 to 9 %, the convolution of both parts (Behrens-Fisher's fiducial form)
1.5 to 6 %, the average of quantiles 4 to 5 % with 30 layers and 1.5 to 6 % with fewer, the mean of that and of
Satterthwaite's 2 to 7 %; a raw bootstrap of three seeds is too narrow by sqrt(2/3) and more.
`benchmarks/calibration.py` tests the choice on whole simulated studies.

Shapes: N neurons, H strata, S seeds, J sites, Q sums per site, B resamples, K outcomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special  # type: ignore[import-untyped,unused-ignore]
from statsmodels.stats.multitest import multipletests  # type: ignore[import-untyped,unused-ignore]

from neurondrift.base.errors import DataError
from neurondrift.statistics.estimates import BoolArray, FloatArray, IntArray, Statistic

Units = Literal["sites", "layers"]

FEWEST_SEEDS = 3
FEWEST_SITES_FOR_BOOTSTRAP = 6
#: The same for layers, of which there are few and which are alike in size.
FEWEST_LAYERS_FOR_BOOTSTRAP = 10
#: Cells drawn at a time by the label permutation: bounds its memory.
CHUNK = 2_000_000


class Differentiable(Protocol):
    """A function of totals with its gradient: see `estimates.MatchedEffect`."""

    def __call__(self, totals: FloatArray) -> FloatArray: ...

    def gradient(self, totals: FloatArray) -> FloatArray: ...


def _sorted_quantile(draws: FloatArray, q: FloatArray) -> FloatArray:
    """`numpy.quantile` of draws that are sorted already, which saves half the time of an analysis."""
    return np.interp(q * (len(draws) - 1), np.arange(len(draws)), draws)


class Reference(NamedTuple):
    """Distribution of a studentised estimate under its true value.

    ``site_draws`` are sorted draws for the sites' part (symmetric: with both signs of each, so 2 B of them), or None
    for Student's t with ``site_df``; ``seed_share`` is the share of the seeds in the variance, with Student's
    t on ``seed_df``.
    """

    site_draws: FloatArray | None
    site_df: float
    seed_df: float = np.inf
    seed_share: float = 0.0

    def lower(self, x: float) -> float:
        """P(T <= x); never zero with bootstrap draws, as the observed value counts as one of them."""
        if self.seed_share > 0:
            return self._inverse(x)
        if self.site_draws is None:
            return float(special.stdtr(self.site_df, x))
        return self._tail(int(np.searchsorted(self.site_draws, x, side="right")))

    def upper(self, x: float) -> float:
        """P(T >= x), by the same rule."""
        if self.seed_share > 0 or self.site_draws is None:
            return 1.0 - self.lower(x)
        return self._tail(len(self.site_draws) - int(np.searchsorted(self.site_draws, x, side="left")))

    def _tail(self, count: int) -> float:
        """So that twice the smaller tail is (1 + count) / (1 + B), with `count` draws |t*| >= |t| of B."""
        assert self.site_draws is not None
        return min(1.0, (1 + count) / (2 + len(self.site_draws)))

    def quantile(self, q: float) -> float:
        """The quantile of the sites' part and that of the seeds', weighted by their shares of the variance."""
        if self.site_draws is None:
            sites = float(special.stdtrit(self.site_df, q))
        else:
            sites = float(_sorted_quantile(self.site_draws, np.array(q)))
        if not self.seed_share > 0:
            return sites
        return (1 - self.seed_share) * sites + self.seed_share * float(special.stdtrit(self.seed_df, q))

    def _inverse(self, x: float) -> float:
        """The q whose quantile is `x`."""
        tiny = 1e-12
        if x <= self.quantile(tiny) or x >= self.quantile(1 - tiny):
            return tiny if x <= 0 else 1 - tiny
        return float(optimize.brentq(lambda q: self.quantile(q) - x, tiny, 1 - tiny, xtol=1e-9))


class Inference(NamedTuple):
    """An estimate with its standard error and reference distribution; NaN with a reason where undefined."""

    value: float
    se: float
    reference: Reference | None
    per_seed: FloatArray
    sites: int
    method: str
    reason: str
    skewed: Reference | None = None

    def interval(self, level: float) -> tuple[float, float]:
        """Equal-tailed interval of the given level, value - se * (upper, lower) quantile."""
        if self.reference is None:
            return float("nan"), float("nan")
        tail = (1 - level) / 2
        return (
            self.value - self.se * self.reference.quantile(1 - tail),
            self.value - self.se * self.reference.quantile(tail),
        )

    def p_value(self) -> float:
        """Two-sided p of "the mean effect over sites (and seeds) is 0": the interval's inversion."""
        if self.reference is None:
            return float("nan")
        t = self.value / self.se
        return min(1.0, 2 * min(self.reference.lower(t), self.reference.upper(t)))

    def p_equivalence(self, sesoi: float) -> float:
        """Larger of the two one-sided p-values of |effect| >= sesoi (Schuirmann 1987), by either reference.

        Below 0.05 exactly where `equivalence_interval` lies inside (-sesoi, sesoi), up to 1 / draws.
        """
        if self.reference is None:
            return float("nan")
        from_below, from_above = (self.value + sesoi) / self.se, (self.value - sesoi) / self.se
        return max(
            max(reference.upper(from_below), reference.lower(from_above))
            for reference in self._equivalence_references()
        )

    def equivalence_interval(self) -> tuple[float, float]:
        """The 90 % interval of the equivalence test: the symmetric one, widened on a side where the equal-tailed
        one reaches further.

        Two one-sided tests need each tail right by itself. The symmetric bootstrap gives both tails the mean of the
        two, so with a skewed estimate it calls "similar" too easily on one side.
        """
        if self.reference is None:
            return float("nan"), float("nan")
        references = self._equivalence_references()
        return (
            self.value - self.se * max(reference.quantile(0.95) for reference in references),
            self.value - self.se * min(reference.quantile(0.05) for reference in references),
        )

    def _equivalence_references(self) -> list[Reference]:
        return [reference for reference in (self.reference, self.skewed) if reference is not None]

    def smallest_more(self, band: float, power: float = 0.8) -> float:
        """Smallest true effect whose verdict is "more" with this power (`results.decide` with `band`).

        The estimate must exceed both what puts the 95 % interval above 0 and what puts the upper end of the 90 %
        interval at the band; it does where the true effect lies that much and a quantile of the reference higher.
        """
        if self.reference is None:
            return float("nan")
        above_zero = self.se * self.reference.quantile(0.975)
        reach = self.equivalence_interval()[1] - self.value
        return max(above_zero, band - reach) - self.se * self.reference.quantile(1 - power)

    def with_extra(self, variance: float, freedom: float) -> Inference:
        """The same with more variance, from `freedom` units of another kind, beside that of the seeds.

        Both parts enter the reference as one Student's t, with degrees of freedom by Welch and Satterthwaite.
        """
        if self.reference is None or not variance > 0:
            return self
        own = self.reference.seed_share * self.se**2
        total = self.se**2 + variance
        extra = own + variance
        within = (own**2 / self.reference.seed_df if own > 0 else 0.0) + variance**2 / freedom
        df, share = extra**2 / within, extra / total
        skewed = None if self.skewed is None else self.skewed._replace(seed_df=df, seed_share=share)
        reference = self.reference._replace(seed_df=df, seed_share=share)
        return self._replace(se=float(np.sqrt(total)), reference=reference, skewed=skewed)

    def detectable(self, power: float = 0.8) -> float:
        """Smallest effect found with this power at two-sided 5 %: half the 95 % width + t_power * se."""
        if self.reference is None:
            return float("nan")
        low, high = self.interval(0.95)
        return (high - low) / 2 + self.reference.quantile(power) * self.se


@lru_cache(maxsize=64)
def bootstrap_weights(sites: int, resamples: int, rng_seed: int) -> FloatArray:
    """How often each site is drawn in each resample with replacement, float64 [resamples, sites]."""
    rng = np.random.default_rng([rng_seed, sites, resamples])
    drawn = rng.integers(0, sites, size=(resamples, sites))
    drawn += np.arange(resamples)[:, None] * sites
    counts = np.bincount(drawn.ravel(), minlength=resamples * sites)
    weights = counts.reshape(resamples, sites).astype(np.float64)
    weights.flags.writeable = False
    return weights


def jackknife_influence(sums_JQ: FloatArray, statistic: Statistic) -> FloatArray:
    """Each site's part in an estimate, [J, S]: (J-1)/J (estimate - estimate without the site), centred."""
    rest_JS = statistic(sums_JQ.sum(axis=0) - sums_JQ)
    influence_JS: FloatArray = (rest_JS.mean(axis=0) - rest_JS) * (len(sums_JQ) - 1) / len(sums_JQ)
    return influence_JS


def _combine(
    per_seed_S: FloatArray, influence_JS: FloatArray, site_draws: FloatArray | None, site_df: float, method: str
) -> Inference:
    """Variance and reference distributions from per-seed estimates [S], influences [J, S] and signed sorted draws."""
    sites, seeds = influence_JS.shape
    value = float(per_seed_S.mean())
    factor = sites / (sites - 1)
    mean_influence_J = influence_JS.mean(axis=1)
    v_site = factor * float(mean_influence_J @ mean_influence_J)
    symmetric = None if site_draws is None else np.sort(np.concatenate([-site_draws, site_draws]))
    reference, skewed = Reference(symmetric, site_df), Reference(site_draws, site_df)
    variance = v_site
    if seeds >= FEWEST_SEEDS:
        v_seed = float(per_seed_S.var(ddof=1)) / seeds
        v_int = factor * float(((influence_JS - mean_influence_J[:, None]) ** 2).sum()) / (seeds * (seeds - 1))
        extra = max(v_seed - v_int, 0.0)
        variance = v_site + extra
        if variance > 0:
            reference = Reference(symmetric, site_df, seeds - 1, extra / variance)
            skewed = Reference(site_draws, site_df, seeds - 1, extra / variance)
        method += f", crossed with {seeds} seeds (t with {seeds - 1} df)"
    else:
        method += f", given {'this one run' if seeds == 1 else 'these two runs'}"
    if not variance > 0:
        return undefined(per_seed_S, sites, "no variation between sites")
    return Inference(value, float(np.sqrt(variance)), reference, per_seed_S, sites, method, "", skewed)


def undefined(per_seed: FloatArray, sites: int, reason: str) -> Inference:
    """An estimate without standard error, with the reason."""
    return Inference(float(per_seed.mean()), float("nan"), None, per_seed, sites, "no interval", reason)


def infer(
    sums_JQ: FloatArray, statistic: Differentiable, *, resamples: int, rng_seed: int, units: Units = "sites"
) -> Inference:
    """Studentised cluster bootstrap of a smooth function of totals over sites.

    Parameters
    ----------
    sums_JQ
        Sums per site, float64 [J, Q]; the first column counts members.
    statistic
        Totals [..., Q] to estimates per seed [..., S], with a gradient.
    resamples
        Bootstrap resamples; used from `FEWEST_SITES_FOR_BOOTSTRAP` sites on.
    rng_seed
        Seed of the resampling; the same seed gives the same interval.
    units
        What the rows of `sums_JQ` are: layers have their own number below which Student's t is used.

    Returns
    -------
    Inference

    References
    ----------
    Hall (1988), On symmetric bootstrap confidence intervals, JRSS B 50; Cameron, Gelbach and Miller (2008,
    2011), cluster bootstrap-t and two-way clustering; Bell and McCaffrey (2002), bias of cluster variances.
    """
    sites = len(sums_JQ)
    total = sums_JQ.sum(axis=0)
    per_seed_S = statistic(total)
    if sites < 2 or not np.isfinite(per_seed_S).all():
        reason = (
            "one site: nothing to compare sites with"
            if sites == 1
            else "no matched member"
            if sites == 0
            else "no variation of drift within strata"
        )
        return undefined(per_seed_S, sites, reason)
    influence_JS = jackknife_influence(sums_JQ, statistic)
    if not np.isfinite(influence_JS).all():
        return undefined(per_seed_S, sites, "without one of the sites the effect is undefined")
    if sites < (FEWEST_SITES_FOR_BOOTSTRAP if units == "sites" else FEWEST_LAYERS_FOR_BOOTSTRAP):
        df = max(1.0, float(sums_JQ[:, 0].sum() ** 2 / (sums_JQ[:, 0] ** 2).sum()) - 1)
        return _combine(per_seed_S, influence_JS, None, df, f"{sites} {units}, jackknife, t with {df:.1f} effective df")
    weights_BJ = bootstrap_weights(sites, resamples, rng_seed)
    resampled_BQ = weights_BJ @ sums_JQ  # [B, Q]
    slope_BQ = statistic.gradient(resampled_BQ).mean(axis=-1)  # [B, Q], of the mean over seeds
    square_B = (weights_BJ * (slope_BQ @ sums_JQ.T) ** 2).sum(axis=1) * sites / (sites - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        draws_B = (statistic(resampled_BQ).mean(axis=-1) - per_seed_S.mean()) / np.sqrt(square_B)
    draws_B = draws_B[np.isfinite(draws_B)]
    if len(draws_B) < resamples / 2:
        return undefined(per_seed_S, sites, "most bootstrap resamples have no variance")
    return _combine(
        per_seed_S,
        influence_JS,
        np.sort(draws_B),
        sites - 1,
        f"{sites} {units}, symmetric studentised cluster bootstrap with {len(draws_B)} resamples",
    )


def infer_plain(sums_JQ: FloatArray, statistic: Statistic) -> Inference:
    """Jackknife over sites with Student's t on J - 1 degrees of freedom, for the unmatched figures."""
    total = sums_JQ.sum(axis=0)
    per_seed_S = statistic(total)
    sites = len(sums_JQ)
    if not np.isfinite(per_seed_S).all():
        return undefined(per_seed_S, sites, "an arm is empty, or its mean or spread is zero")
    influence_JS = jackknife_influence(sums_JQ, statistic) if sites > 1 else np.full((1, len(per_seed_S)), np.nan)
    if sites < 2 or not np.isfinite(influence_JS).all():
        return undefined(per_seed_S, sites, "without one of the sites the figure is undefined")
    return _combine(per_seed_S, influence_JS, None, sites - 1, f"{sites} sites, jackknife, t with {sites - 1} df")


def permutation_p(
    values_KN: FloatArray, member_N: BoolArray, stratum_N: IntArray, *, resamples: int, rng: np.random.Generator
) -> FloatArray:
    """Label permutation within strata: the sharp null "membership changes no neuron's drift".

    The statistic is |sum over members of (value - mean of the stratum's other neurons)|. Exact for the
    sharp null. It takes neurons as exchangeable within strata, so it is *anti-conservative* for "the mean
    effect over sites is 0" where the effect varies between sites; it never enters a verdict.

    Parameters
    ----------
    values_KN
        One or more outcomes, float64 [K, N], finite.
    member_N, stratum_N
        Membership and dense stratum codes, [N].
    resamples
        Permutations; p is (1 + count) / (1 + resamples) (Phipson and Smyth 2010).
    rng
        Generator of the permutations; all K outcomes share them.

    Returns
    -------
    float64 [K]
        Two-sided p-values; NaN where no stratum holds both members and controls.
    """
    strata = int(stratum_N.max()) + 1
    size_H = np.bincount(stratum_N, minlength=strata)
    members_H = np.bincount(stratum_N[member_N], minlength=strata)
    mixed_H = (members_H > 0) & (members_H < size_H)
    if not mixed_H.any():
        return np.full(len(values_KN), np.nan)
    order = np.argsort(stratum_N, kind="stable")
    start_H = np.cumsum(size_H) - size_H
    # Draw the smaller arm of each stratum; the difference of the arms follows from its sum.
    flipped_H = members_H > size_H / 2
    drawn_H = np.where(mixed_H, np.where(flipped_H, size_H - members_H, members_H), 0)
    slope_H = np.where(mixed_H, size_H / np.maximum(size_H - members_H, 1), 0.0)  # of the statistic in the members' sum
    mean_KH = np.stack([np.bincount(stratum_N, weights=v, minlength=strata) for v in values_KN]) / np.maximum(size_H, 1)
    centred_KN = (values_KN - mean_KH[:, stratum_N])[:, order]
    observed_K = np.abs((centred_KN * (slope_H[stratum_N] * member_N)[order]).sum(axis=1))
    centred_KN *= (slope_H * np.where(flipped_H, -1.0, 1.0))[stratum_N[order]]
    slot_start, slot_size = np.repeat(start_H, drawn_H), np.repeat(size_H, drawn_H)
    rows = max(1, CHUNK // len(slot_start))
    exceed_K = np.zeros(len(values_KN), dtype=np.int64)
    for first in range(0, resamples, rows):
        count = min(rows, resamples - first)
        picks = (slot_start + rng.integers(0, slot_size, size=(count, len(slot_size)))).astype(np.int32)
        todo = np.arange(count)
        while len(todo):
            # Sorting keeps a slot in its stratum; a repeated neuron is drawn anew. Neurons are
            # interchangeable in this scheme, so every subset is equally likely.
            part = np.sort(picks[todo], axis=1)
            row, slot = np.nonzero(part[:, 1:] == part[:, :-1])
            part[row, slot] = slot_start[slot] + rng.integers(0, slot_size[slot])
            picks[todo] = part
            todo = todo[np.unique(row)]
        for k in range(len(values_KN)):
            null = np.abs(centred_KN[k][picks].sum(axis=1))
            exceed_K[k] += int((null >= observed_K[k] * (1 - 1e-12)).sum())
    p: FloatArray = (1 + exceed_K) / (1 + resamples)
    return p


def holm(p_values: Sequence[float] | NDArray[np.float64]) -> FloatArray:
    """Holm's step-down adjustment; NaN stays NaN and does not count towards the family.

    Raises
    ------
    DataError
        A p-value lies outside [0, 1].
    """
    p = np.asarray(p_values, dtype=np.float64)
    known = np.isfinite(p)
    if ((p[known] < 0) | (p[known] > 1)).any():
        raise DataError("A p-value lies outside [0, 1]", received=p[known].tolist())
    adjusted = np.full(p.shape, np.nan)
    if known.any():
        adjusted[known] = multipletests(p[known], method="holm")[1]
    return adjusted
