"""The layout of `subspaces.json`: the subspaces, the shares of the change in them, and what their removal does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from neurondrift.report.findings.numbers import Limits, Number, RateOfPrompts


class ShareEstimate(TypedDict):
    """A share of the change with its interval over sites."""

    value: Number
    ci95: Limits
    per_seed: Limits
    sites: int
    method: str
    reason: str | None


class RandomSubspaces(TypedDict):
    """The same share in random subspaces of the same rank."""

    mean: Number
    sd: Number
    low: Number
    high: Number


class SubspaceShare(TypedDict):
    """The share of the change in one subspace by one measure."""

    subspace: str
    measure: str
    of_sum: ShareEstimate
    of_sites: ShareEstimate
    expected: Number
    expected_of_sites: Number
    ratio: Number
    random: RandomSubspaces


class SubspaceContrast(TypedDict):
    """The share in `first` minus that in `second`, both beyond chance."""

    first: str
    second: str
    measure: str
    of_sum: ShareEstimate
    of_sites: ShareEstimate


class SubspaceSummary(TypedDict):
    """The subspaces themselves, as means over sites."""

    sites: int
    mean_rank: dict[str, Number]
    explained: dict[str, Number]
    overlap: Number
    overlap_by_chance: Number


class Removal(TypedDict):
    """What refusals do once directions are taken out of every site's outputs."""

    removed: str
    draw: int | None
    refusals: RateOfPrompts
    partial: NotRequired[int]
    coherent: Number
    perplexity: Number


class Removals(TypedDict):
    """All removals, and how many random ones left as few refusals."""

    prompts: int
    answers: int
    judge: str
    conditions: list[Removal]
    p_random: dict[str, Number]


class SubspaceSettings(TypedDict):
    """How the subspaces were made."""

    rank: int
    utility_rank: int
    examples: dict[str, int]
    tokens: dict[str, int]
    random_subspaces: int
    resamples: int
    draws: int


class SubspaceStudy(TypedDict):
    """Of what study the subspaces are."""

    name: str
    model: str
    model_fingerprint: str
    seeds: list[int]
    steps: dict[str, int]
    #: Training seed -> digest of the adapter whose change was measured; older versions wrote none.
    adapters: NotRequired[dict[str, str]]


class Subspaces(TypedDict):
    """The content of `subspaces.json`, as far as it is read."""

    schema_version: int
    study: SubspaceStudy
    settings: SubspaceSettings
    left_out: Mapping[str, Any]
    subspaces: SubspaceSummary
    trained_sites: int
    shares: list[SubspaceShare]
    contrasts: list[SubspaceContrast]
    sites: list[dict[str, Any]]
    behaviour: Removals | None
