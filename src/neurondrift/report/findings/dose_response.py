"""The layout of `dose_response.json`: what the top shares of rankings carry of the lost margin, on other prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from neurondrift.report.findings.interventions import NullMeasure
from neurondrift.report.findings.numbers import Number


class Attributed(TypedDict):
    """How far the parts of the margin add up, on the prompts that were ranked by."""

    before: Number
    after: Number
    attributed: Number
    missed: Number
    neurons: Number
    elsewhere: Number
    points: list[int]


class RandomShares(NullMeasure):
    """A margin beside those of permuted rankings, and theirs as shares of the lost margin."""

    share: Number
    share_low: Number
    share_high: Number


class DoseEffect(TypedDict):
    """One top share of one ranking that was acted on; margins in nats."""

    arm: str
    intervention: str
    dose: float
    members: int
    margin: Number
    margin_ordinary: Number
    share: Number
    random: Mapping[str, RandomShares]
    #: Why there is no share.
    reason: NotRequired[str]


class OverDoses(TypedDict):
    """The mean over doses of the share of the lost margin, beside those of permuted rankings; `p_holm` where it
    judges."""

    arm: str
    intervention: str
    null: str
    share: Number
    null_mean: Number
    null_low: Number
    null_high: Number
    p: Number
    p_floor: Number
    draws: int
    p_holm: NotRequired[Number]
    reason: NotRequired[str]


class DoseResponse(TypedDict):
    """The content of `dose_response.json`."""

    schema_version: int
    model_fingerprint: str
    adapter: str
    training_seed: int
    training_step: int
    settings: Mapping[str, Any]
    attributed: Attributed
    references: Mapping[str, Mapping[str, Number]]
    effects: list[DoseEffect]
    overall: list[OverDoses]
    tests: int
    draws_needed: int
    conclusion: str
    sentences: list[str]
    seconds: float
    versions: Mapping[str, str]
