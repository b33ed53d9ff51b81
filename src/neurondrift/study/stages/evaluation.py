"""The stage evaluate: refusals, perplexity and capability before, during and after fine-tuning; attacks by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import Parts, atomic_path
from neurondrift.base.processes import from_first, sharing_work
from neurondrift.base.progress import progress
from neurondrift.behaviour.capability import capability, check_tasks, perplexity
from neurondrift.behaviour.evaluate import Panel, count_answers, judge_answers, write_answers
from neurondrift.behaviour.rates import per_prompt, refusal_rate
from neurondrift.behaviour.requests import Attack, read_suffixes, system_prompt
from neurondrift.models.data import DataReference, Example, PromptKind, load_examples
from neurondrift.models.loading import attach_adapter, load_model
from neurondrift.models.merged import merge_to_read
from neurondrift.study.base_model import load_base, load_named
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.settings import AttackSection, EvaluateSection, Study
from neurondrift.study.stages.attribution.openings import Margins


def evaluate(study: Study, folder: StudyFolder, seed: int, key: str, shared_key: str) -> str:
    """Refusals and perplexity before, during and after fine-tuning.

    `key` and `shared_key` are the fingerprints of all that the stage, and what all seeds share of it, depends on: what
    an interrupted run with the same key has finished stands, anything else is deleted.
    """
    settings = study.evaluate
    sets = _prompt_sets(study)
    answers_set, margins = load_examples(settings.answers), Margins(study)
    judging = _judging(study)  # a missing judge, file of suffixes or task is an error before anything is generated
    manager = check_tasks(settings.capability_tasks) if settings.capability_tasks else None
    target = folder.behaviour(seed)
    from_first(lambda: _emptied(target))
    steps = [0, *saved_steps(folder.adapters(seed))]
    own = Parts(folder.parts("evaluate", seed), key)
    shared = Parts(folder.shared_parts("evaluate", shared_key), shared_key)
    ends = {"max_new_tokens": longest_answer(settings), "whole": True}  # what is compared is judged alike
    points: list[_Point] = []
    if study.align.enabled and seed == study.seed:
        points.append(_Point(None, {"harmful": sets["harmful"]}, judging | ends, shared))
    for step in steps:
        long = step in (steps[0], steps[-1]) or bool(judging["panel"].models)  # a model reads to the end anyway
        how = (judging | ends if long else judging) | {"short": settings.max_new_tokens}
        points.append(_Point(step, sets, how, own if step else shared))
    with sharing_work(), progress(f"evaluate, seed {seed}", sum(point.answers for point in points)) as advance:
        for point in points:
            found = point.parts.get(point.name)
            if found is not None:
                advance.already(point.answers)
                margins.see(found["answers"], point.sets)
            else:
                found = _measured(study, folder, seed, point, answers_set, margins, manager, advance)
                point.parts.put(point.name, found)
                point.parts.below(point.name).remove()
            point.found = found

    def finish() -> None:
        _write(study, target, seed, points)
        own.remove()
        others = (other for other in study.seeds if other != seed)
        if folder.common is None and all(folder.manifest("evaluate", other).exists() for other in others):
            shared.remove()

    from_first(finish)
    rates, undecided = [], 0
    for point in (point for point in points if point.step is not None):
        prompts = per_prompt(point.found["answers"])
        rates.append(refusal_rate([row["refused"] for row in prompts if row["kind"] == "harmful"]).rate)
        undecided += sum(row["undecided"] for row in prompts)
    line = "refusals of harmful requests " + " → ".join(f"{rate:.2f}" for rate in rates)
    return f"{line}; {undecided} answers undecided (thoughts alone, or not in English)" if undecided else line


def _emptied(target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)


def _write(study: Study, target: Path, seed: int, points: Sequence[_Point]) -> None:
    """The tables of all points."""
    for point in points:
        file = target / "before_alignment.parquet" if point.step is None else saved_step(target, point.step, ".parquet")
        write_answers(file, point.found["answers"], step=point.step, seed=None if point.step is None else seed)
    compared = [point for point in points if point.step is not None]
    of = [{"seed": seed, "step": point.step} for point in compared]
    values = [point.found["perplexity"] for point in compared]
    _write_rows(
        target / "perplexity.parquet", [at | {"perplexity": value} for at, value in zip(of, values, strict=True)]
    )
    if study.evaluate.capability_tasks:
        rows = [at | row for at, point in zip(of, compared, strict=True) for row in point.found["capability"]]
        _write_rows(target / "capability.parquet", rows)


@dataclass(eq=False)
class _Point:
    """A point at which behaviour is measured: before the alignment (`step` None), or a training step.

    `parts`: where what is finished of it is kept; `found`: what was found there, or measured.
    """

    step: int | None
    sets: dict[str, list[Example]]
    how: dict[str, Any]
    parts: Parts
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "before_alignment" if self.step is None else f"step={self.step:06d}"

    @property
    def answers(self) -> int:
        return count_answers(self.sets, self.how["attack"])


def _measured(
    study: Study,
    folder: StudyFolder,
    seed: int,
    point: _Point,
    answers_set: list[Example],
    margins: Margins,
    manager: Any,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Judged answers with margins, and (but before the alignment) perplexity and results of tasks, at one point."""
    settings = study.evaluate
    model, tokenizer = load_named(study) if point.step is None else _model_at(study, folder, seed, point.step)
    value = None
    if point.step is not None:  # first: it is soon known whether the answers fit into the model
        value = perplexity(
            model, tokenizer, answers_set, batch_size=settings.batch_size, max_length=settings.max_length
        )
    rows = judge_answers(
        model, tokenizer, point.sets, advance=advance, parts=point.parts.below(point.name), **point.how
    )
    point.how["panel"].release()
    rows = margins.added(rows, model, tokenizer, point.sets)
    if point.step is None:
        return {"answers": rows}
    of_tasks: list[dict[str, Any]] = []
    if settings.capability_tasks:
        how: dict[str, Any] = {"batch_size": settings.batch_size, "manager": manager}
        of_tasks = from_first(lambda: capability(model, tokenizer, settings.capability_tasks, **how))
    return {"answers": rows, "perplexity": value, "capability": of_tasks}


def longest_answer(settings: EvaluateSection) -> int:
    """Tokens of an answer at the points that are compared: before alignment, before and after fine-tuning."""
    return max(settings.max_new_tokens, settings.final_max_new_tokens)


def outputs(study: Study, folder: StudyFolder, seed: int) -> list[Path]:
    return [folder.behaviour(seed)]


def _prompt_sets(study: Study) -> dict[str, list[Example]]:
    settings = study.evaluate
    references: dict[PromptKind, DataReference | None] = {
        "harmful": settings.harmful,
        "ordinary": settings.ordinary,
        "borderline": settings.borderline,
    }
    return {
        kind: load_examples(reference, require_response=False, kind=kind)
        for kind, reference in references.items()
        if reference is not None
    }


def _judging(study: Study) -> dict[str, Any]:
    settings = study.evaluate
    return {
        "panel": Panel(
            [settings.judge, *settings.further_judges],
            kind=settings.judge_kind,
            prompt=settings.judge_prompt,
            device=study.model.device,
        ),
        "attack": attack_of(settings.attack),
        "system": system_prompt(settings.system_prompt),
        "max_new_tokens": settings.max_new_tokens,
        "batch_size": settings.batch_size,
        "max_length": settings.max_length,
    }


def _model_at(study: Study, folder: StudyFolder, seed: int, step: int) -> tuple[Any, Any]:
    """The model at a training step: the base, the base with that step's adapter, or that step's full model."""
    if step and study.finetune.method == "full":
        model, _ = load_model(
            saved_step(folder.adapters(seed), step), dtype=study.model.dtype, device=study.model.device
        )
        return model, load_base(study, folder)[1]
    model, tokenizer = load_base(study, folder)
    if step:
        model = attach_adapter(model, saved_step(folder.adapters(seed), step)).eval()
        merge_to_read(model)
    return model, tokenizer


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with atomic_path(path) as partial:
        pq.write_table(pa.Table.from_pylist(rows), partial, write_page_checksum=True)


def attack_of(section: AttackSection) -> Attack:
    """The attack that a configuration describes, its suffixes read.

    Raises
    ------
    ConfigError
        The attack *suffix* without a file of suffixes.
    DataError
        That file is missing, unreadable or empty.
    """
    suffixes: tuple[str, ...] = ()
    if section.kind == "suffix":
        if section.suffixes is None:
            raise ConfigError(
                "The attack suffix needs a file of suffixes, one a line",
                fix="set evaluate.attack.suffixes, or --attack suffix:FILE",
            )
        suffixes = read_suffixes(Path(section.suffixes).expanduser())
    return Attack(
        kind=section.kind,
        chat_template=section.chat_template,
        samples=section.samples,
        temperature=section.temperature,
        top_p=section.top_p,
        seed=section.seed,
        suffixes=suffixes,
    )


def attack_from_words(text: str) -> AttackSection:
    """`vanilla`, `decoding`, `decoding:N` or `suffix:FILE`, with `no-template+` before it where none is wanted.

    Raises `ConfigError` for anything else.
    """
    bare = text.removeprefix("no-template+")
    kind, _, value = bare.partition(":")
    template = bare == text
    if bare == "no-template":
        return AttackSection(kind="vanilla", chat_template=False)
    if kind == "vanilla" and not value:
        return AttackSection(kind="vanilla", chat_template=template)
    if kind == "decoding" and (not value or (value.isdigit() and int(value) > 0)):
        return AttackSection(kind="decoding", samples=int(value or 5), chat_template=template)
    if kind == "suffix" and value:
        return AttackSection(kind="suffix", suffixes=value, chat_template=template)
    raise ConfigError(
        "There is no such attack",
        received=text,
        allowed="vanilla, no-template, decoding, decoding:N, suffix:FILE, or no-template+ before one of them",
    )
