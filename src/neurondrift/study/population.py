"""From a study's files to what statistics take: drift logs and groups as arrays, judged answers as rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from neurondrift.base.errors import ArtifactError, GroupError
from neurondrift.base.files import read_parquet
from neurondrift.base.roles import Role
from neurondrift.behaviour.rates import per_prompt, refusal_rate
from neurondrift.drift.log import METRICS, DriftLog
from neurondrift.groups.covariates import Covariates
from neurondrift.groups.group import Group
from neurondrift.statistics.descriptive import BehaviourSeries
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.design.ratios import Rules
from neurondrift.study.folder import saved_step, saved_steps

Rows = list[dict[str, Any]]
#: What the matched control of a group of weights is called in a drift log: NAME.matched.
MATCHED = ".matched"
#: What neurons are matched on beside site and norm, of the columns of the file of covariates.
COVARIATES = ("safety_score", "utility_score", "gradient_scale")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The groups of an analysis and how it compares them, as in `statistics.analyze`; `on`: what each balances."""

    population: Population
    members: Mapping[str, npt.NDArray[np.bool_]]
    roles: Mapping[str, Role | None]
    judging: Sequence[str]
    on: Mapping[str, tuple[str, ...]]
    rules: Rules
    bins: int


def load_population(logs: Mapping[int, DriftLog], covariates: Path | None = None) -> tuple[Population, list[int]]:
    """The neurons with their final drift for every seed, and the steps that have snapshots in every log.

    `covariates` is a file that the stage groups wrote; without one (older studies, `diff`) the population has none.
    Raises `ArtifactError` for logs that do not cover the same neurons, and for covariates of another model.
    """
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
    site_N = neurons["site"].map(code).to_numpy(dtype=np.int64)
    row_N = neurons["row"].to_numpy(dtype=np.int64)
    model = first.metadata()["model"]
    population = Population(
        site=site_N,
        site_names=tuple(names),
        module_type=tuple(str(by_site.loc[name, "module_type"]) for name in names),
        layer=tuple(int(by_site.loc[name, "layer"]) for name in names),
        row=row_N,
        norm=neurons["norm"].to_numpy(dtype=np.float64),
        drift={metric: np.stack(values) for metric, values in drift.items()},
        covariates={} if covariates is None else read_covariates(covariates, model, names, site_N, row_N),
    )
    return population, common


def read_covariates(
    path: Path, model: str, sites: Sequence[str], site_N: npt.NDArray[np.int64], row_N: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Utility score and gradient scale of neurons (their site's place in `sites`, their row), float64 [N], as they are.

    Raises `ArtifactError` where the file is damaged, of another model than that with this fingerprint, or does not
    cover the neurons.
    """
    file = Covariates(path)
    if file.about.get("model") != model:
        raise ArtifactError(
            "The covariates of neurons are of another model", received=file.about.get("model"), allowed=model
        )
    result = {name: np.full(len(site_N), np.nan) for name in COVARIATES}
    for place, site in enumerate(sites):
        here_N = site_N == place
        for name, values_N in result.items():
            own = file.of_site(name, site)
            if own is None or row_N[here_N].max() >= len(own):
                raise ArtifactError(f"The covariates of neurons do not cover {site}", received=str(path))
            values_N[here_N] = own[row_N[here_N]]
    return result


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


def behaviour_series(
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
                bool(row.get("refused_short", row["refused"]))  # judged alike at every step
                for row in answers.get(seed, [])
                if row["kind"] == "harmful" and row["step"] == step
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
    """The rows of a Parquet file. `ArtifactError` where it cannot be read."""
    rows: Rows = read_parquet(path).to_pylist()
    return rows


def read_answers(folder: Path) -> Rows:
    """One row per prompt and step of a seed's behaviour folder, by its primary judge (see `per_prompt`)."""
    rows: Rows = []
    for step in saved_steps(folder, ".parquet"):
        rows += per_prompt(read_table(saved_step(folder, step, ".parquet")))
    return rows


def read_perplexities(folder: Path) -> dict[int, float]:
    """Step -> perplexity of held-out answers."""
    file = folder / "perplexity.parquet"
    if not file.exists():
        return {}
    return {int(row["step"]): float(row["perplexity"]) for row in read_table(file)}


def read_capability(folder: Path) -> Rows:
    """Results of lm-evaluation-harness; empty where no task was asked for."""
    file = folder / "capability.parquet"
    return read_table(file) if file.exists() else []
