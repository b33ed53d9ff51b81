"""What the fine-tuning change does, group by group, in the layout of `statistical_results.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from neurondrift.attribution.tables import NEURONS, SUMMARY
from neurondrift.base.errors import ArtifactError
from neurondrift.base.files import read_json, read_parquet
from neurondrift.base.roles import CONTROLS, Role
from neurondrift.report.findings.attribution import AttributionFindings, GroupAttribution, MarginTotals
from neurondrift.statistics.design.designs import Design
from neurondrift.statistics.design.plans import Plans
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import ratio_effect
from neurondrift.statistics.design.shares import share_effect
from neurondrift.statistics.inference import holm
from neurondrift.statistics.results import RatioEffect, encoded
from neurondrift.study.population import Compared
from neurondrift.study.stages.attribution.placing import largest_neurons, shares_by_site

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
#: How far outputs moved on which inputs, and the ways along which a margin is attributed -> columns of the neurons.
OUTPUTS = {"harmful": "drift_safety", "ordinary": "drift_utility"}
WAYS = {"path": "margin_", "budget": "budget_margin_"}
DIRECTIONAL = "provenance_directional"
#: The name under which the design of all neurons with a known part stands.
PARTS = "parts"


class Measured(NamedTuple):
    """What the stage attribute wrote, of all seeds: columns of the neurons float64 `[S, N]`, the ways that all seeds
    have, and the summaries."""

    columns: dict[str, FloatArray]
    ways: list[str]
    summaries: dict[int, dict[str, Any]]


def read_measured(folders: Mapping[int, Path], population: Population, model: str) -> Measured:
    """Columns for the neurons of a population: NaN where an output is not known, 0 where a part of the margin is not,
    as its site did not move.

    Raises `ArtifactError` for tables that are damaged, or of another model than that with the fingerprint `model`.
    """
    summaries = {seed: read_json(folder / SUMMARY) for seed, folder in folders.items()}
    for summary in summaries.values():
        if summary["base_fingerprint"] != model:
            raise ArtifactError(
                "What the change does was measured on another model",
                received=summary["base_fingerprint"],
                allowed=model,
            )
    shared = set.intersection(*(set(summary["margin"]) for summary in summaries.values()))
    ways = [way for way, prefix in WAYS.items() if f"{prefix}harmful".replace("margin_", "") in shared]
    margins = [f"{WAYS[way]}{prompts}" for way in ways for prompts in ("harmful", "harmless")]
    names = [*OUTPUTS.values(), DIRECTIONAL, *margins]
    absent = {name: 0.0 if name in margins else np.nan for name in names}
    columns = {name: np.full((len(folders), len(population.site)), absent[name]) for name in names}
    code = {name: index for index, name in enumerate(population.site_names)}
    starts = np.searchsorted(population.site, np.arange(len(population.site_names)))
    for s, folder in enumerate(folders.values()):
        table = read_parquet(folder / NEURONS, columns=["site", "row", *names]).to_pandas()
        for site, part in table.groupby("site", observed=True, sort=False):
            if str(site) in code:
                at = starts[code[str(site)]] + part["row"].to_numpy()
                for name in names:
                    values = part[name].to_numpy(dtype=np.float64)
                    columns[name][s, at] = np.where(np.isfinite(values), values, absent[name])
    return Measured(columns, ways, summaries)


def compare_groups(measured: Measured, compared: Compared) -> AttributionFindings:
    """Outputs and shares of each group beside its controls, by the designs of the analysis of drift."""
    population, rules, places = compared.population, compared.rules, compared.population.places()
    lengths = {name: np.sqrt(measured.columns[column]) for name, column in OUTPUTS.items()}
    way = measured.ways[-1]
    parts = {each: measured.columns[f"{WAYS[each]}harmful"] for each in measured.ways}
    ordinary_SN = measured.columns[f"{WAYS[way]}harmless"]
    values = dataclasses.replace(population, drift={**lengths, PARTS: np.ones_like(ordinary_SN)})
    plans = Plans(values, list(values.drift), compared.bins)
    totals = [each for seed, summary in measured.summaries.items() for each in _totals(seed, summary, measured.ways)]
    changes = {
        each: np.array([t["change"] for t in totals if (t["way"], t["prompts"]) == (each, "harmful")], dtype=np.float64)
        for each in measured.ways
    }
    outputs: dict[tuple[str, str], RatioEffect] = {}
    groups: list[GroupAttribution] = []
    for name, member_N in compared.members.items():

        def design(metric: str, member_N: BoolArray = member_N, name: str = name) -> Design:
            return plans.of(member_N, ~member_N, metric, compared.on[name]).judging

        for metric, length_SN in lengths.items():
            outputs[name, metric] = ratio_effect(design(metric), length_SN, places, rules)
        every = design(PARTS)
        own, controls = _directions(measured.columns[DIRECTIONAL], every)
        shares = {
            each: encoded(share_effect(every, member_N, part_SN, changes[each], places, rules))
            for each, part_SN in parts.items()
        }
        facts: dict[str, Any] = {
            "group": name,
            "role": compared.roles[name],
            "judging": name in compared.judging,
            "shares": shares,
        }
        facts |= {"shares": shares, "harmless": float(ordinary_SN[:, member_N].sum(axis=1).mean())}
        facts |= {"directional": own, "directional_controls": controls}
        groups.append(cast(GroupAttribution, facts))
    adjusted, tests = _adjusted(outputs, compared.roles)
    for group in groups:
        group["outputs"] = {metric: cast(Any, encoded(adjusted[group["group"], metric])) for metric in lengths}
    return AttributionFindings(
        way=way,
        band=rules.band,
        lost=bool((changes[way] < 0).all()),
        totals=totals,
        groups=groups,
        outputs_tests=tests,
        neurons=largest_neurons(parts[way], changes[way], compared),
        by_site=shares_by_site(parts[way], changes[way], compared),
    )


def _totals(seed: int, summary: Mapping[str, Any], ways: Sequence[str]) -> list[MarginTotals]:
    """The change of each margin, and what its parts sum to."""
    found = []
    for way in ways:
        for prompts in ("harmful", "harmless"):
            margin = summary["margin"][f"{WAYS[way]}{prompts}".replace("margin_", "")]
            kept = ("change", "attributed", "missed", "adds_up", "sites", "elsewhere", "elsewhere_by_kind", "points")
            facts = {"seed": seed, "prompts": prompts, "way": way, "n": summary["asked"]["prompts"][prompts]}
            facts |= {"before": margin["values"][0], "after": margin["values"][-1]}
            found.append(cast(MarginTotals, facts | {name: margin[name] for name in kept}))
    return found


def _directions(cosine_SN: FloatArray, design: Design) -> tuple[float | None, float | None]:
    """Mean cosine with the gradient of the loss on safety examples: of members that are compared, and of their
    controls as they are weighted; over seeds. None where nothing is known."""
    known_N = np.isfinite(cosine_SN).all(axis=0)
    mean_N = np.where(known_N, cosine_SN, 0.0).mean(axis=0)
    found = []
    for weight_N in (design.compared_N.astype(np.float64), design.weight_N):
        weight_N = np.where(known_N, weight_N, 0.0)
        found.append(float(weight_N @ mean_N / weight_N.sum()) if weight_N.sum() > 0 else None)
    return found[0], found[1]


def _adjusted(
    outputs: Mapping[tuple[str, str], RatioEffect], roles: Mapping[str, Role | None]
) -> tuple[dict[tuple[str, str], RatioEffect], int]:
    """Holm's adjustment over what is comparable and no control, on both kinds of inputs; how many tests that are."""
    raw = [
        found.p if found.comparable and roles[group] not in CONTROLS else float("nan")
        for (group, _), found in outputs.items()
    ]
    adjusted = holm(raw)
    reasons = {"p_holm": "a control, or not comparable: outside the family of tests"}
    done = {
        key: dataclasses.replace(found, p_holm=float(p), reasons={**reasons, **found.reasons})
        for (key, found), p in zip(outputs.items(), adjusted, strict=True)
    }
    return done, int(np.isfinite(raw).sum())
