"""What a careful reader would hold against a result, as records: `report` has the words.

A control that fails comes first, for it puts everything else in doubt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from neurondrift.base.roles import CONTROLS, Role
from neurondrift.statistics.results import (
    ComparisonName,
    ControlCheck,
    GroupEffect,
    Incomparable,
    RatioEffect,
    StudyResult,
    Verdict,
)

WeaknessKind = Literal[
    "negative_control",
    "positive_control",
    "injected_control",
    "not_comparable",
    "few_seeds",
    "unmatched",
    "undefined_drift",
    "unbalanced",
    "few_sites",
    "overlap",
]

#: Below this many training seeds, and sites, an interval rests on few clusters.
FEW_SEEDS, FEW_SITES = 6, 20
#: Standardised mean difference of |w| above which matching is incomplete (Stuart 2010).
UNBALANCED = 0.1
#: Share of members without a control, and Jaccard overlap of two groups, worth a warning.
MANY_UNMATCHED, MUCH_OVERLAP = 0.05, 0.1


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
class FailedPositive:
    """The positive control was not found to move further: this outcome is unfit for this run."""

    kind: ClassVar[WeaknessKind] = "positive_control"
    group: str
    role: Role
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class MissedInjection:
    """The pipeline did not find the group's own drift multiplied by `factor`: it is too imprecise to judge it."""

    kind: ClassVar[WeaknessKind] = "injected_control"
    group: str
    factor: float


@dataclass(frozen=True, kw_only=True)
class NotComparable:
    """A group that has no counterfactual in the comparison that judges it: its verdict is withheld."""

    kind: ClassVar[WeaknessKind] = "not_comparable"
    group: str
    comparison: ComparisonName
    because: tuple[Incomparable, ...]
    without_control: int
    of_members: int
    worst: str
    difference: float


@dataclass(frozen=True, kw_only=True)
class SharedNeurons:
    """Two groups that are largely the same neurons."""

    kind: ClassVar[WeaknessKind] = "overlap"
    first: str
    second: str
    shared: int
    jaccard: float


Weakness = (
    FailedControl
    | FailedPositive
    | MissedInjection
    | NotComparable
    | FewSeeds
    | Unmatched
    | UndefinedDrift
    | Unbalanced
    | FewSites
    | SharedNeurons
)


def weaknesses(result: StudyResult) -> tuple[Weakness, ...]:
    """What a careful reader would hold against a result in its primary metric; failed controls first."""
    seeds = len(result.seed_labels)
    effects = {group: result.effect(group, result.primary_metric) for group in result.groups}
    out: list[Weakness] = [failed for check in result.controls if (failed := _failed(check)) is not None]
    out += [
        MissedInjection(group=effect.group, factor=effect.injected.factor)
        for effect in effects.values()
        if effect.judging and not effect.injected.found
    ]
    for effect in effects.values():
        if effect.role not in CONTROLS and not effect.primary_effect.comparable:
            out.append(not_comparable(effect.group, effect.primary_effect))
    if seeds < FEW_SEEDS:
        out.append(FewSeeds(seeds=seeds))
    for effect in effects.values():
        out += _weaknesses_of_group(effect)
    out += [
        SharedNeurons(first=o.first, second=o.second, shared=o.shared, jaccard=o.jaccard)
        for o in result.overlaps
        if o.jaccard > MUCH_OVERLAP and not {effects[o.first].role, effects[o.second].role} & {*CONTROLS}
    ]
    return tuple(out)


def _failed(check: ControlCheck) -> FailedControl | FailedPositive | None:
    """A positive control that is inconclusive has failed too: nothing then shows that the outcome can be moved."""
    if check.expected == "more" and check.verdict != "more":
        return FailedPositive(group=check.group, role=check.role, verdict=check.verdict)
    if check.expected == "similar" and check.passed is False:
        return FailedControl(group=check.group, role=check.role, verdict=check.verdict)
    return None


def not_comparable(group: str, effect: RatioEffect) -> NotComparable:
    """Why a comparison of a group has no counterfactual, with the covariate that is off most."""
    gated = [b for b in effect.balance if b.gated and math.isfinite(b.after)]
    worst = max(gated, key=lambda b: abs(b.after), default=None)
    return NotComparable(
        group=group,
        comparison=effect.comparison,
        because=effect.not_comparable_because,
        without_control=effect.n_without_control,
        of_members=effect.n_compared + effect.n_without_control,
        worst=worst.name if worst else "",
        difference=worst.after if worst else math.nan,
    )


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
    if effect.primary_effect.sites < FEW_SITES:
        out.append(FewSites(group=group, sites=effect.primary_effect.sites))
    return out
