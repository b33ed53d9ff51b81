"""The stage evaluate: refusals, perplexity and capability before, during and after fine-tuning; attacks by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from neurondrift.base.errors import ConfigError
from neurondrift.base.files import atomic_path
from neurondrift.base.progress import progress
from neurondrift.behaviour.capability import capability, check_tasks, perplexity
from neurondrift.behaviour.evaluate import Panel, count_answers, judge_answers, write_answers
from neurondrift.behaviour.rates import per_prompt, refusal_rate
from neurondrift.behaviour.requests import Attack, read_suffixes, system_prompt
from neurondrift.models.data import DataReference, Example, PromptKind, load_examples
from neurondrift.models.loading import attach_adapter, load_model
from neurondrift.study.base_model import load_base, load_named
from neurondrift.study.folder import StudyFolder, saved_step, saved_steps
from neurondrift.study.settings import AttackSection, EvaluateSection, Study
from neurondrift.study.stages.attribution.openings import Margins


def evaluate(study: Study, folder: StudyFolder, seed: int) -> str:
    """Refusals and perplexity before, during and after fine-tuning."""
    settings = study.evaluate
    sets = _prompt_sets(study)
    answers_set, margins = load_examples(settings.answers), Margins(study)
    judging = _judging(study)  # a missing judge, file of suffixes or task is an error before anything is generated
    manager = check_tasks(settings.capability_tasks) if settings.capability_tasks else None
    target = folder.behaviour(seed)
    if target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    steps = [0, *saved_steps(folder.adapters(seed))]
    answers = count_answers(sets, judging["attack"])
    unaligned = study.align.enabled and seed == study.seed
    early = {"harmful": sets["harmful"]}
    ends = {"max_new_tokens": longest_answer(settings), "whole": True}  # what is compared is judged alike
    total = answers * len(steps) + (count_answers(early, judging["attack"]) if unaligned else 0)
    harmful: dict[int, float] = {}
    undecided = 0
    perplexities: list[dict[str, Any]] = []
    capabilities: list[dict[str, Any]] = []
    with progress(f"evaluate, seed {seed}", total) as advance:
        if unaligned:
            named = load_named(study)
            rows = judge_answers(*named, early, advance=advance, **(judging | ends))
            rows = margins.added(rows, *named, early)
            del named
            write_answers(target / "before_alignment.parquet", rows, step=None, seed=None)
        for step in steps:
            model, tokenizer = _model_at(study, folder, seed, step)
            long = step in (steps[0], steps[-1]) or bool(judging["panel"].models)  # a model reads to the end anyway
            how = (judging | ends if long else judging) | {"short": settings.max_new_tokens}
            rows = judge_answers(model, tokenizer, sets, advance=advance, **how)
            judging["panel"].release()
            rows = margins.added(rows, model, tokenizer, sets)
            write_answers(saved_step(target, step, ".parquet"), rows, step=step, seed=seed)
            prompts = per_prompt(rows)
            harmful[step] = refusal_rate([row["refused"] for row in prompts if row["kind"] == "harmful"]).rate
            undecided += sum(row["undecided"] for row in prompts)
            value = perplexity(
                model, tokenizer, answers_set, batch_size=settings.batch_size, max_length=settings.max_length
            )
            perplexities.append({"seed": seed, "step": step, "perplexity": value})
            if settings.capability_tasks:
                of_tasks = capability(
                    model, tokenizer, settings.capability_tasks, batch_size=settings.batch_size, manager=manager
                )
                capabilities += [{"seed": seed, "step": step, **row} for row in of_tasks]
            del model
    _write_rows(target / "perplexity.parquet", perplexities)
    if capabilities:
        _write_rows(target / "capability.parquet", capabilities)
    rates = "refusals of harmful requests " + " → ".join(f"{rate:.2f}" for rate in harmful.values())
    return f"{rates}; {undecided} answers undecided (thoughts alone, or not in English)" if undecided else rates


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
