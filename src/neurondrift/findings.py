"""From a study's files to its findings: arrays for `statistics`, then the one mapping that `report` draws on.

Owns the layout of `results/statistical_results.json` (docs/results.md). Computes no statistic itself and draws
nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from neurondrift.behaviour.rates import Change, category_interval, paired_change, per_prompt, refusal_rate
from neurondrift.config import AnalyzeSection
from neurondrift.drift.log import METRICS, DriftLog
from neurondrift.drift.weights import WeightDrift, pooled, weight_drifts
from neurondrift.errors import ArtifactError, GroupError
from neurondrift.groups import Group
from neurondrift.statistics import BehaviourSeries, Population, analyze, refine_bins, to_json
from neurondrift.statistics.ratios import ratio_of_means
from neurondrift.statistics.series import cluster_mean, control_means, control_weights, distribution

Rows = list[dict[str, Any]]

SCHEMA_VERSION = 1

# What the matched control of a group of weights is called in a drift log: NAME.matched. And the control of them all.
MATCHED = ".matched"
RANDOM = "random"


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
        behaviour=_behaviour_series(logs, population, members, answers, settings.primary_metric),
    )
    strata = {name: refine_bins(population.site, population.norm, chosen, bins) for name, chosen in members.items()}
    return {
        "analysis": to_json(result),
        "trajectories": trajectories(logs, population, members, strata),
        "distributions": _distributions(population, members, strata, list(logs)),
        "groups": [_describe_group(name, group, int(members[name].sum())) for name, group in groups.items()],
        "weights": single_weights(logs),
        "steps": steps,
    }


def single_weights(logs: Mapping[int, DriftLog]) -> Rows:
    """Drift of the followed groups of weights at every snapshot, beside their matched controls and random weights.

    One row a seed, step and group; none where a log follows no weights. Means and medians are over all members in
    trained sites whose value is defined.
    """
    rows: Rows = []
    for seed, log in logs.items():
        for step in log.steps() if log.follows_weights() else []:
            parts: dict[tuple[str, str], list[WeightDrift]] = {}
            for part in weight_drifts(log.weights(steps=[step])):
                parts.setdefault((part.group, part.metric), []).append(part)
            names = dict.fromkeys(group for group, _ in parts)
            for name in (name for name in names if not name.endswith(MATCHED)):
                row: dict[str, Any] = {"seed": seed, "step": step, "group": name}
                for metric, label in (("absolute", "abs"), ("relative", "relative")):
                    row |= _weight_fields(label, *(parts.get((n, metric)) for n in (name, name + MATCHED, RANDOM)))
                rows.append(row)
    return rows


def _weight_fields(
    label: str,
    members: list[WeightDrift] | None,
    controls: list[WeightDrift] | None,
    random: list[WeightDrift] | None,
) -> dict[str, Any]:
    """The fields of one metric: `label` is `abs` or `relative`."""
    own = pooled(members or [])
    found: dict[str, Any] = {"n": own.count, f"zeros_{label}": own.zeros, f"undefined_{label}": own.undefined}
    for prefix, arm in (("", members), ("matched_", controls), ("random_", random)):
        if arm:
            whole = pooled(arm)
            found |= {f"{prefix}mean_{label}": whole.mean, f"{prefix}median_{label}": whole.quantile(0.5)}
    found |= {f"sd_{label}": math.sqrt(own.variance), f"p99_{label}": own.quantile(0.99)}
    if controls:
        sums = [
            {part.site: (part.defined, part.defined * part.mean) for part in arm} for arm in (members or [], controls)
        ]
        sites = list(sums[0] | sums[1])
        first, second = (np.nan_to_num([arm.get(site, (0.0, 0.0)) for site in sites]) for arm in sums)
        ratio = ratio_of_means(first, second)
        found |= {f"ratio_{label}": ratio.value, f"ratio_{label}_ci95": [ratio.low, ratio.high]}
        if ratio.reason:
            found |= {f"ratio_{label}_reason": ratio.reason, f"ratio_{label}_ci95_reason": ratio.reason}
    return found


def load_population(logs: Mapping[int, DriftLog]) -> tuple[Population, list[int]]:
    """The neurons with their final drift for every seed, and the steps that have snapshots in every log."""
    first = next(iter(logs.values()))
    neurons = first.initial()
    names = list(dict.fromkeys(neurons["site"]))
    code = {name: index for index, name in enumerate(names)}
    by_site = neurons.drop_duplicates("site").set_index("site")
    common = sorted(set.intersection(*(set(log.steps()) for log in logs.values())))
    if not common or common[-1] == 0:
        raise ArtifactError("There is no drift snapshot after step 0", received=str(first.directory))
    drift: dict[str, list[npt.NDArray[np.float64]]] = {metric: [] for metric in METRICS}
    for log in logs.values():
        final = log.read(steps=[common[-1]])
        if (
            len(final) != len(neurons)
            or not (final["site"].astype(str).to_numpy() == neurons["site"].astype(str).to_numpy()).all()
        ):
            raise ArtifactError("The drift logs do not cover the same neurons", received=str(log.directory))
        for metric in METRICS:
            drift[metric].append(final[metric].to_numpy(dtype=np.float64))
    population = Population(
        site=neurons["site"].map(code).to_numpy(dtype=np.int64),
        site_names=tuple(names),
        module_type=tuple(str(by_site.loc[name, "module_type"]) for name in names),
        layer=tuple(int(by_site.loc[name, "layer"]) for name in names),
        row=neurons["row"].to_numpy(dtype=np.int64),
        norm=neurons["norm"].to_numpy(dtype=np.float64),
        drift={metric: np.stack(values) for metric, values in drift.items()},
    )
    return population, common


def membership(population: Population, logs: Mapping[int, DriftLog], group: Group, name: str) -> npt.NDArray[np.bool_]:
    """Which neurons of the population belong to a group."""
    if group.granularity != "neuron":
        raise GroupError(f"The group {name} is of weights", allowed="groups of neurons")
    model = next(iter(logs.values())).metadata()["model"]
    if group.provenance.get("model", model) != model:
        raise GroupError(
            f"The group {name} was made from another model", received=group.provenance["model"], allowed=model
        )
    chosen = np.zeros(len(population.site), dtype=bool)
    starts = np.searchsorted(population.site, np.arange(len(population.site_names)))
    for index, site in enumerate(population.site_names):
        chosen[starts[index] + group.rows(site)] = True
    if not chosen.any():
        raise GroupError(
            f"No member of the group {name} lies in a trained site", fix="adapt more modules, or make other groups"
        )
    return chosen


def _describe_group(name: str, group: Group, trained: int) -> dict[str, Any]:
    provenance = group.provenance
    rule = str(provenance.get("rule", "unknown"))
    for key in ("fraction", "p", "q", "seed"):
        if key in provenance:
            rule += f", {key} = {provenance[key]}"
    return {
        "name": name,
        "granularity": group.granularity,
        "members": len(group),
        "members_in_trained_sites": trained,
        "sites": len(group.members),
        "rule": rule,
    }


def trajectories(
    logs: Mapping[int, DriftLog],
    population: Population,
    members: Mapping[str, npt.NDArray[np.bool_]],
    strata: Mapping[str, npt.NDArray[np.int64]],
) -> Rows:
    """Mean drift of each group and of its matched controls at every snapshot, with intervals over sites."""
    rows: Rows = []
    for seed, log in logs.items():
        for step in log.steps():
            snapshot = log.read(steps=[step])
            for metric in METRICS:
                drift = snapshot[metric].to_numpy(dtype=np.float64)
                overall = cluster_mean(drift, population.site)
                rows.append(
                    {
                        "seed": seed,
                        "step": step,
                        "group": "all",
                        "metric": metric,
                        "members": overall._asdict(),
                        "controls": None,
                    }
                )
                for name, chosen in members.items():
                    controls = control_means(drift, strata[name], chosen)
                    rows.append(
                        {
                            "seed": seed,
                            "step": step,
                            "group": name,
                            "metric": metric,
                            "members": cluster_mean(drift[chosen], population.site[chosen])._asdict(),
                            "controls": cluster_mean(controls, population.site[chosen])._asdict(),
                        }
                    )
    return rows


def _distributions(
    population: Population,
    members: Mapping[str, npt.NDArray[np.bool_]],
    strata: Mapping[str, npt.NDArray[np.int64]],
    seeds: Sequence[int],
) -> Rows:
    rows: Rows = []
    for name, chosen in members.items():
        weights = control_weights(strata[name], chosen)
        for metric in METRICS:
            found = distribution(population.drift[metric][0], chosen, weights)
            if found is not None:
                rows.append(
                    {
                        "group": name,
                        "metric": metric,
                        "seed": seeds[0],
                        **{key: values.tolist() for key, values in found._asdict().items()},
                        "n_members": int(chosen.sum()),
                        "n_controls": int((weights > 0).sum()),
                    }
                )
    return rows


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


# --- behaviour ------------------------------------------------------------------------------------------


def read_table(path: Path) -> Rows:
    """The rows of a Parquet file."""
    rows: Rows = pq.read_table(path, partitioning=None).to_pylist()
    return rows


def read_answers(folder: Path) -> Rows:
    """One row a prompt and step of a seed's behaviour folder, by its primary judge (see `per_prompt`)."""
    rows: Rows = []
    for file in sorted(folder.glob("step=*.parquet")):
        rows += per_prompt(read_table(file))
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


def json_safe(value: Any) -> Any:
    """The same value with NaN and infinities as None, arrays and tuples as lists, numpy numbers as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    json.dumps(value)  # anything else must be plain already
    return value
