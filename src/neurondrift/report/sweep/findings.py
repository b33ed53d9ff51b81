"""The layout of `sweep_results.json`: the studies of a sweep, and what they say together.

A number that may be undefined is null, with why under `reason`; limits are `[low, high]`. See docs/results.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

from neurondrift.base.roles import Role
from neurondrift.report.findings.numbers import Limits, Number

if TYPE_CHECKING:  # reading a file needs nothing that computes
    from neurondrift.statistics.meta.pooling import Unit
    from neurondrift.statistics.results import ComparisonName, Expected, Verdict

SCHEMA_VERSION = 1


class OneEffect(TypedDict):
    """A group in one study, in the primary metric, by the comparison that judges it there."""

    group: str
    role: Role | None
    judging: bool
    comparison: ComparisonName
    ratio: Number
    ratio_ci90: Limits
    ratio_ci95: Limits
    verdict: Verdict
    comparable: bool
    below_band: bool


class OneStudy(TypedDict):
    """A point of the sweep; what its study found is empty or null where it did not end."""

    index: int
    name: str
    state: str
    message: str
    settings: dict[str, Any]
    model: str
    data: str
    seeds: list[int]
    steps: int | None
    harmful_before: Number
    harmful_after: Number
    refusals_lost: Number
    effects: list[OneEffect]


class PooledEffect(TypedDict):
    """A group in one metric over the studies: the meta-analysis of log ratios, and its exponentials.

    `left_out`: studies that ended and are not in it, as the group is not comparable there or has no interval.
    `within`: the setting and the value that all its studies have, of subgroups; null over all.
    """

    group: str
    role: Role | None
    judging: bool
    metric: str
    within: list[str] | None
    unit: Unit
    points: int
    models: int
    left_out: int
    k: int
    log_ratio: Number
    se: Number
    se_dl: Number
    se_hksj: Number
    ci90: Limits
    ci95: Limits
    p: Number
    p_equivalence: Number
    tau: Number
    i2: Number
    q: Number
    p_q: Number
    ratio: Number
    ratio_ci90: Limits
    ratio_ci95: Limits
    ratio_prediction95: Limits
    bounded: bool
    verdict: Verdict
    below_band: bool
    reason: str


class Regression(TypedDict):
    """log ratio = intercept + slope × the share of harmful requests whose refusal was lost, over studies."""

    group: str
    metric: str
    moderator: str
    k: int
    intercept: Number
    slope: Number
    se: Number
    ci95: Limits
    p: Number
    tau2: Number
    reason: str


class PooledControl(TypedDict):
    """A group whose answer is known before, over the studies; `passed` is None where it is open."""

    group: str
    expected: Expected
    passed: bool | None
    effect: PooledEffect


class SweepFacts(TypedDict):
    """What was swept."""

    name: str
    axes: dict[str, list[str]]
    primary_metric: str
    band: float
    versions: dict[str, str]
    created: str
    commit: str | None


class SweepFindings(TypedDict):
    """The content of `sweep_results.json`."""

    schema_version: int
    sweep: SweepFacts
    sentences: Sequence[str]
    weaknesses: Sequence[str]
    studies: list[OneStudy]
    pooled: list[PooledEffect]
    subgroups: list[PooledEffect]
    regressions: list[Regression]
    controls: list[PooledControl]
