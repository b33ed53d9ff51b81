"""Does it depend on the optimiser how far a group moves? AdamW against SGD with momentum, all else equal.

    python benchmarks/optimiser.py STUDY [--runs DIR] [--seeds 0,1,2] [--answers 32] [--tolerance 0.05]
        [--prompts 32] [--write docs/methods.md]

STUDY is the folder of a study that fine-tunes with LoRA, such as the demo's; what it lacks of the stages align, score
and groups is done. Both optimisers start from the same weights with the same initialisation, data, order, schedule,
clipping and number of steps; what differs is the rule of the step, and the learning rate that goes with it. Two ways
of comparing:

- **same displacement**: the mean over sites of |B| (Frobenius; B starts at 0) after the last step. SGD's learning rate
  is found at the first seed, by steps of the secant rule in logarithms from the rate that clipped gradients would need:
  fits of a third of the steps, then whole ones until they agree within the tolerance; then it is fixed for all seeds.
- **same held-out loss**: of the two runs of a seed the one that ends lower is read where its loss on held-out answers
  first comes down to the other's last. No further run is needed.

For every group of neurons in the folder: how far its members moved beside comparable neurons, as a ratio with its
interval, through `statistics.analyze`. Beside it, within sites, the rank correlation of a row's drift with the scale of
its gradient on the fine-tuning data; and, where the package has `functional_drift` and `path_attribution`, on
`--prompts` examples (0: not): how far the group's outputs moved on refusals and on ordinary answers beside those of the
same neurons, and which share of the lost refusal margin it carries. Every fit is a folder in DIR (default: STUDY.optimiser) and stands once it is
made, so the command can be killed and run again. Prints Markdown; `--write` puts it into a document, between its
markers, with the commit and the machine.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from document import surroundings, write_between
from safetensors.numpy import load_file
from scipy.stats import rankdata
from transformers import TrainerCallback

from neurondrift.base.files import json_safe, read_json, read_parquet, sha256_of_value, write_json
from neurondrift.base.processes import tune_allocator
from neurondrift.base.roles import ROLES
from neurondrift.behaviour.capability import perplexity
from neurondrift.drift.callback import DriftCallback
from neurondrift.drift.log import METRICS, DriftLog
from neurondrift.groups.group import load_group, role_of
from neurondrift.importance.scores import score
from neurondrift.models.data import encode, load_examples
from neurondrift.models.loading import attach_adapter
from neurondrift.models.sites import Sites
from neurondrift.statistics.analysis import analyze
from neurondrift.statistics.design.population import Population
from neurondrift.statistics.results import RatioEffect, StudyResult
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.population import load_population, membership
from neurondrift.study.runner import StudyRun
from neurondrift.study.settings import Study, resolve
from neurondrift.study.stages.finetuning import finetune_study, load_trainee
from neurondrift.study.stages.table import section_inputs
from neurondrift.study.training import detach_adapter, snapshot_steps, total_steps

OPTIMISERS = {"adamw": "AdamW", "sgd": "SGD with momentum"}
ON = ("safety", "utility")
VERDICTS = {"more": "further", "similar": "as far", "protected": "less far", "inconclusive": "inconclusive"}
SNAPSHOTS, LOSSES = 15, 4  # of a run: steps with drift and adapter, and of these with held-out loss at first
SHORT_FITS, WHOLE_FITS = 3, 3
NEAR = 0.25  # how near a short fit need come: it is a third of the way


class Fit(NamedTuple):
    """One fine-tuning that is done: its folder holds adapters, drift and held-out losses of its steps."""

    optimiser: str
    rate: float
    seed: int
    folder: Path

    @property
    def log(self) -> DriftLog:
        return DriftLog(self.folder / "drift")

    def last(self) -> int:
        return self.log.steps()[-1]

    def displacement(self, step: int | None = None) -> float:
        """Mean over sites of the Frobenius norm of B at a step (default: the last)."""
        file = saved_step(self.folder / "model", self.last() if step is None else step) / "adapter_model.safetensors"
        norms = [
            float(np.linalg.norm(value.astype(np.float64)))
            for name, value in load_file(file).items()
            if ".lora_B." in name
        ]
        return float(np.mean(norms))


class Point(NamedTuple):
    """A run at one of its steps."""

    fit: Fit
    step: int


class _StopAt(TrainerCallback):
    """Ends the training after a step, on the schedule of the whole."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


class Bench:
    """The study, its model (loaded once) and the folder of the runs."""

    def __init__(self, folder: StudyFolder, study: Study, runs: Path, *, answers: int, prompts: int) -> None:
        self.study, self.folder, self.runs, self.prompts = study, folder, runs, prompts
        self.trainee = load_trainee(study, folder)
        self.answers = load_examples(study.evaluate.answers)[:answers]
        self.total = total_steps(len(self.trainee.encoded), study.finetune)
        self.interval = max(1, self.total // SNAPSHOTS)
        self.model_key = Sites(self.trainee.model).fingerprint

    def fit(self, optimiser: str, rate: float, seed: int, *, stop: int | None = None) -> Fit:
        """Fine-tune, unless this fit stands; `stop` ends it early."""
        settings = self.study.finetune.model_copy(
            update={"optimiser": optimiser, "learning_rate": rate, "drift_interval": self.interval}
        )
        study = self.study.model_copy(update={"finetune": settings})
        name = f"{optimiser}-{rate:.4g}{'' if stop is None else f'-first-{stop}'}"
        target = self.runs / name / f"seed={seed}"
        fit = Fit(optimiser, rate, seed, target)
        key = sha256_of_value([section_inputs(settings), seed, stop, self.model_key])[:16]
        if (target / "done.json").exists() and read_json(target / "done.json")["key"] == key:
            return fit
        marker = target / "in_progress.json"
        if not (marker.exists() and read_json(marker) == key):
            shutil.rmtree(target, ignore_errors=True)
            write_json(marker, key)
        began = time.perf_counter()
        callbacks: list[TrainerCallback] = [DriftCallback(target / "drift", every=self.interval, on_full_disk="stop")]
        trained = finetune_study(
            study,
            self.trainee,
            seed,
            keep_in=target / "model",
            beside=(target / "drift",),
            save_at=snapshot_steps(self.total, self.interval),
            callbacks=[*callbacks, *([] if stop is None else [_StopAt(stop)])],
        )
        detach_adapter(trained.model)
        shutil.rmtree(target / "model" / "trainer", ignore_errors=True)
        seconds = time.perf_counter() - began
        write_json(target / "log.json", json_safe(trained.log))
        write_json(target / "done.json", {"key": key, "seconds": round(seconds, 1)})
        say(f"{name}, seed {seed}: {fit.last()} steps in {seconds:.0f} s, mean |B| {fit.displacement():.4g}")
        return fit

    def loss(self, fit: Fit | None, step: int) -> float:
        """Mean cross-entropy of the held-out answers over response tokens; of the model before where `fit` is None."""
        file = (self.runs if fit is None else fit.folder) / "held_out.json"
        key = f"{len(self.answers)} answers, step {step}" + (f", {self.model_key}" if fit is None else "")
        known: dict[str, float] = read_json(file) if file.exists() else {}
        if key not in known:
            model = self.trainee.model
            if fit is not None and step:
                model = attach_adapter(model, saved_step(fit.folder / "model", step))
            settings = self.study.finetune
            value = perplexity(
                model.eval(), self.trainee.tokenizer, self.answers, batch_size=8, max_length=settings.max_length
            )
            if model is not self.trainee.model:
                detach_adapter(model)
            known[key] = math.log(value)
            write_json(file, known)
        return known[key]


def next_rate(tried: Sequence[tuple[float, float]], target: float) -> float:
    """The learning rate to try next, from (rate, displacement) pairs: the secant rule in logarithms through the two
    that came nearest; from one alone, displacement is taken to be proportional to the rate."""
    nearest = sorted(tried, key=lambda pair: abs(math.log(pair[1] / target)))[:2]
    slope = 1.0
    if len(nearest) == 2 and nearest[0][0] != nearest[1][0]:
        (a, x), (b, y) = nearest
        slope = min(4.0, max(0.25, math.log(x / y) / math.log(a / b)))
    rate, reached = nearest[0]
    return rate * float(np.clip(target / reached, 1 / 30, 30)) ** (1 / slope)


def matching_rate(bench: Bench, adamw: Fit, *, tolerance: float) -> float:
    """SGD's learning rate with which B ends as far from 0 as AdamW's, at the first seed."""
    momentum = bench.study.finetune.momentum
    entries = [value.size for name, value in _adapter(adamw).items() if ".lora_B." in name]
    # AdamW moves every entry by about its rate; clipped SGD all of them together by its rate over 1 - momentum.
    rate = adamw.rate * math.sqrt(sum(entries)) * (1 - momentum)
    steps = saved_steps(adamw.folder / "model")
    short = min(steps, key=lambda step: abs(step - bench.total / 3))

    def tries(stop: int | None, most: int, near: float, rate: float) -> float:
        target = adamw.displacement(stop)
        tried: list[tuple[float, float]] = []
        for _ in range(most):
            rate = float(f"{rate:.3g}")
            reached = bench.fit("sgd", rate, adamw.seed, stop=stop).displacement()
            tried.append((rate, reached if math.isfinite(reached) and reached > 0 else 1e6 * target))
            say(f"SGD at {rate:g}: |B| is {reached / target:.3f} of AdamW's after {stop or bench.total} steps")
            if abs(reached / target - 1) <= near:
                break
            rate = next_rate(tried, target)
        return min(tried, key=lambda pair: abs(math.log(pair[1] / target)))[0]

    if short < bench.total:
        rate = tries(short, SHORT_FITS, NEAR, rate)
    return tries(None, WHOLE_FITS, tolerance, rate)


def _adapter(fit: Fit) -> Mapping[str, Any]:
    return load_file(saved_step(fit.folder / "model", fit.last()) / "adapter_model.safetensors")


def where_it_meets(steps: Sequence[int], loss: Callable[[int], float], level: float) -> int:
    """The step at which a falling loss first comes nearest to a level that it reaches: `steps` ascend, and the first
    lies above the level. Asks at `LOSSES` steps, then halves the stretch in which the level is crossed."""
    first = sorted({steps[round(i * (len(steps) - 1) / LOSSES)] for i in range(LOSSES + 1)})
    below = next((step for step in first if loss(step) <= level), first[-1])
    high = steps.index(below)
    low = max((i for i in range(high) if steps[i] in first), default=0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if loss(steps[middle]) <= level else (middle, high)
    return min(steps[low], steps[high], key=lambda step: abs(loss(step) - level))


def same_loss(bench: Bench, one: Fit, other: Fit) -> dict[str, Point]:
    """Of two runs the one that ends higher at its last step, and the other where its loss is the same."""
    ends = {fit: bench.loss(fit, fit.last()) for fit in (one, other)}
    higher, lower = sorted(ends, key=lambda fit: -ends[fit])
    steps = saved_steps(lower.folder / "model")
    steps = [0, *(step for step in steps if step)]
    step = where_it_meets(steps, lambda at: bench.loss(lower if at else None, at), ends[higher])
    return {higher.optimiser: Point(higher, higher.last()), lower.optimiser: Point(lower, max(step, steps[1]))}


def population_of(bench: Bench, points: Mapping[int, Point]) -> Population:
    """The neurons with their drift at each seed's own step, and the covariates that the study has of them."""
    population, _ = load_population({seed: point.fit.log for seed, point in points.items()})
    at = {seed: point.fit.log.read(steps=[point.step]) for seed, point in points.items()}
    drift = {metric: np.stack([at[seed][metric].to_numpy(dtype=np.float64) for seed in at]) for metric in METRICS}
    covariates = {}
    file = bench.folder.groups / "covariates.parquet"
    if file.exists():
        table = read_parquet(file).to_pandas()
        by_site = {str(name): part.sort_values("row") for name, part in table.groupby("site", observed=True)}
        for column in ("utility_score", "gradient_scale"):
            covariates[column] = _per_neuron(population, {n: part[column].to_numpy() for n, part in by_site.items()})
    return dataclasses.replace(population, drift=drift, covariates=covariates)


def _per_neuron(population: Population, by_site: Mapping[str, np.ndarray], *, all_sites: bool = True) -> np.ndarray:
    """Values of the rows of sites as values of the population's neurons; NaN for a site that has none, where it may."""
    values = np.full(len(population.site), np.nan)
    for index, name in enumerate(population.site_names):
        mine = population.site == index
        if all_sites or name in by_site:
            values[mine] = by_site[name][population.row[mine]]
    return values


def groups_in(folder: StudyFolder) -> dict[str, Any]:
    """Every group of neurons that the folder has, but the drawn controls: safety groups first, as `ROLES` has them."""
    names = (file.name.removesuffix(".neurons.parquet") for file in folder.groups.glob("*.neurons.parquet"))
    groups = {name: load_group(folder.group_file(name, "neuron")) for name in names if not name.endswith(".matched")}
    order = {role: index for index, role in enumerate(ROLES)}
    return dict(sorted(groups.items(), key=lambda item: (order.get(role_of(item[1], item[0]), len(ROLES)), item[0])))


def members_of(bench: Bench, population: Population, points: Mapping[int, Point]) -> dict[str, np.ndarray]:
    """Name of a group -> which neurons are in it."""
    logs = {seed: point.fit.log for seed, point in points.items()}
    return {name: membership(population, logs, group, name) for name, group in groups_in(bench.folder).items()}


def result_of(
    bench: Bench,
    population: Population,
    members: Mapping[str, np.ndarray],
    metrics: Sequence[str],
    seeds: Sequence[int],
) -> StudyResult:
    settings = bench.study.analyze
    return analyze(
        population,
        members,
        metrics=metrics,
        seed_labels=[str(seed) for seed in seeds],
        band=settings.band,
        resamples=settings.resamples,
        bins=bench.study.groups.bins,
        rng_seed=bench.study.seed,
        primary_metric=settings.primary_metric,
        roles={name: role_of(group, name) for name, group in groups_in(bench.folder).items()},
    )


def what_it_does(bench: Bench, point: Point) -> dict[str, Any]:
    """Of a run at a step, site -> value of each row: how far its output moved on refusals and on ordinary answers (a
    length: the root of `functional_drift`), and what it carries of the change of the refusal margin; that change, and
    what the sum over all misses of it. Empty where the package has no such measures, or none is asked for."""
    import neurondrift as nd

    if not bench.prompts or not hasattr(nd, "functional_drift"):
        return {}
    file = point.fit.folder / f"does-{bench.prompts}-step={point.step:06d}.npz"
    if not file.exists():
        began = time.perf_counter()
        study, tokenizer = bench.study, bench.trainee.tokenizer
        sets = [load_examples(source)[: bench.prompts] for source in (study.score.safety, study.score.utility)]
        safety, utility = (encode(part, tokenizer, max_length=study.score.max_length) for part in sets)
        model = attach_adapter(bench.trainee.model, saved_step(point.fit.folder / "model", point.step)).eval()
        outputs = nd.functional_drift(model, safety, utility).rows
        harmful = load_examples(study.evaluate.harmful, require_response=False, kind="harmful")[: bench.prompts]
        margins = {"harmful": nd.Margin(model, tokenizer, harmful)}
        margin = nd.path_attribution(model, margins, tolerance=None)["harmful"]
        detach_adapter(model)
        values = {f"outputs_{kind}/{n}": getattr(o, kind).sqrt() for n, o in outputs.items() for kind in ON}
        values |= {f"margin/{name}": value for name, value in margin.rows.items()}
        facts = {"change": np.array(margin.change), "missed": np.array(margin.missed)}
        np.savez(file, **{name: value.numpy() for name, value in values.items()}, **facts)
        say(
            f"what {point.fit.optimiser}, seed {point.fit.seed}, step {point.step} does: {time.perf_counter() - began:.0f} s"
        )
    stored = np.load(file)
    found: dict[str, Any] = {"change": float(stored["change"]), "missed": float(stored["missed"])}
    for key in stored:
        measure, _, site = key.partition("/")
        if site:
            found.setdefault(measure, {})[site] = stored[key]
    return found


def gradient_scale(bench: Bench, population: Population) -> np.ndarray:
    """Per neuron the root mean square length of its row's gradient on fine-tuning examples, at the first weights: of
    the study where it has it, else measured on 64 of them."""
    if "gradient_scale" in population.covariates:
        return population.covariates["gradient_scale"]
    file = bench.runs / "gradient_scale.npz"
    if not file.exists():
        squares = score(bench.trainee.model, bench.trainee.encoded[:64], method="fisher", batch_size=8)
        np.savez(file, **{name: value.sum(dim=1).sqrt().numpy() for name, value in squares.items()})
    return _per_neuron(population, dict(np.load(file)))


def rank_correlation(population: Population, metric: str, scale: np.ndarray) -> list[float]:
    """Per seed: Spearman's rank correlation of drift and gradient scale within each site, averaged over sites with
    their numbers of rows as weights."""
    values = []
    for drift in population.drift[metric]:
        total = weight = 0.0
        for index in range(len(population.site_names)):
            mine = (population.site == index) & np.isfinite(drift) & np.isfinite(scale)
            if mine.sum() > 2 and np.ptp(drift[mine]) > 0 and np.ptp(scale[mine]) > 0:
                one, two = rankdata(drift[mine]), rankdata(scale[mine])
                total += float(np.corrcoef(one, two)[0, 1]) * mine.sum()
                weight += float(mine.sum())
        values.append(total / weight if weight else math.nan)
    return values


def cell(effect: RatioEffect | None) -> str:
    """A ratio with its interval and verdict; what could not be computed is left out."""
    if effect is None:
        return "–"
    reasons = ", ".join(effect.not_comparable_because).replace("_", " ")
    parts = [VERDICTS[effect.verdict] if effect.comparable else f"not comparable ({reasons})"]
    if math.isfinite(effect.ratio):
        low, high = effect.ratio_ci95
        interval = f" [{low:.2f}, {high:.2f}]" if math.isfinite(low) and math.isfinite(high) else ""
        parts = [f"{effect.ratio:.2f}{interval}", *parts]
    return " ".join(parts)


def several(values: Sequence[float], form: str = ".3f") -> str:
    return " / ".join(format(value, form) for value in values)


def rows_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def compared(bench: Bench, settings: Mapping[str, Mapping[int, Point]]) -> tuple[list[str], dict[str, Any]]:
    """The tables, from each setting's points: its label -> seed -> a run at a step."""
    results: dict[str, StudyResult] = {}
    runs, correlations, stored, shares = [], [], {}, {}
    for label, points in settings.items():
        population = population_of(bench, points)
        members = members_of(bench, population, points)
        does = {seed: found for seed, point in points.items() if (found := what_it_does(bench, point))}
        further = [f"outputs_{kind}" for kind in ON] if does else []
        drift = {
            name: np.stack([_per_neuron(population, found[name], all_sites=False) for found in does.values()])
            for name in further
        }
        population = dataclasses.replace(population, drift={**population.drift, **drift})
        metrics = (bench.study.analyze.primary_metric, *further)
        results[label] = result_of(bench, population, members, metrics, list(points))
        if does:
            shares[label] = {name: _shares(population, chosen, does.values()) for name, chosen in members.items()}
        scale = gradient_scale(bench, population)
        ranks = {metric: rank_correlation(population, metric, scale) for metric in ("l2", "relative")}
        moved = [point.fit.displacement(point.step) for point in points.values()]
        losses = [bench.loss(point.fit, point.step) for point in points.values()]
        steps = [point.step for point in points.values()]
        rate = next(iter(points.values())).fit.rate
        margin = [several([found[key] for found in does.values()], ".2f") for key in ("change", "missed")]
        runs.append((label, f"{rate:g}", several(steps, "d"), several(moved, ".4f"), several(losses), *margin))
        correlations.append((label, several(ranks["l2"], ".2f"), several(ranks["relative"], ".2f")))
        stored[label] = {"rate": rate, "steps": steps, "displacement": moved, "loss": losses, "ranks": ranks}
    first = next(iter(results.values()))
    header = ["run", "learning rate", "step", "mean \\|B\\|", "held-out loss", "margin, change", "missed by the sum"]
    lines = [
        *rows_of(header if shares else header[:-2], [row if shares else row[:-2] for row in runs]),
        "",
        f"Seeds {', '.join(first.seed_labels)}, in this order where a cell has several numbers. Held-out loss before "
        f"fine-tuning: {bench.loss(None, 0):.3f} ({len(bench.answers)} answers).",
    ]
    matched = "Beside neurons of the same site, row norm, utility score and gradient scale"
    normed = "Beside neurons of the same site and row norm"
    primary = first.primary_metric
    wanted = [
        ("effect_matched", primary, f"{matched}: {primary.replace('_', ' ')} drift of members over that of controls")
    ]
    wanted += [("effect_norm", primary, f"{normed}: the same")]
    for metric, inputs in (("outputs_safety", "refusals"), ("outputs_utility", "ordinary answers")):
        wanted += [("primary_effect", metric, f"Beside the first of these: how far outputs moved on {inputs}")]
    sizes = {effect.group: effect.n_members for effect in first.effects}
    for comparison, metric, words in wanted:
        shown = {
            label: {e.group: getattr(e, comparison) for e in result.effects if e.metric == metric}
            for label, result in results.items()
        }
        if not any(effect is not None for effects in shown.values() for effect in effects.values()):
            continue  # no covariates, or no such measure
        lines += ["", f"{words}, with 95 % intervals.", ""]
        lines += rows_of(
            ("group", "neurons", *results),
            [(f"`{n}`", str(sizes[n]), *(cell(shown[label].get(n)) for label in results)) for n in first.groups],
        )
        for label in results:
            stored[label][f"{metric}, {comparison}"] = {
                name: None if effect is None else dataclasses.asdict(effect) for name, effect in shown[label].items()
            }
    if shares:
        of_all = len(population.site)
        lines += ["", "Share of the change of the refusal margin that the group's rows carry:", ""]
        rows = [
            (f"`{n}`", f"{sizes[n] / of_all:.3f}", *(several(of[n]) for of in shares.values())) for n in first.groups
        ]
        lines += rows_of(("group", "share of neurons", *shares), rows)
        for label, of in shares.items():
            stored[label]["share of the margin"] = of
    lines += ["", "Rank correlation, within sites, of a row's drift with the scale of its gradient:", ""]
    lines += rows_of(("run", "L2 drift", "relative drift"), correlations)
    return lines, stored


def _shares(population: Population, chosen: np.ndarray, does: Collection[Mapping[str, Any]]) -> list[float]:
    values = (_per_neuron(population, found["margin"], all_sites=False)[chosen] for found in does)
    return [float(np.nansum(part)) / found["change"] for part, found in zip(values, does, strict=True)]


def _gpu() -> str:
    return f"; on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description="AdamW against SGD with momentum, all else equal.")
    parser.add_argument("study", type=Path)
    parser.add_argument("--preset", help="of the study, where the folder holds none yet")
    parser.add_argument("--runs", type=Path, help="folder of the fits; default: STUDY.optimiser")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--answers", type=int, default=32, help="held-out answers")
    parser.add_argument("--prompts", type=int, default=32, help="of each set, for what a change does; 0: not measured")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the displacement, at the first seed")
    parser.add_argument("--write", type=Path, help="document whose table is replaced")
    given = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|peft\.")  # theirs to settle
    tune_allocator()
    file = given.study / StudyFolder.CONFIGURATION
    study = resolve(file=file) if file.exists() else resolve(preset=given.preset or "demo")
    if study.finetune.method != "lora" or study.finetune.freeze is not None:
        raise SystemExit("the study must fine-tune with LoRA and freeze nothing: the displacement is that of B")
    began = time.perf_counter()
    run = StudyRun(study, given.study, say=say)
    run.run(["align", "score", "groups"])
    runs = given.runs or given.study.with_name(given.study.name + ".optimiser")
    bench = Bench(run.folder, study, runs, answers=given.answers, prompts=given.prompts)
    seeds = [int(part) for part in given.seeds.split(",")]
    rate = study.finetune.learning_rate
    adamw = {seeds[0]: bench.fit("adamw", rate, seeds[0])}
    found = matching_rate(bench, adamw[seeds[0]], tolerance=given.tolerance)
    say(f"SGD's learning rate is {found:g} from here on")
    sgd = {}
    for seed in seeds:
        adamw[seed] = bench.fit("adamw", rate, seed)
        sgd[seed] = bench.fit("sgd", found, seed)
    met = {seed: same_loss(bench, adamw[seed], sgd[seed]) for seed in seeds}
    settings: dict[str, dict[int, Point]] = {
        "AdamW": {seed: Point(adamw[seed], adamw[seed].last()) for seed in seeds},
        "SGD, same displacement": {seed: Point(sgd[seed], sgd[seed].last()) for seed in seeds},
    }
    for optimiser, label, of in (
        ("adamw", "AdamW, same held-out loss", settings["AdamW"]),
        ("sgd", "SGD, same held-out loss", settings["SGD, same displacement"]),
    ):
        points = {seed: met[seed][optimiser] for seed in seeds}
        if points != of:  # else its last steps, which stand in the table
            settings[label] = points
    lines, stored = compared(bench, settings)
    made = f"{surroundings('torch', 'transformers')}; {torch.get_num_threads()} threads{_gpu()}"
    lines = [f"`python benchmarks/optimiser.py` on the study `{study.name}` ({made}).", "", *lines]
    write_json(runs / "optimiser.json", json_safe({"made": made, "settings": stored}))
    print("\n".join(lines))
    if given.write:
        write_between(given.write, "optimiser.py", lines)
    say(f"{time.perf_counter() - began:.0f} s in all; fits, losses and optimiser.json in {runs}")


if __name__ == "__main__":
    main()
