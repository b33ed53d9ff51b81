"""The layout of what the fine-tuning change does: outputs and shares of each group, totals of the margin."""

from __future__ import annotations

from typing import TYPE_CHECKING, NotRequired, TypedDict

from neurondrift.base.roles import Role
from neurondrift.report.findings.numbers import Estimate, Limits, Number
from neurondrift.report.findings.ratios import CovariateBalance, RatioEffect

if TYPE_CHECKING:  # reading a file needs nothing that computes
    from neurondrift.statistics.design.shares import ShareVerdict
    from neurondrift.statistics.results import Cluster, ComparisonName, Incomparable


class ShareEffect(TypedDict):
    """Which share of the lost margin a group carries, beside that of comparable neurons; see docs/results.md."""

    comparison: ComparisonName
    share_of_group: Number
    share: Number
    expected: Number
    share_of_neurons: float
    ratio: Number
    difference: Estimate
    margin: Number
    excess: Estimate
    p_more: Number
    p_not_more: Number
    verdict: ShareVerdict
    comparable: bool
    not_comparable_because: list[Incomparable]
    smallest_more: Number
    n_members: int
    n_compared: int
    n_without_control: int
    sites: int
    balance: list[CovariateBalance]
    cluster: Cluster
    per_seed: list[Number]
    expected_per_seed: list[Number]


class GroupAttribution(TypedDict):
    """One group: how far its outputs moved (`harmful`, `ordinary`), and its shares by way: `path`, or `budget`."""

    group: str
    role: Role | None
    judging: bool
    outputs: dict[str, RatioEffect]
    shares: dict[str, ShareEffect]
    #: Of the margin of ordinary prompts, in nats: what its members contributed to the change, mean over seeds.
    harmless: Number
    #: Mean over members of cos(change, gradient of the loss on safety examples), and over their controls.
    directional: Number
    directional_controls: Number


class MarginTotals(TypedDict):
    """The change of a margin in one seed along one way, and what the parts sum to."""

    seed: int
    prompts: str
    way: str
    before: Number
    after: Number
    change: Number
    attributed: Number
    missed: Number
    adds_up: bool | None
    sites: Number
    elsewhere: Number
    elsewhere_by_kind: dict[str, float]
    points: list[int]
    n: NotRequired[int]


class MarginAt(TypedDict):
    """The mean margin of the prompts of a kind at a step, with its 95 % limits over prompts, in nats."""

    seed: int | None
    step: int | None
    kind: str
    mean: Number
    low: Number
    high: Number
    n: int


class MarginChange(TypedDict):
    """The margin of the same prompts from the first evaluated step to the last: the mean change, 95 % limits."""

    seed: int
    kind: str
    from_step: int
    to_step: int
    change: Number
    ci95: Limits
    n: int


class NeuronShare(TypedDict):
    """One neuron and its share of the lost margin, mean over seeds and of each; `groups`: those that it belongs to."""

    site: str
    module_type: str
    layer: int | None
    row: int
    share: float
    per_seed: list[float]
    groups: list[str]


class SiteShare(TypedDict):
    """The share of all neurons of a site, mean over seeds; `n`: how many they are."""

    site: str
    module_type: str
    layer: int | None
    n: int
    share: float


class AttributionFindings(TypedDict):
    """What the fine-tuning change does, group by group. `way` is the one that judges: `budget` where the training was
    saved at several steps, else `path`."""

    way: str
    band: float
    lost: bool
    totals: list[MarginTotals]
    groups: list[GroupAttribution]
    #: Tests that the p-values of outputs are corrected for.
    outputs_tests: int
    #: Along the way that judges; empty where nothing was lost. Older files have neither.
    neurons: NotRequired[list[NeuronShare]]
    by_site: NotRequired[list[SiteShare]]
