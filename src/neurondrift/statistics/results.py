"""What an analysis hands back: frozen records, each number with its n and interval, and the rule of verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from neurondrift.base.errors import ConfigError
from neurondrift.base.roles import Role
from neurondrift.statistics.descriptive import Association

SCHEMA_VERSION = 1

Verdict = Literal["more", "similar", "protected", "inconclusive"]
Expected = Literal["more", "similar"]
#: `norm`: strata of site and |w|, adjusted for what is left of it; `matched`: balanced on several covariates.
ComparisonName = Literal["norm", "matched"]
Cluster = Literal["site", "layer"]
#: Why a group has no counterfactual: a covariate that differs after adjustment, too many members without a control,
#: too many drifts of which there is no log, or no member compared at all.
Incomparable = Literal["imbalance", "without_control", "undefined_drift", "nothing_compared"]

#: Marks a field whose own fields stand among those of its record in the JSON.
FLAT = {"flat": True}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its standard error and intervals.

    `n` counts neurons, `sites` and `seeds` the clusters. Where something is undefined it is NaN and
    `reason` says why; a descriptive figure has a value but no interval.
    """

    value: float
    se: float
    ci90: tuple[float, float]
    ci95: tuple[float, float]
    n: int
    sites: int
    seeds: int
    method: str
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Standardised mean differences of |w| between members and non-members.

    Attributes
    ----------
    before, after
        Over all sites, before matching and against the matched controls.
    site_before, site_after
        The same site by site, float64 [n_sites]; NaN where a site has no member, no non-member or no spread.
    n_members, n_matched
        Members, and those of them with at least one control in their stratum.
    """

    before: float
    after: float
    site_before: NDArray[np.float64]
    site_after: NDArray[np.float64]
    n_members: int
    n_matched: int


@dataclass(frozen=True, kw_only=True)
class CovariateBalance:
    """Standardised mean difference of the log of a covariate within sites, members minus controls.

    `before`: against all candidates of the same sites; `after`: under the weights of the comparison, for the members
    compared. `gated`: whether the comparison claims to balance it, so that a large `after` stops its verdict.
    """

    name: str
    before: float
    after: float
    gated: bool
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RatioEffect:
    """How far members moved, as a ratio to comparable neurons: one comparison of one group in one metric.

    `log_ratio` is the mean over members of log drift minus that of their weighted controls, averaged over seeds;
    `ratio` and its limits are the exponentials. `p` tests a ratio of 1, `p_equivalence` "outside 1/band .. band", both
    whether or not the group is comparable; `verdict` is "inconclusive" where it is not, for the reasons in
    `not_comparable_because`. `smallest_more` is the smallest true ratio that would be called "more" with 80 % power.
    `below_band`: the 95 % interval excludes 1, yet the 90 % interval lies within the band (so the verdict is
    "similar"): a difference that was found, and that is smaller than the band. `beyond_band`: the 95 % interval lies
    outside the band. Counts: `n_members` = `n_compared` + `n_without_control` + `n_undefined` (no log of a drift that
    is 0 or not finite in some seed). `effective_controls` is Kish's size of the controls' weights. `cluster` names
    the clustering with the larger standard error; `row_share` is the part of the variance that comes from the same
    coordinates of the residual stream in several layers, `seed_share` that from training seeds.
    """

    comparison: ComparisonName
    log_ratio: Estimate
    ratio: float
    ratio_ci90: tuple[float, float]
    ratio_ci95: tuple[float, float]
    p: float
    p_holm: float
    p_equivalence: float
    verdict: Verdict
    comparable: bool
    not_comparable_because: tuple[Incomparable, ...]
    smallest_more: float
    below_band: bool
    beyond_band: bool
    n_members: int
    n_compared: int
    n_without_control: int
    n_undefined: int
    sites: int
    sites_left_out: int
    effective_controls: float
    balance: tuple[CovariateBalance, ...]
    cluster: Cluster
    row_share: float
    seed_share: float
    per_seed: tuple[Estimate, ...]
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InjectedControl:
    """The judging comparison made again with the members' drift multiplied by `factor`.

    `found`: the lower 95 % limit lies above the estimate without the injection. `verdict` is what the interval would
    have been called.
    """

    factor: float
    log_ratio: Estimate
    verdict: Verdict
    found: bool


@dataclass(frozen=True, kw_only=True)
class ControlCheck:
    """A group whose answer is known before: whether it came out. `passed` is None where it is inconclusive.

    A negative control passes as "similar" and fails as "more" or "protected"; a positive one passes as "more" and
    fails as anything that excludes it.
    """

    group: str
    role: Role
    comparison: ComparisonName
    expected: Expected
    verdict: Verdict
    passed: bool | None
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subgroup:
    """The effect within a module type or a layer third: the ratio of the judging comparison, and g.

    `p` and `verdict` are of the ratio. Exploratory: not adjusted.
    """

    name: str
    g: Estimate
    log_ratio: Estimate
    ratio: float
    ratio_ci95: tuple[float, float]
    p: float
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SiteEffect:
    """The effect within one site, a description with no interval: `g` in units of that site's own SD, `ratio` of the
    judging comparison."""

    site: str
    module_type: str
    layer: int | None
    n: int
    g: float
    ratio: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class MatchedCounts:
    """How far matching reached: measured members without a control in their stratum, the non-members in strata with a
    member, strata with a measured member, and those of them without a control."""

    n_unmatched: int
    n_controls: int
    strata: int
    strata_unmatched: int


@dataclass(frozen=True, kw_only=True)
class RawFigures:
    """Means, medians and ratios of drift, in its own units.

    `controls` are the matched non-members, weighted like the members; `others` all measured non-members. Figures
    against others, and Cohen's d against the random group, are confounded with |w| and site.
    """

    mean_members: Estimate
    mean_controls: Estimate
    mean_others: Estimate
    median_members: Estimate
    median_controls: Estimate
    median_others: Estimate
    ratio_unmatched: Estimate
    ratio_matched: Estimate
    d_random: Estimate


@dataclass(frozen=True, kw_only=True)
class GroupEffect:
    """One group in one metric. In the JSON `matched` and `raw` lie flat among the other fields.

    `effect_norm` and `effect_matched` (None without covariates) are the ratios; `primary_effect` is the one that
    judges, and `p`, `p_holm`, `p_equivalence` and `verdict` are its own. `judging`: whether the answer of the study
    rests on this group. Secondary: `g`, the standardised mean difference within strata of |w|, with its `per_seed`;
    `detectable` is the smallest |g| that would differ from 0 with 80 % power at two-sided 5 %.

    Counts: members = measured + undefined (no finite drift in some seed); measured = matched + unmatched.
    `p_permutation` tests the sharp null "membership changes no neuron's drift". `confounded` names the figures that
    are not matched.
    """

    group: str
    role: Role | None
    judging: bool
    metric: str
    n_members: int
    n_measured: int
    n_undefined: int
    undefined_reason: str
    matched: MatchedCounts = dataclasses.field(metadata=FLAT)
    raw: RawFigures = dataclasses.field(metadata=FLAT)
    effect_norm: RatioEffect
    effect_matched: RatioEffect | None
    injected: InjectedControl
    g: Estimate
    p: float
    p_holm: float
    p_permutation: float
    p_equivalence: float
    verdict: Verdict
    detectable: float
    per_seed: tuple[Estimate, ...]
    by_module: tuple[Subgroup, ...]
    by_layer_third: tuple[Subgroup, ...]
    by_site: tuple[SiteEffect, ...]
    balance: Balance
    confounded: tuple[str, ...] = ("ratio_unmatched", "d_random", "mean_others", "median_others")
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def primary_effect(self) -> RatioEffect:
        """The comparison that judges: `effect_matched`, or `effect_norm` where there is none."""
        return self.effect_matched or self.effect_norm


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The ratio of `first` over that of `second`, each against its own controls, over the same sites and seeds.

    Only members that the groups do not share are compared (`shared` are left out), and no control is a member of
    either. `p`, `p_equivalence` and `verdict` are of `log_ratio`, "inconclusive" where one of the two is not
    `comparable`; `difference` is that of g, and `detectable` belongs to it.
    """

    first: str
    second: str
    metric: str
    comparison: ComparisonName
    shared: int
    log_ratio: Estimate
    ratio: float
    ratio_ci90: tuple[float, float]
    ratio_ci95: tuple[float, float]
    comparable: bool
    difference: Estimate
    p: float
    p_holm: float
    p_equivalence: float
    verdict: Verdict
    detectable: float
    reasons: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Neurons that two groups share; `jaccard` is shared / union."""

    first: str
    second: str
    shared: int
    jaccard: float


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """Everything the report prints. `effects` holds group x metric in the order given to `analyze`.

    `band` is the ratio within which groups count as moving alike; `sesoi` is the same for g, and judges nothing.
    `controls` are of the primary metric.
    """

    metrics: tuple[str, ...]
    groups: tuple[str, ...]
    seed_labels: tuple[str, ...]
    primary_metric: str
    band: float
    comparison_that_judges: ComparisonName
    judging: tuple[str, ...]
    sesoi: float
    resamples: int
    bins: int
    rng_seed: int
    n_neurons: int
    n_sites: int
    family: str
    family_size: int
    effects: tuple[GroupEffect, ...]
    contrasts: tuple[Contrast, ...]
    overlaps: tuple[Overlap, ...]
    associations: tuple[Association, ...]
    controls: tuple[ControlCheck, ...] = ()

    def effect(self, group: str, metric: str) -> GroupEffect:
        """The effect of one group in one metric; KeyError where there is none."""
        for effect in self.effects:
            if (effect.group, effect.metric) == (group, metric):
                return effect
        raise KeyError((group, metric))


def to_json(result: StudyResult) -> dict[str, Any]:
    """A JSON-safe mapping of a result.

    NaN and infinities become null; next to each such field stands ``<field>_reason``. Arrays and tuples
    become lists. `schema_version` counts the incompatible changes of this layout.

    Returns
    -------
    dict
        `schema_version` and the fields of `StudyResult`.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        **encoded(result),
    }


def encoded(record: Any) -> dict[str, Any]:
    """The JSON-safe mapping of one record, as in `to_json`."""
    reasons: Mapping[str, str] = getattr(record, "reasons", {})
    fallback = getattr(record, "reason", "") or "undefined in these data"
    out: dict[str, Any] = {}
    for field in dataclasses.fields(record):
        if field.name == "reasons":
            continue
        value, missing = _plain(getattr(record, field.name))
        if field.metadata.get("flat"):
            out |= value
            continue
        out[field.name] = value
        if missing or (value is None and field.name in reasons):
            out[f"{field.name}_reason"] = reasons.get(field.name, fallback)
    return out


def _plain(value: Any) -> tuple[Any, bool]:
    """The JSON form of a value, and whether it is, or directly holds, an undefined number."""
    if dataclasses.is_dataclass(value):
        return encoded(value), False
    if isinstance(value, float | np.floating):
        return (float(value), False) if math.isfinite(value) else (None, True)
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        parts = [_plain(part) for part in value]
        return [part for part, _ in parts], any(missing for _, missing in parts)
    if isinstance(value, Mapping):
        pairs = {str(key): _plain(part) for key, part in value.items()}
        return {key: part for key, (part, _) in pairs.items()}, any(missing for _, missing in pairs.values())
    if isinstance(value, np.integer):
        return int(value), False
    return value, False


def decide(ci90: tuple[float, float], ci95: tuple[float, float], sesoi: float) -> Verdict:
    """The verdict that two intervals of a standardised effect allow.

    ========================================  ==============
    90 % interval inside (-sesoi, sesoi)      similar (two one-sided tests at 5 %)
    else 95 % interval wholly above 0         more
    else 95 % interval wholly below 0         protected
    else, or an undefined interval            inconclusive
    ========================================  ==============

    Parameters
    ----------
    ci90, ci95
        Lower and upper limits; NaN where undefined.
    sesoi
        Smallest effect of interest, above 0.

    Raises
    ------
    ConfigError
        `sesoi` is not a positive number.

    References
    ----------
    Schuirmann (1987); Lakens (2017), Equivalence tests.
    """
    if not (math.isfinite(sesoi) and sesoi > 0):
        raise ConfigError(
            "The smallest effect of interest must be positive",
            received=sesoi,
            allowed="a number above 0, such as 0.2",
            fix="set sesoi in the analysis settings",
        )
    if not all(map(math.isfinite, (*ci90, *ci95))):
        return "inconclusive"
    if -sesoi < ci90[0] and ci90[1] < sesoi:
        return "similar"
    if ci95[0] > 0:
        return "more"
    if ci95[1] < 0:
        return "protected"
    return "inconclusive"
