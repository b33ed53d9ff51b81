"""The layout of `statistical_results.json`: estimates, effects, curves, rates, and the whole that they make.

Plain dictionaries at run time, in the layout of docs/results.md. A number that may be undefined is `float | None`; why
it is stands beside it under `<field>_reason`, which `wording` looks up. What is not required is missing from files of
older versions, or where findings were made without a study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from neurondrift.base.roles import Role
from neurondrift.report.findings.attribution import AttributionFindings, MarginAt, MarginChange
from neurondrift.report.findings.dose_response import DoseResponse
from neurondrift.report.findings.interventions import Interventions
from neurondrift.report.findings.numbers import Estimate, Limits, Number
from neurondrift.report.findings.ratios import ControlCheck, InjectedControl, RatioEffect
from neurondrift.report.findings.stability import Stability
from neurondrift.report.findings.subspaces import Subspaces

if TYPE_CHECKING:  # reading a file needs nothing that computes
    from neurondrift.statistics.results import ComparisonName, Verdict
    from neurondrift.statistics.weaknesses import WeaknessKind

SCHEMA_VERSION = 1


class Part(TypedDict):
    """The effect within a module type or a layer third."""

    name: str
    g: Estimate
    log_ratio: NotRequired[Estimate]
    ratio: NotRequired[Number]
    ratio_ci95: NotRequired[Limits]
    p: Number
    verdict: Verdict
    reason: str


class SiteEffect(TypedDict):
    """The effect within one site: g in units of that site's own SD, and the ratio of the judging comparison."""

    site: str
    module_type: str
    layer: int | None
    n: int
    g: Number
    ratio: NotRequired[Number]
    reason: str


class Balance(TypedDict):
    """Standardised mean differences of |w| between members and controls."""

    before: Number
    after: Number
    site_before: Limits
    site_after: Limits
    n_members: int
    n_matched: int


class Effect(TypedDict):
    """One group in one metric."""

    group: str
    role: NotRequired[Role | None]
    judging: NotRequired[bool]
    metric: str
    n_members: int
    n_measured: int
    n_undefined: int
    undefined_reason: str
    n_unmatched: int
    n_controls: int
    strata: int
    strata_unmatched: int
    mean_members: Estimate
    mean_controls: Estimate
    mean_others: Estimate
    median_members: Estimate
    median_controls: Estimate
    median_others: Estimate
    ratio_unmatched: Estimate
    ratio_matched: Estimate
    d_random: Estimate
    effect_norm: NotRequired[RatioEffect]
    effect_matched: NotRequired[RatioEffect | None]
    injected: NotRequired[InjectedControl]
    g: Estimate
    p: Number
    p_holm: Number
    p_permutation: Number
    p_equivalence: Number
    verdict: Verdict
    detectable: Number
    per_seed: list[Estimate]
    by_module: list[Part]
    by_layer_third: list[Part]
    by_site: list[SiteEffect]
    balance: Balance
    confounded: list[str]


class Contrast(TypedDict):
    """The ratio of `first` over that of `second`, each against its own controls; `difference` is that of g."""

    first: str
    second: str
    metric: str
    comparison: NotRequired[ComparisonName]
    shared: NotRequired[int]
    log_ratio: NotRequired[Estimate]
    ratio: NotRequired[Number]
    ratio_ci90: NotRequired[Limits]
    ratio_ci95: NotRequired[Limits]
    comparable: NotRequired[bool]
    difference: Estimate
    p: Number
    p_holm: Number
    p_equivalence: Number
    verdict: Verdict
    detectable: Number


class Overlap(TypedDict):
    """Neurons that two groups share."""

    first: str
    second: str
    shared: int
    jaccard: Number


class Association(TypedDict):
    """How the loss of refusals goes with drift; `statement` says what that can show."""

    group: str
    n_points: int
    n_seeds: int
    n_prompts: int
    spearman: Number
    interval: Limits
    p: Number
    slope: Number
    r2: Number
    method: str
    statement: str


class WeaknessDetail(TypedDict):
    """One weakness: which kind it is of, its numbers, and the `text` that stands in `weaknesses`."""

    kind: WeaknessKind
    text: str
    numbers: dict[str, Any]


class Analysis(TypedDict):
    """What `statistics.analyze` found, with its words: the first of the `sentences` is the answer."""

    schema_version: int
    conclusion: str
    sentences: NotRequired[list[str]]
    weaknesses: list[str]
    weakness_details: NotRequired[list[WeaknessDetail]]
    metrics: list[str]
    groups: list[str]
    seed_labels: list[str]
    primary_metric: str
    band: NotRequired[float]
    comparison_that_judges: NotRequired[ComparisonName]
    judging: NotRequired[list[str]]
    sesoi: Number
    resamples: int
    bins: int
    rng_seed: int
    n_neurons: int
    n_sites: int
    family: str
    family_size: int
    effects: list[Effect]
    contrasts: list[Contrast]
    overlaps: list[Overlap]
    associations: list[Association]
    controls: NotRequired[list[ControlCheck]]


class Mean(TypedDict):
    """A mean with its 95 % limits."""

    mean: Number
    low: Number
    high: Number


class TrajectoryPoint(TypedDict):
    """Mean drift at one snapshot; `controls` is None for the group `all`."""

    seed: int
    step: int
    group: str
    metric: str
    members: Mean
    controls: Mean | None


class DriftDistribution(TypedDict):
    """Densities over log10 of the final drift, between `edges`."""

    group: str
    metric: str
    seed: int
    edges: list[float]
    members: list[float]
    controls: list[float]
    n_members: int
    n_controls: int


class WeightRow(TypedDict, total=False):
    """Single weights of a group at a snapshot; those of controls and random weights only where there are any."""

    seed: int
    step: int
    group: str
    n: int
    zeros_abs: int
    zeros_relative: int
    undefined_abs: int
    undefined_relative: int
    mean_abs: Number
    mean_relative: Number
    median_abs: Number
    median_relative: Number
    sd_abs: Number
    sd_relative: Number
    p99_abs: Number
    p99_relative: Number
    matched_mean_abs: Number
    matched_mean_relative: Number
    matched_median_abs: Number
    matched_median_relative: Number
    random_mean_abs: Number
    random_mean_relative: Number
    random_median_abs: Number
    random_median_relative: Number
    ratio_abs: Number
    ratio_relative: Number
    ratio_abs_ci95: Limits
    ratio_relative_ci95: Limits


class GroupFacts(TypedDict):
    """What a group is."""

    name: str
    role: NotRequired[Role | None]
    granularity: str
    members: int
    members_in_trained_sites: NotRequired[int]
    sites: int
    rule: str
    score: NotRequired[str]


class ShortRate(TypedDict):
    """A rate of answers judged by their beginnings, with its Wilson limits."""

    rate: Number
    low: Number
    high: Number


class RefusalRate(TypedDict):
    """The share of prompts of a kind that were refused, with its Wilson limits; no seed and step before alignment.

    `partial` and `undecided` prompts are counted in `n` and are not refused; `whole`: no answer was ended early.
    `short`: the same answers judged by their beginnings, as long at every step.
    """

    seed: int | None
    step: int | None
    kind: str
    rate: Number
    low: Number
    high: Number
    refusals: int
    n: int
    category_low: NotRequired[Number]
    category_high: NotRequired[Number]
    categories: NotRequired[int]
    category_reason: NotRequired[str | None]
    coherent: Number
    success: NotRequired[float]
    undecided: NotRequired[int]
    partial: NotRequired[int]
    max_new_tokens: NotRequired[int]
    whole: NotRequired[bool]
    short: NotRequired[ShortRate]


class Perplexity(TypedDict):
    """Of held-out answers to ordinary prompts, at an evaluated step."""

    seed: int
    step: int
    value: Number


class RateChange(TypedDict):
    """The same prompts at the first and the last evaluated step."""

    seed: int
    kind: str
    from_step: int
    to_step: int
    from_rate: Number
    to_rate: Number
    difference: Number
    p_mcnemar: Number
    n: int


class Behaviour(TypedDict):
    """What the model answered."""

    judge: str
    attack: NotRequired[str]
    system_prompt: NotRequired[str]
    max_new_tokens: int
    rates: list[RefusalRate]
    perplexity: list[Perplexity]
    before_alignment: list[RefusalRate] | None
    changes: list[RateChange]
    capability: NotRequired[list[dict[str, Any]]]
    margins: NotRequired[list[MarginAt]]
    margins_before_alignment: NotRequired[list[MarginAt]]
    margin_changes: NotRequired[list[MarginChange]]


class StudyFacts(TypedDict, total=False):
    """What was studied; of logs that were made elsewhere only a part is known."""

    name: str
    model: str
    aligned_first: bool
    model_fingerprint: str
    seeds: Sequence[int]
    steps: int
    finetune: Mapping[str, Any]
    optimiser: str
    score: Mapping[str, Any]
    versions: Mapping[str, str]
    created: str
    commit: str | None
    threads: int
    arithmetic: Mapping[str, str]


class Findings(TypedDict, total=False):
    """The content of `statistical_results.json`, and what the report takes up beside it. A part that was not made is
    missing, empty or None: ask `reading`."""

    schema_version: int
    study: StudyFacts
    analysis: Analysis
    trajectories: list[TrajectoryPoint]
    distributions: list[DriftDistribution]
    groups: list[GroupFacts]
    weights: list[WeightRow]
    behaviour: Behaviour | None
    attribution: AttributionFindings
    interventions: Interventions
    dose_response: DoseResponse
    subspaces: Subspaces
    stability: Stability


def findings_of(
    study: StudyFacts,
    *,
    analysis: Analysis,
    trajectories: list[TrajectoryPoint],
    distributions: list[DriftDistribution],
    groups: list[GroupFacts],
    weights: list[WeightRow],
    behaviour: Behaviour | None,
    attribution: AttributionFindings | None = None,
) -> Findings:
    """The findings of one study from their parts, in the order in which they are written."""
    found = Findings(
        schema_version=SCHEMA_VERSION,
        study=study,
        analysis=analysis,
        trajectories=trajectories,
        distributions=distributions,
        groups=groups,
        weights=weights,
        behaviour=behaviour,
    )
    if attribution is not None:
        found["attribution"] = attribution
    return found
