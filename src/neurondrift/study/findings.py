"""From a study's files to its findings: arrays for `statistics`, then the one mapping that `report` draws on.

Owns the layout of `results/statistical_results.json` (docs/results.md). Computes no statistic itself and draws
nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from neurondrift.behaviour.rates import Change, category_interval, paired_change, per_prompt, refusal_rate
from neurondrift.drift.log import METRICS, DriftLog
from neurondrift.groups.group import Group, role_of
from neurondrift.report.conclusion import analysis_findings
from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.comparison import Population
from neurondrift.statistics.descriptive import (
    BehaviourSeries,
)
from neurondrift.statistics.matching import refine_bins
from neurondrift.study.folder import saved_step, saved_steps
from neurondrift.study.population import (
    Rows,
    _distributions,
    load_population,
    membership,
    single_weights,
    trajectories,
)
from neurondrift.study.settings import AnalyzeSection

SCHEMA_VERSION = 1


def analysis(
    logs: Mapping[int, DriftLog],
    groups: Mapping[str, Group],
    answers: Mapping[int, Rows],
    settings: AnalyzeSection,
    *,
    bins: int,
    rng_seed: int,
) -> dict[str, Any]:
    """The parts of the findings that rest on drift.

    Parameters
    ----------
    logs
        Training seed -> its drift log. All must cover the same neurons.
    groups
        Name -> group of neurons; members outside the trained sites are left out and counted.
    answers
        Training seed -> rows of judged answers (empty where behaviour was not evaluated).
    settings, bins, rng_seed
        Of the analysis; see `statistics.analyze`.

    Returns
    -------
    dict
        `analysis`, `trajectories`, `distributions` and `groups` of the results.

    Raises
    ------
    ArtifactError
        Logs that do not cover the same neurons, or have no snapshot after step 0.
    GroupError
        A group of another model, or none of whose members lies in a trained site.
    """
    population, steps = load_population(logs)
    members = {name: membership(population, logs, group, name) for name, group in groups.items()}
    roles = {name: role_of(group, name) for name, group in groups.items()}
    result = analyze(
        population,
        members,
        metrics=METRICS,
        seed_labels=[str(seed) for seed in logs],
        sesoi=settings.smallest_effect,
        resamples=settings.resamples,
        bins=bins,
        rng_seed=rng_seed,
        primary_metric=settings.primary_metric,
        roles=roles,
        behaviour=_behaviour_series(logs, population, members, answers, settings.primary_metric),
    )
    strata = {name: refine_bins(population.site, population.norm, chosen, bins) for name, chosen in members.items()}
    return {
        "analysis": analysis_findings(result),
        "trajectories": trajectories(logs, population, members, strata),
        "distributions": _distributions(population, members, strata, list(logs)),
        "groups": [_describe_group(name, group, int(members[name].sum())) for name, group in groups.items()],
        "weights": single_weights(logs, roles),
        "steps": steps,
    }


def _describe_group(name: str, group: Group, trained: int) -> dict[str, Any]:
    provenance = group.provenance
    rule = str(provenance.get("rule", "unknown"))
    for key in ("fraction", "p", "q", "seed"):
        if key in provenance:
            rule += f", {key} = {provenance[key]}"
    return {
        "name": name,
        "role": role_of(group, name),
        "granularity": group.granularity,
        "members": len(group),
        "members_in_trained_sites": trained,
        "sites": len(group.members),
        "rule": rule,
    }


def _behaviour_series(
    logs: Mapping[int, DriftLog],
    population: Population,
    members: Mapping[str, npt.NDArray[np.bool_]],
    answers: Mapping[int, Rows],
    metric: str,
) -> BehaviourSeries | None:
    """Refusals of harmful requests and mean drift at the steps where both are known."""
    steps = sorted({row["step"] for rows in answers.values() for row in rows if row["kind"] == "harmful"})
    steps = [step for step in steps if all(step in log.steps() for log in logs.values())]
    if len(steps) < 2:
        return None
    shape = (len(logs), len(steps))
    refused = np.full(shape, np.nan)
    total = np.full(shape, np.nan)
    drift = {name: np.full(shape, np.nan) for name in members}
    prompts = 0
    for s, (seed, log) in enumerate(logs.items()):
        for t, step in enumerate(steps):
            flags = [
                row["refused"] for row in answers.get(seed, []) if row["kind"] == "harmful" and row["step"] == step
            ]
            refused[s, t] = refusal_rate(flags).rate
            prompts = max(prompts, len(flags))
            values = log.read(steps=[step], columns=[metric])[metric].to_numpy(dtype=np.float64)
            total[s, t] = np.nanmean(values)
            for name, chosen in members.items():
                drift[name][s, t] = np.nanmean(values[chosen])
    return BehaviourSeries(
        steps=tuple(steps), refusal_rate=refused, group_drift=drift, total_drift=total, n_prompts=prompts
    )


def read_table(path: Path) -> Rows:
    """The rows of a Parquet file."""
    rows: Rows = pq.read_table(path, partitioning=None).to_pylist()
    return rows


def read_answers(folder: Path) -> Rows:
    """One row a prompt and step of a seed's behaviour folder, by its primary judge (see `per_prompt`)."""
    rows: Rows = []
    for step in saved_steps(folder, ".parquet"):
        rows += per_prompt(read_table(saved_step(folder, step, ".parquet")))
    return rows


def read_perplexities(folder: Path) -> dict[int, float]:
    """Step -> perplexity of held-out answers."""
    file = folder / "perplexity.parquet"
    if not file.exists():
        return {}
    table = pq.read_table(file, partitioning=None)
    return {int(row["step"]): float(row["perplexity"]) for row in table.to_pylist()}


def read_capability(folder: Path) -> Rows:
    """Results of lm-evaluation-harness; empty where no task was asked for."""
    file = folder / "capability.parquet"
    return read_table(file) if file.exists() else []


def behaviour(
    answers: Mapping[int, Rows],
    perplexities: Mapping[int, Mapping[int, float]],
    before_alignment: Rows,
    settings: Mapping[str, Any],
    capability: Rows | None = None,
) -> dict[str, Any] | None:
    """The part of the findings that rests on answers: rates with intervals, changes on the same prompts."""
    if not any(answers.values()):
        return None
    rates: Rows = []
    changes: Rows = []
    for seed, rows in answers.items():
        steps = sorted({row["step"] for row in rows})
        for kind in dict.fromkeys(row["kind"] for row in rows):
            flags: dict[int, dict[str, bool]] = {}
            for step in steps:
                chosen = [row for row in rows if row["kind"] == kind and row["step"] == step]
                flags[step] = {row["id"]: bool(row["refused"]) for row in chosen}
                rates.append({"seed": seed, "step": step, "kind": kind, **_rate(chosen)})
            if len(steps) > 1:
                change: Change = paired_change(flags[steps[0]], flags[steps[-1]])
                changes.append(
                    {"seed": seed, "kind": kind, "from_step": steps[0], "to_step": steps[-1], **change._asdict()}
                )
    unaligned = None
    if before_alignment:
        kinds = dict.fromkeys(row["kind"] for row in before_alignment)
        unaligned = [
            {
                "seed": None,
                "step": None,
                "kind": kind,
                **_rate([row for row in before_alignment if row["kind"] == kind]),
            }
            for kind in kinds
        ]
    values = [
        {"seed": seed, "step": step, "value": value}
        for seed, by_step in perplexities.items()
        for step, value in by_step.items()
    ]
    return {
        **settings,
        "rates": rates,
        "perplexity": values,
        "before_alignment": unaligned,
        "changes": changes,
        "capability": capability or [],
    }


def _rate(rows: Rows) -> dict[str, Any]:
    flags = [bool(row["refused"]) for row in rows]
    over = category_interval(flags, [str(row.get("category") or "") for row in rows])
    return {
        **refusal_rate(flags)._asdict(),
        "category_low": over.low,
        "category_high": over.high,
        "categories": over.categories,
        "category_reason": over.reason or None,
        "coherent": sum(bool(row["coherent"]) for row in rows) / len(rows),
        "success": sum(bool(row.get("success", not row["refused"])) for row in rows) / len(rows),
    }
