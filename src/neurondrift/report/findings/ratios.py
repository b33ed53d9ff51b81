"""The layout of how far members moved, as a ratio to comparable neurons, and of the controls of known answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from neurondrift.base.roles import Role
from neurondrift.report.findings.numbers import Estimate, Limits, Number

if TYPE_CHECKING:  # reading a file needs nothing that computes
    from neurondrift.statistics.results import Cluster, ComparisonName, Expected, Incomparable, Verdict


class CovariateBalance(TypedDict):
    """Standardised mean difference of the log of a covariate within sites, before and under the weights."""

    name: str
    before: Number
    after: Number
    gated: bool
    reason: str


class RatioEffect(TypedDict):
    """How far members moved, as a ratio to comparable neurons; `log_ratio` is on the natural-log scale."""

    comparison: ComparisonName
    log_ratio: Estimate
    ratio: Number
    ratio_ci90: Limits
    ratio_ci95: Limits
    p: Number
    p_holm: Number
    p_equivalence: Number
    verdict: Verdict
    comparable: bool
    not_comparable_because: list[Incomparable]
    smallest_more: Number
    below_band: bool
    beyond_band: bool
    n_members: int
    n_compared: int
    n_without_control: int
    n_undefined: int
    sites: int
    sites_left_out: int
    effective_controls: float
    balance: list[CovariateBalance]
    cluster: Cluster
    row_share: float
    seed_share: float
    per_seed: list[Estimate]


class InjectedControl(TypedDict):
    """The judging comparison made again with the members' drift multiplied by `factor`."""

    factor: float
    log_ratio: Estimate
    verdict: Verdict
    found: bool


class ControlCheck(TypedDict):
    """A group whose answer is known before, and whether it came out; `passed` is None where it is inconclusive."""

    group: str
    role: Role
    comparison: ComparisonName
    expected: Expected
    verdict: Verdict
    passed: bool | None
