"""From drift logs and groups to the arrays that statistics take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.drift.bins import WeightDrift, pooled, weight_drifts
from neurondrift.drift.log import METRICS, DriftLog
from neurondrift.groups.group import Group
from neurondrift.statistics.comparison import Population
from neurondrift.statistics.descriptive import (
    cluster_mean,
    control_means,
    control_weights,
    distribution,
    ratio_of_means,
)

# What the matched control of a group of weights is called in a drift log: NAME.matched. And the control of them all.
Rows = list[dict[str, Any]]
RANDOM = "random"
MATCHED = ".matched"


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
