"""`neurondrift intervene`: interventions on the groups of a study, or on a group and an adapter made elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from neurondrift.attribution.openings import Openings, openings_for
from neurondrift.base.errors import ArtifactError, ConfigError, UserError
from neurondrift.base.files import json_safe, read_json, sha256_of_value, write_json
from neurondrift.base.processes import from_first, sharing_work
from neurondrift.base.progress import progress
from neurondrift.base.roles import ALIGNMENT_GROUPS, GROUP_ROLES, PUBLISHED_GROUPS, TAKING, group_names, judges
from neurondrift.groups.controls import unlike
from neurondrift.groups.covariates import Covariates
from neurondrift.groups.doses import Importance, importance_of, read_importance
from neurondrift.groups.group import Group, load_group
from neurondrift.importance.scores import ScoreFile
from neurondrift.interventions.acting.contexts import Applied, reach
from neurondrift.interventions.acting.patching import places_of, writes_answers
from neurondrift.interventions.measures import Bench
from neurondrift.interventions.outcomes import SCHEMA_VERSION, summarise
from neurondrift.interventions.runs import RunLog
from neurondrift.interventions.trials import (
    ACTIONS,
    Acted,
    Draws,
    Subject,
    Trial,
    facts_of,
    plan,
    run_trials,
)
from neurondrift.models.adapters import is_trained
from neurondrift.models.data import PromptKind, load_examples
from neurondrift.models.loading import attach_adapter, load_model
from neurondrift.models.sites import Sites, magnitudes_of
from neurondrift.report.causes import intervention_findings
from neurondrift.report.findings.interventions import Interventions
from neurondrift.statistics.design.levels import ALPHA
from neurondrift.statistics.null import draws_needed, smallest_p
from neurondrift.study.base_model import dtype_of, load_base, load_named, weights_before_alignment
from neurondrift.study.folder import StudyFolder, last_step, record, saved_step
from neurondrift.study.settings import InterveneSection, Study
from neurondrift.study.stages.attribution.measuring import openings_of_seed
from neurondrift.study.stages.finetuning import finetune_study, load_trainee, trainee_of
from neurondrift.study.stages.grouping import bins_of
from neurondrift.study.stages.reporting import weights_digest
from neurondrift.study.training import detach_adapter

Say = Callable[[str], None]

DOSES = (0.1, 0.25, 0.5, 1.0)
#: Interventions on outputs: they reach groups in sites that were not trained, too.
PATCHES = {"patch", "patch_back"}


def of_study(study: Study, folder: StudyFolder, *, say: Say) -> str:
    """The optional stage: the interventions that the study's section `intervene` asks for."""
    findings = intervene(study, folder, study.intervene, say=say)
    groups = ", ".join(dict.fromkeys(effect["group"] for effect in findings["effects"]))
    return f"{len(findings['effects'])} effects of {', '.join(findings['settings']['interventions'])} on {groups}"


def outputs(study: Study, folder: StudyFolder) -> list[Path]:
    return [results_file(folder), runs_file(folder)]


def lacks(study: Study, folder: StudyFolder) -> None:
    """Raise `ArtifactError` where there is no fine-tuned model at all."""
    last_step(folder, study.seed_of(study.intervene))


def results_file(folder: StudyFolder) -> Path:
    """Where the findings lie."""
    return folder.results / "interventions.json"


def runs_file(folder: StudyFolder) -> Path:
    """Where every run lies: those that still count are not made again."""
    return folder.results / "interventions.parquet"


def show(folder: StudyFolder, *, say: Say) -> None:
    """What `results/interventions.json` holds, as tables on the screen."""
    from neurondrift.report.tables.causes import section
    from neurondrift.report.text import render_tables

    say("\n".join(render_tables(section(read_json(results_file(folder))))))
    say(f"written to {results_file(folder)}")


def intervene(study: Study, folder: StudyFolder, options: InterveneSection, *, say: Say) -> Interventions:
    """Run the interventions that are not done yet, and write what they show.

    Raises
    ------
    ArtifactError
        A study that is not fine-tuned or has no groups; importances that a dose needs.
    GroupError
        A group of another model, outside the trained sites, or larger than its controls can match.
    """
    began = time.perf_counter()
    seed = study.seed_of(options)
    draws = planned(options)
    subject, adapter = subject_of(study, folder, options, seed)
    base = subject.sites_before.fingerprint
    groups = _groups(folder, options)
    asked = _asked(options, subject, groups, say)
    _check(groups, subject, base, asked)
    doses, importance = _importances(folder, groups, options, say)
    trials = plan(
        groups,
        interventions=asked,
        doses=doses,
        draws=draws,
        magnitudes=magnitudes_of(subject.sites_before, options.granularity),
        bins=bins_of(study.groups, options.granularity),
        seed=study.seed,
        importance=importance,
        apart=_unlike(folder, groups),
    )
    bench = _bench(study, options, None if options.adapter else openings_of_seed(study, folder, seed))
    log = RunLog(runs_file(folder))
    say(_announce(trials, bench, draws))
    with sharing_work():
        results = _run(trials, subject, bench, log, _inputs(study, seed, base, adapter, bench), options, say)
    findings: Interventions = json_safe(
        {
            "schema_version": SCHEMA_VERSION,
            "model_fingerprint": base,
            "adapter": adapter,
            "training_seed": seed,
            "training_step": None if options.adapter is not None else last_step(folder, seed),
            "settings": _as_made(study, options, asked, doses, bench),
            **intervention_findings(
                summarise(
                    results,
                    facts_of(trials),
                    asked=options.outcome,
                    smallest_effect=options.smallest_effect,
                    smallest_margin=options.smallest_margin,
                    resamples=study.analyze.resamples,
                    rng_seed=study.seed,
                )
            ),
            "seconds": round(time.perf_counter() - began, 1),
            "versions": record()["versions"],
        }
    )
    from_first(lambda: write_json(results_file(folder), findings))
    return findings


def _asked(options: InterveneSection, subject: Subject, groups: Mapping[str, Group], say: Say) -> tuple[str, ...]:
    """The interventions that were named; default: all that can be run on these models and groups."""
    if options.interventions:
        return tuple(options.interventions)
    needed = {"freeze": subject.train_frozen, "unalign": subject.unaligned}
    left_out = {name for name, given in needed.items() if given is None}
    if why := _no_patch(options, subject, groups):
        say(f"patch and patch_back are left out: {why}")
        left_out |= PATCHES
    return tuple(name for name in ACTIONS if name not in left_out)


def _no_patch(options: InterveneSection, subject: Subject, groups: Mapping[str, Group]) -> str:
    """Why groups cannot be patched in these models; empty where they can."""
    donor = None if subject.is_adapted else subject.before
    try:
        for group in groups.values():
            places_of(group, subject.sites_after)
        if options.outcome == "margin" or writes_answers(subject.sites_after, next(iter(groups.values())), donor=donor):
            return ""
    except UserError as error:
        return str(error)
    return "patched, this model cannot write answers (--outcome margin needs none)"


def _inputs(study: Study, seed: int, base: str, adapter: str, bench: Bench) -> str:
    """A hash of what every run's outcome depends on: the models, the prompts and how they are judged, the training."""
    return sha256_of_value(
        [base, adapter, bench.judging, bench.max_length]
        + [[kind, [(e.id, e.prompt, *e.messages) for e in examples]] for kind, examples in bench.sets.items()]
        + [[(e.id, e.prompt, e.response, *e.messages) for e in bench.answers]]
        + [study.finetune.model_dump(mode="json"), seed]
        + ([study.model.template] if study.model.template else [])
        + ([study.model.base] if study.model.base else [])
        + ([asdict(bench.openings)] if bench.openings not in (None, openings_for()) else [])
    )


def _as_made(
    study: Study, options: InterveneSection, asked: Sequence[str], doses: Sequence[float], bench: Bench
) -> dict[str, Any]:
    """The object `settings` of the findings: what was run, also where it was not asked for by name."""
    return {
        "interventions": list(asked),
        "granularity": options.granularity,
        "doses": list(doses),
        "draws": asdict(planned(options)),
        "mode": options.mode,
        "outcome": options.outcome,
        "smallest_effect": options.smallest_effect,
        "smallest_margin": options.smallest_margin,
        "bins": bins_of(study.groups, options.granularity),
        "rng_seed": study.seed,
        "resamples": study.analyze.resamples,
        "prompts": {kind: len(examples) for kind, examples in bench.sets.items()} | {"answers": len(bench.answers)},
        **bench.judging,
    }


def planned(options: InterveneSection) -> Draws:
    """How many matched random groups are asked for."""
    return Draws(
        whole=options.draws, dose=options.dose_draws, freeze=options.freeze_draws, stop_early=options.stop_early
    )


def subject_of(study: Study, folder: StudyFolder, options: InterveneSection, seed: int) -> tuple[Subject, str]:
    """The models before and after fine-tuning, and a digest of the latter's weights.

    Raises `ConfigError` for a training seed that the study does not have, `ArtifactError` where it was not trained.
    """
    if options.adapter is not None:
        model, tokenizer = load_named(study, adapter=options.adapter)
        return Subject(before=model, after=model, tokenizer=tokenizer), _digest(options.adapter)
    if seed not in study.seeds:
        raise ConfigError("The study has no such training seed", received=seed, allowed=str(study.seeds))
    tuned = saved_step(folder.adapters(seed), last_step(folder, seed))
    before, tokenizer = load_base(study, folder)
    train_frozen: Callable[[Group], Acted]
    if study.finetune.method == "full":
        after, _ = load_model(tuned, dtype=study.model.dtype, device=study.model.device)
        train_frozen = partial(_trained_whole, study, folder, seed)
    else:
        before = after = attach_adapter(before, tuned).eval()
        train_frozen = partial(_trained_adapter, study, after, tokenizer, seed)
    unaligned = None if study.base is None else weights_before_alignment(study.base, before, tokenizer)
    models = {"before": before, "after": after, "tokenizer": tokenizer}
    return Subject(**models, train_frozen=train_frozen, unaligned=unaligned), _digest(tuned)


def _digest(path: Path) -> str:
    digest = weights_digest(path)
    if not digest:
        raise ArtifactError("There is no fine-tuned model here", received=str(path), fix="neurondrift finetune")
    return digest


@contextmanager
def _trained_whole(study: Study, folder: StudyFolder, seed: int, group: Group) -> Iterator[tuple[nn.Module, Applied]]:
    """The study's full fine-tuning again, with a group held: the base is loaded again, as training changes it."""
    trained = finetune_study(study, load_trainee(study, folder), seed, freeze=group).model
    yield trained.to(dtype_of(study)), Applied(len(group), len(group), 0)


@contextmanager
def _trained_adapter(
    study: Study, adapted: Any, tokenizer: Any, seed: int, group: Group
) -> Iterator[tuple[nn.Module, Applied]]:
    """The study's adapter trained again, with a group held. The base is not loaded again: the measured adapter is taken
    off it, so these runs come last; on leaving, the one that was trained."""
    base = detach_adapter(adapted)  # from the second run on it has none, and nothing happens
    trained = finetune_study(study, trainee_of(study, base, tokenizer), seed, freeze=group).model
    try:
        sites = Sites(trained)
        yield trained, reach(group, sites, _trained(sites), "freeze")
    finally:
        detach_adapter(trained)


def _trained(sites: Sites) -> set[str]:
    return {name for name, site in sites.items() if is_trained(site)}


def _groups(folder: StudyFolder, options: InterveneSection) -> dict[str, Group]:
    names = tuple(options.groups) or _safety_groups(folder, options)
    groups: dict[str, Group] = {}
    for name in names:
        path = Path(name)
        if path.suffix not in (".parquet", ".json"):
            path = folder.group_file(name, options.granularity)
        group = load_group(path)
        label = path.name.split(".")[0]
        if group.granularity != options.granularity:
            raise ConfigError(
                f"The group {label} is of {group.granularity}s",
                received=f"--granularity {options.granularity}",
                fix=f"pass --granularity {group.granularity}",
            )
        if group.role is None and label in GROUP_ROLES:  # files of older versions name no role
            group = replace(group, provenance={**group.provenance, "role": GROUP_ROLES[label]})
        if label in groups:
            raise ConfigError("Two groups have the same name", received=label, fix="rename one file")
        groups[label] = group
    return groups


def _unlike(folder: StudyFolder, groups: Mapping[str, Group]) -> dict[str, Group]:
    """Of groups of the alignment's change: the neurons that the alignment moved otherwise, which no control touches."""
    chosen = {name: group for name, group in groups.items() if name in ALIGNMENT_GROUPS}
    if not chosen or not folder.covariates.exists():
        return {}
    changes = Covariates(folder.covariates).column("alignment_change")
    return {} if changes is None else {name: unlike(group, changes) for name, group in chosen.items()}


def _safety_groups(folder: StudyFolder, options: InterveneSection) -> tuple[str, ...]:
    """The safety groups of a granularity that judge: the published ones, and others as far as they are there."""
    return tuple(
        name
        for name in group_names(options.granularity)
        if judges(name, GROUP_ROLES[name])
        and (name in PUBLISHED_GROUPS or folder.group_file(name, options.granularity).exists())
    )


def _check(groups: Mapping[str, Group], subject: Subject, base: str, asked: Sequence[str]) -> None:
    """Mistakes before any run: a group of another model, or outside the trained sites."""
    sites = subject.sites_before
    trained = _trained(sites) if subject.is_adapted else set(sites)
    for group in groups.values():
        if group.granularity == "unit":
            shapes = {name: (unit.count, 1) for name, unit in sites.units.items()}
        else:
            shapes = sites.shapes
        group.check_model(base, shapes)
        for what in asked:
            if what in PATCHES:
                places_of(group, sites)
            elif what not in TAKING:
                reach(group, sites, trained, what)


def _importances(
    folder: StudyFolder,
    groups: Mapping[str, Group],
    options: InterveneSection,
    say: Say,
) -> tuple[tuple[float, ...], dict[str, Importance]]:
    """The doses, and what they are taken by. Default doses are left out, said aloud, where nothing orders members."""
    doses = DOSES if options.doses is None else tuple(options.doses)
    if all(dose == 1 for dose in doses):
        return doses, {}
    importances: dict[str, Importance] = {}
    try:
        for name, group in groups.items():
            if options.scores is not None:
                scores: Mapping[str, Any] = ScoreFile(options.scores)
                if group.granularity == "unit":
                    raise ConfigError("Doses of hidden units are not ordered by a score file", allowed="--doses 1")
                importances[name] = importance_of(group, scores)
            else:
                importances[name] = read_importance(folder.importance_file(name, options.granularity), group)
    except ArtifactError as error:
        if options.doses is not None or options.scores is not None:
            raise
        say(f"dose-response is left out: {error}")
        return (1.0,), {}
    return doses, importances


def _bench(study: Study, options: InterveneSection, openings: Openings | None = None) -> Bench:
    settings = study.evaluate

    def first(reference: Any, count: int, kind: PromptKind | None = None) -> list[Any]:
        limit = count if reference.limit is None else min(count, reference.limit)
        return load_examples(reference.model_copy(update={"limit": limit}), require_response=kind is None, kind=kind)

    return Bench(
        sets={
            "harmful": first(settings.harmful, options.harmful, "harmful"),
            "ordinary": first(settings.ordinary, options.ordinary, "ordinary"),
        },
        answers=first(settings.answers, options.answers or options.ordinary),
        judging={
            "judge_name": settings.judge,
            "max_new_tokens": min(options.max_new_tokens, settings.max_new_tokens),
            "batch_size": settings.batch_size,
            "max_length": settings.max_length,
        },
        max_length=settings.max_length,
        outcome=options.outcome,
        openings=openings,
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
    tests = sum(trial.dose == 1 and trial.support is not None for trial in trials)
    if tests > 1:
        text += f"; {tests} tests of whole groups: a p-value survives their correction from {draws_needed(tests)} draws"
    prompts = ", ".join(f"{len(examples)} {kind}" for kind, examples in bench.sets.items())
    by = {"margin": "the refusal margin", "refusals": "refusals", "both": "the refusal margin and refusals"}
    return f"{text}; {prompts} prompts, {len(bench.answers)} held-out answers; by {by[bench.outcome]}"


def _run(
    trials: Sequence[Trial],
    subject: Subject,
    bench: Bench,
    log: RunLog,
    inputs: str,
    options: InterveneSection,
    say: Say,
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
            trials, subject, bench, log, inputs=inputs, mode=options.mode, stops=planned(options).stops, done=done
        )
