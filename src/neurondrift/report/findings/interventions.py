"""The layout of `interventions.json`: references, effects beside random groups, and what is a cause."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from neurondrift.base.roles import Role
from neurondrift.report.findings.numbers import Limits, Number, RateOfPrompts

if TYPE_CHECKING:  # reading a file needs nothing that computes
    from neurondrift.statistics.null import CauseVerdict, Direction, Standing


class NullMeasure(TypedDict):
    """One outcome of a group beside those of its random groups."""

    value: Number
    null_mean: Number
    null_sd: Number
    null_low: Number
    null_high: Number
    effect: Number
    ci95: Limits
    p: Number
    p_floor: Number
    direction: Direction
    draws: int
    n: int
    reason: str
    perplexity: NotRequired[Number]
    null_perplexity: NotRequired[Number]
    #: Of harmful requests, for whole groups: corrected for `holm_tests` tests.
    p_holm: NotRequired[Number]
    #: Answers that do not count, of the group and on average of a random group.
    incoherent: NotRequired[int]
    undecided: NotRequired[int]
    null_incoherent: NotRequired[Number]
    null_undecided: NotRequired[Number]
    #: Of a margin: standard error over prompts of a random group's difference from the mean of all.
    prompt_error: NotRequired[Number]


class SupportFound(TypedDict):
    """What of a group has comparable neurons, how many members there are per candidate, and the share of a random
    group's members that are the group's own."""

    members: int
    left_out: int
    sites: int
    sites_left_out: int
    members_per_candidate: Number
    own: Number


class SmallestFound(TypedDict):
    """The smallest effect that the design would have called outstanding with 80 % power, and the share of the change
    that a group must carry to have it; with so many draws. `reason` says why not, or why not with the draws made."""

    effect: Number
    share: Number
    draws: int
    reason: str


class Measures(TypedDict):
    """Shares refused, refusal margins, and the loss of held-out answers; at doses below 1 of harmful requests only.
    What was not asked for is not there."""

    harmful: NotRequired[NullMeasure]
    ordinary: NotRequired[NullMeasure]
    margin_harmful: NotRequired[NullMeasure]
    margin_ordinary: NotRequired[NullMeasure]
    answers: NotRequired[NullMeasure]


class ShareOfChange(TypedDict):
    """How much of a reference change an intervention brings, and the random groups."""

    of: str
    group: Number
    null: Number


class InterventionEffect(TypedDict):
    """One intervention on one group at one dose."""

    intervention: str
    group: str
    granularity: str
    dose: float
    members: int
    acted_on: int
    outside: int
    draws: int
    draws_planned: NotRequired[int]
    stopped_early: NotRequired[bool]
    measures: Measures
    #: Of refusals, and of the margin, where they were measured.
    share: NotRequired[ShareOfChange]
    margin_share: NotRequired[ShareOfChange]
    margin_harmful_minus_ordinary: NotRequired[NullMeasure]
    #: Of refusals, where the margin is the primary outcome.
    refusals_standing: NotRequired[Standing]
    refusals_found: NotRequired[SmallestFound]
    #: Older versions wrote none of these.
    role: NotRequired[Role | None]
    support: NotRequired[SupportFound]
    harmful_minus_ordinary: NotRequired[NullMeasure]
    standing: NotRequired[Standing]
    found: NotRequired[SmallestFound]


class AnswerLoss(TypedDict):
    """Mean loss per token of held-out answers, and its exponential."""

    loss: Number
    perplexity: Number
    n: int


class MeanMargins(TypedDict):
    """Mean refusal margins in nats, of `n` harmful prompts and of the ordinary ones."""

    harmful: Number
    ordinary: NotRequired[Number]
    n: int


class Reference(TypedDict):
    """The model before, or after, fine-tuning; without what was not measured."""

    harmful: NotRequired[RateOfPrompts]
    ordinary: NotRequired[RateOfPrompts]
    margin: NotRequired[MeanMargins]
    answers: NotRequired[AnswerLoss]


class References(TypedDict):
    """What every intervention is read against."""

    before: Reference
    after: Reference


class CauseFound(TypedDict):
    """Whether a group's change is a cause of the loss, and the interventions that say so."""

    group: str
    verdict: CauseVerdict
    interventions: list[str]


class Interventions(TypedDict):
    """The content of `interventions.json`, as far as it is read."""

    schema_version: int
    model_fingerprint: str
    adapter: str
    training_seed: int
    training_step: int | None
    settings: Mapping[str, Any]
    #: The primary outcome, that verdicts stand on: `margin` or `refusals`; older versions knew refusals only.
    outcome: NotRequired[str]
    references: References
    effects: list[InterventionEffect]
    tests: int
    holm_tests: NotRequired[int]
    draws_needed: NotRequired[int]
    smallest_effect: NotRequired[float]
    smallest_margin: NotRequired[float]
    causes: NotRequired[list[CauseFound]]
    conclusion: str
    sentences: NotRequired[list[str]]
    seconds: float
    versions: Mapping[str, str]
