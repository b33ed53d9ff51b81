"""`neurondrift intervene`: interventions on the groups of a study, or on a group and an adapter made elsewhere."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from neurondrift.base.errors import ArtifactError, ConfigError
from neurondrift.base.files import json_safe, sha256_of_value, write_json
from neurondrift.base.progress import progress
from neurondrift.groups.doses import Importance, importance_of, read_importance
from neurondrift.groups.group import Granularity, Group, load_group
from neurondrift.importance.scores import ScoreFile
from neurondrift.interventions.contexts import Applied, PruneMode, reach
from neurondrift.interventions.outcomes import SCHEMA_VERSION, summarise
from neurondrift.interventions.trials import (
    INTERVENTIONS,
    Bench,
    Draws,
    RunLog,
    Subject,
    Trial,
    plan,
    planned_draws,
    run_trials,
)
from neurondrift.models.data import encode, load_examples
from neurondrift.models.loading import attach_adapter, load_model, resolve_device, resolve_dtype
from neurondrift.models.sites import Site, fingerprint, linear_sites, magnitudes_of, mlp_units
from neurondrift.report.conclusion import intervention_findings
from neurondrift.report.findings.interventions import Interventions
from neurondrift.statistics.null import ALPHA, smallest_p
from neurondrift.study.base_model import load_base, load_named
from neurondrift.study.folder import StudyFolder, record
from neurondrift.study.settings import GROUP_NAMES, GROUP_ROLES, Study
from neurondrift.study.stages.reporting import weights_digest
from neurondrift.study.training import detach_adapter, finetune, saved_step

Say = Callable[[str], None]

NEVER = 1_000_000  # steps between checkpoints of a training that is not gone on from


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `neurondrift intervene` is asked for."""

    groups: tuple[str, ...] = ()  # names of the study's groups, or files; default: the safety groups
    interventions: tuple[str, ...] = ()  # default: all that can be run
    draws: Draws = field(default_factory=Draws)
    doses: tuple[float, ...] | None = None  # default: 0.1, 0.25, 0.5, 1, as far as importances are there
    granularity: Granularity = "neuron"
    mode: PruneMode = "zero"
    seed: int | None = None  # the training seed; default: the study's first
    harmful: int = 32
    ordinary: int = 8
    answers: int = 8
    max_new_tokens: int = 16
    scores: Path | None = None
    adapter: Path | None = None


DOSES = (0.1, 0.25, 0.5, 1.0)


def results_file(folder: StudyFolder) -> Path:
    """Where the findings lie."""
    return folder.results / "interventions.json"


def intervene(study: Study, folder: StudyFolder, options: Options, *, say: Say) -> Interventions:
    """Run the interventions that are not done yet, and write what they show.

    Raises
    ------
    ArtifactError
        A study that is not fine-tuned or has no groups; importances that a dose needs.
    GroupError
        A group of another model, outside the trained sites, or larger than its controls can match.
    """
    began = time.perf_counter()
    seed = study.seed if options.seed is None else options.seed
    subject, adapter = _subject(study, folder, options, seed)
    base = fingerprint(subject.before)
    step = None if options.adapter is not None else last_step(folder, seed)
    groups = _groups(folder, options)
    asked = options.interventions or tuple(
        name for name in INTERVENTIONS if name != "freeze" or subject.train_frozen is not None
    )
    _check(groups, subject, base, asked)
    doses, importance = _importances(folder, groups, options, say)
    bins = study.groups.weight_bins if options.granularity == "weight" else study.groups.bins
    trials = plan(
        groups,
        interventions=asked,
        doses=doses,
        draws=options.draws,
        magnitudes=magnitudes_of(subject.before, options.granularity),
        bins=bins,
        seed=study.seed,
        importance=importance,
    )
    bench = _bench(study, options)
    inputs = sha256_of_value(
        [base, adapter, bench.judging, bench.max_length]
        + [[kind, [(e.id, e.prompt) for e in examples]] for kind, examples in bench.sets.items()]
        + [[(e.id, e.prompt, e.response) for e in bench.answers]]
        + [study.finetune.model_dump(mode="json"), seed]
    )
    log = RunLog(folder.results / "interventions.parquet")
    say(_announce(trials, bench, options.draws))
    results = _run(trials, subject, bench, log, inputs, options, say)
    found = {
        "schema_version": SCHEMA_VERSION,
        "model_fingerprint": base,
        "adapter": adapter,
        "training_seed": seed,
        "training_step": step,
        "settings": {
            "interventions": list(asked),
            "granularity": options.granularity,
            "doses": list(doses),
            "draws": asdict(options.draws),
            "mode": options.mode,
            "bins": bins,
            "rng_seed": study.seed,
            "resamples": study.analyze.resamples,
            "prompts": {kind: len(examples) for kind, examples in bench.sets.items()} | {"answers": len(bench.answers)},
            **bench.judging,
        },
        **intervention_findings(
            summarise(results, planned_draws(trials), resamples=study.analyze.resamples, rng_seed=study.seed)
        ),
        "seconds": round(time.perf_counter() - began, 1),
        "versions": record()["versions"],
    }
    safe: Interventions = json_safe(found)
    write_json(results_file(folder), safe)
    return safe


def last_step(folder: StudyFolder, seed: int) -> int:
    """The last step whose adapter (or model) is kept."""
    steps = sorted(int(entry.name.removeprefix("step=")) for entry in folder.adapters(seed).glob("step=*"))
    if not steps:
        raise ArtifactError(
            f"The study has no fine-tuned model of seed {seed}",
            received=str(folder.adapters(seed)),
            fix="neurondrift run --output-dir " + str(folder.root),
        )
    return steps[-1]


def _subject(study: Study, folder: StudyFolder, options: Options, seed: int) -> tuple[Subject, str]:
    if options.adapter is not None:
        model, tokenizer = load_named(study, adapter=options.adapter)
        return Subject(before=model, after=model, tokenizer=tokenizer), _digest(options.adapter)
    if seed not in study.seeds:
        raise ConfigError("The study has no such training seed", received=seed, allowed=str(study.seeds))
    tuned = saved_step(folder.adapters(seed), last_step(folder, seed))
    before, tokenizer = load_base(study, folder)
    if study.finetune.method == "full":
        after, _ = load_model(tuned, dtype=study.model.dtype, device=study.model.device)
    else:
        before = after = attach_adapter(before, tuned).eval()
    trainer = _Trainer(study, folder, seed, None if study.finetune.method == "full" else after)
    return Subject(before=before, after=after, tokenizer=tokenizer, train_frozen=trainer), _digest(tuned)


def _digest(path: Path) -> str:
    found = weights_digest(path)
    if not found:
        raise ArtifactError("There is no fine-tuned model here", received=str(path), fix="neurondrift finetune")
    return found


class _Trainer:
    """Trains the study's fine-tuning again with a group held. The base is not loaded again where an adapter is trained:
    the first training takes the measured adapter off it, so these runs come last."""

    def __init__(self, study: Study, folder: StudyFolder, seed: int, adapted: Any) -> None:
        self.study, self.folder, self.seed, self.adapted = study, folder, seed, adapted
        self.base: Any = None

    @contextmanager
    def __call__(self, group: Group) -> Iterator[tuple[nn.Module, Applied]]:
        study, settings = self.study, self.study.finetune
        tokenizer: Any
        if settings.method == "full":
            base, tokenizer = load_base(study, self.folder, dtype="float32")
        else:
            if self.base is None:
                self.base = detach_adapter(self.adapted)
            base, tokenizer = self.base, self._tokenizer()
        encoded = encode(load_examples(settings.data), tokenizer, max_length=settings.max_length)
        dtype = resolve_dtype(study.model.dtype, resolve_device(study.model.device))
        with tempfile.TemporaryDirectory() as scratch:
            trained, _ = finetune(
                base,
                tokenizer,
                encoded,
                settings.model_copy(update={"checkpoint_interval": NEVER}),
                seed=self.seed,
                folder=Path(scratch),
                save_at=[],
                autocast=str(dtype) == "torch.bfloat16",
                freeze=group,
            )
        trained.eval()
        sites = linear_sites(trained)
        reached = reach(group, sites, _adapted(sites), "freeze")
        if settings.method == "full":
            yield trained.to(dtype), Applied(len(group), len(group), 0)
            return
        try:
            yield trained, reached
        finally:
            self.base = detach_adapter(trained)

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.folder.adapters(self.seed) / "tokenizer"))


def _adapted(sites: Mapping[str, Site]) -> set[str]:
    return {name for name, site in sites.items() if site.wrapper is not site.owner}


def _groups(folder: StudyFolder, options: Options) -> dict[str, Group]:
    names = options.groups or tuple(name for name, role in GROUP_ROLES.items() if role == "safety")
    found: dict[str, Group] = {}
    for name in names:
        path = Path(name)
        if path.suffix not in (".parquet", ".json"):
            if name not in GROUP_NAMES:
                raise ConfigError(
                    "There is no such group", received=name, allowed=", ".join(GROUP_NAMES) + ", or a group file"
                )
            path = folder.group_file(name, options.granularity)
        group = load_group(path)
        label = path.name.split(".")[0]
        if group.granularity != options.granularity:
            raise ConfigError(
                f"The group {label} is of {group.granularity}s",
                received=f"--granularity {options.granularity}",
                fix=f"pass --granularity {group.granularity}",
            )
        if label in found:
            raise ConfigError("Two groups have the same name", received=label, fix="rename one file")
        found[label] = group
    return found


def _check(groups: Mapping[str, Group], subject: Subject, base: str, asked: Sequence[str]) -> None:
    """Mistakes before any run: a group of another model, or outside the trained sites."""
    sites = linear_sites(subject.before)
    trained = _adapted(sites) if subject.is_adapted else set(sites)
    for group in groups.values():
        if group.granularity == "unit":
            shapes = {name: (unit.count, 1) for name, unit in mlp_units(sites).items()}
        else:
            shapes = {name: site.shape for name, site in sites.items()}
        group.check_model(base, shapes)
        for what in asked:
            if what != "prune":
                reach(group, sites, trained, what)


def _importances(
    folder: StudyFolder, groups: Mapping[str, Group], options: Options, say: Say
) -> tuple[tuple[float, ...], dict[str, Importance]]:
    """The doses, and what they are taken by. Default doses are left out, said aloud, where nothing orders members."""
    doses = options.doses if options.doses is not None else DOSES
    if all(dose == 1 for dose in doses):
        return doses, {}
    found: dict[str, Importance] = {}
    try:
        for name, group in groups.items():
            if options.scores is not None:
                scores: Mapping[str, Any] = ScoreFile(options.scores)
                if group.granularity == "unit":
                    raise ConfigError("Doses of hidden units are not ordered by a score file", allowed="--doses 1")
                found[name] = importance_of(group, scores)
            else:
                found[name] = read_importance(folder.importance_file(name, options.granularity), group)
    except ArtifactError as error:
        if options.doses is not None or options.scores is not None:
            raise
        say(f"dose-response is left out: {error}")
        return (1.0,), {}
    return doses, found


def _bench(study: Study, options: Options) -> Bench:
    settings = study.evaluate

    def first(reference: Any, count: int, *, responses: bool) -> list[Any]:
        limit = count if reference.limit is None else min(count, reference.limit)
        return load_examples(reference.model_copy(update={"limit": limit}), require_response=responses)

    return Bench(
        sets={
            "harmful": first(settings.harmful, options.harmful, responses=False),
            "ordinary": first(settings.ordinary, options.ordinary, responses=False),
        },
        answers=first(settings.answers, options.answers, responses=True),
        judging={
            "judge_name": settings.judge,
            "max_new_tokens": min(options.max_new_tokens, settings.max_new_tokens),
            "batch_size": settings.batch_size,
            "max_length": settings.max_length,
        },
        max_length=settings.max_length,
    )


def _announce(trials: Sequence[Trial], bench: Bench, draws: Draws) -> str:
    names = dict.fromkeys(trial.intervention for trial in trials if trial.group is not None)
    stopping = [name for name in names if draws.stops(name)]
    least = "at most " if stopping else ""
    text = f"{least}{len(trials)} runs: {', '.join(names)}; {draws.whole} matched random groups a group"
    if any(trial.dose < 1 for trial in trials):
        text += f", {draws.dose} at a dose"
    if "freeze" in names:
        text += f", {draws.freeze} for freeze, which trains again"
        if (floor := smallest_p(draws.freeze)) > ALPHA:
            text += f" (its p cannot be below {floor:.2f})"
    if stopping:
        text += f"; stopped once settled: {', '.join(stopping)}"
    prompts = ", ".join(f"{len(examples)} {kind}" for kind, examples in bench.sets.items())
    return f"{text}; {prompts} prompts, {len(bench.answers)} held-out answers"


def _run(
    trials: Sequence[Trial], subject: Subject, bench: Bench, log: RunLog, inputs: str, options: Options, say: Say
) -> dict[Any, Any]:
    spent: dict[str, list[float]] = {}
    left_out: Counter[str] = Counter()
    last = {trial.intervention: trial for trial in trials}
    with progress("intervene", len(trials)) as advance:

        def done(trial: Trial, rows: Any, fresh: bool) -> None:
            advance(1)
            if rows is None:
                left_out[trial.intervention] += 1
            else:
                spent.setdefault(trial.intervention, []).append(rows[0]["seconds"] if fresh else 0.0)
            if trial is last[trial.intervention]:
                times = spent[trial.intervention]
                made = sum(1 for each in times if each)
                spared = left_out[trial.intervention]
                ending = f"; {spared} spared by stopping early" if spared else ""
                say(f"{trial.intervention:<12}{len(times):>5} runs, {made} made now in {sum(times):.0f} s{ending}")

        return run_trials(
            trials, subject, bench, log, inputs=inputs, mode=options.mode, stops=options.draws.stops, done=done
        )
