"""What an analysis hands back: frozen records, each number with its n and interval; verdicts and weaknesses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from neurondrift.base.errors import ConfigError
from neurondrift.base.roles import NEGATIVE_CONTROLS, Role
from neurondrift.statistics.descriptive import Association
from neurondrift.statistics.matching import Balance

SCHEMA_VERSION = 1

Verdict = Literal["more", "similar", "protected", "inconclusive"]
WeaknessKind = Literal[
    "few_seeds", "unmatched", "undefined_drift", "unbalanced", "few_sites", "negative_control", "overlap"
]

#: Below this many training seeds, and sites, an interval rests on few clusters.
FEW_SEEDS, FEW_SITES = 6, 20
#: Standardised mean difference of |w| above which matching is incomplete (Stuart 2010).
UNBALANCED = 0.1
#: Share of members without a control, and Jaccard overlap of two groups, worth a warning.
MANY_UNMATCHED, MUCH_OVERLAP = 0.05, 0.1

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
class Subgroup:
    """The matched effect within a module type or a layer third. Exploratory: not adjusted."""

    name: str
    g: Estimate
    p: float
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class SiteEffect:
    """The matched effect within one site, in units of that site's own SD: a description, with no interval."""

    site: str
    module_type: str
    layer: int | None
    n: int
    g: float
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

    Counts: members = measured + undefined (no finite drift in some seed); measured = matched + unmatched. `p` tests
    "the mean effect over sites (and seeds) is 0"; `p_permutation` the sharp null "membership changes no neuron's
    drift"; `p_equivalence` "|g| >= sesoi". `detectable` is the smallest |g| found with 80 % power at two-sided 5 %.
    `confounded` names the figures that are not matched.
    """

    group: str
    role: Role | None
    metric: str
    n_members: int
    n_measured: int
    n_undefined: int
    undefined_reason: str
    matched: MatchedCounts = dataclasses.field(metadata=FLAT)
    raw: RawFigures = dataclasses.field(metadata=FLAT)
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


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """g of `first` minus g of `second`, each against its own controls, over the same sites and seeds."""

    first: str
    second: str
    metric: str
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
    """Everything the report prints. `effects` holds group x metric in the order given to `analyze`."""

    metrics: tuple[str, ...]
    groups: tuple[str, ...]
    seed_labels: tuple[str, ...]
    primary_metric: str
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
        **_encode(result),
    }


def _encode(record: Any) -> dict[str, Any]:
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
        if missing:
            out[f"{field.name}_reason"] = reasons.get(field.name, fallback)
    return out


def _plain(value: Any) -> tuple[Any, bool]:
    """The JSON form of a value, and whether it is, or directly holds, an undefined number."""
    if dataclasses.is_dataclass(value):
        return _encode(value), False
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


@dataclass(frozen=True, kw_only=True)
class FewSeeds:
    """Run-to-run variation is unknown, or rests on few seeds."""

    kind: ClassVar[WeaknessKind] = "few_seeds"
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Unmatched:
    """Many members of a group have no control in their stratum."""

    kind: ClassVar[WeaknessKind] = "unmatched"
    group: str
    members: int
    of_members: int
    strata: int
    of_strata: int


@dataclass(frozen=True, kw_only=True)
class UndefinedDrift:
    """Members of a group without a finite drift."""

    kind: ClassVar[WeaknessKind] = "undefined_drift"
    group: str
    members: int


@dataclass(frozen=True, kw_only=True)
class Unbalanced:
    """What matching left between members and controls: a standardised mean difference of |w|."""

    kind: ClassVar[WeaknessKind] = "unbalanced"
    group: str
    difference: float


@dataclass(frozen=True, kw_only=True)
class FewSites:
    """A group whose matched members lie in few sites."""

    kind: ClassVar[WeaknessKind] = "few_sites"
    group: str
    sites: int


@dataclass(frozen=True, kw_only=True)
class FailedControl:
    """The negative control was found to differ: it puts everything else in doubt."""

    kind: ClassVar[WeaknessKind] = "negative_control"
    group: str
    role: Role
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class SharedNeurons:
    """Two groups that are largely the same neurons."""

    kind: ClassVar[WeaknessKind] = "overlap"
    first: str
    second: str
    shared: int
    jaccard: float


Weakness = FewSeeds | Unmatched | UndefinedDrift | Unbalanced | FewSites | FailedControl | SharedNeurons


def weaknesses(result: StudyResult) -> tuple[Weakness, ...]:
    """What a careful reader would hold against a result in its primary metric."""
    seeds = len(result.seed_labels)
    out: list[Weakness] = [FewSeeds(seeds=seeds)] if seeds < FEW_SEEDS else []
    effects = {group: result.effect(group, result.primary_metric) for group in result.groups}
    for effect in effects.values():
        out += _weaknesses_of_group(effect)
    out += [
        SharedNeurons(first=o.first, second=o.second, shared=o.shared, jaccard=o.jaccard)
        for o in result.overlaps
        if o.jaccard > MUCH_OVERLAP and not {effects[o.first].role, effects[o.second].role} & {*NEGATIVE_CONTROLS}
    ]
    return tuple(out)


def _weaknesses_of_group(effect: GroupEffect) -> list[Weakness]:
    group = effect.group
    out: list[Weakness] = []
    if effect.matched.n_unmatched > MANY_UNMATCHED * effect.n_measured:
        out.append(
            Unmatched(
                group=group,
                members=effect.matched.n_unmatched,
                of_members=effect.n_measured,
                strata=effect.matched.strata_unmatched,
                of_strata=effect.matched.strata,
            )
        )
    if effect.n_undefined:
        out.append(UndefinedDrift(group=group, members=effect.n_undefined))
    if abs(effect.balance.after) > UNBALANCED:
        out.append(Unbalanced(group=group, difference=effect.balance.after))
    if effect.g.sites < FEW_SITES:
        out.append(FewSites(group=group, sites=effect.g.sites))
    if effect.role in NEGATIVE_CONTROLS and effect.verdict in ("more", "protected"):
        out.append(FailedControl(group=group, role=effect.role, verdict=effect.verdict))
    return out
