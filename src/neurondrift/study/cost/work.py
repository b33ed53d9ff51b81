"""How much a study computes, stage by stage, in tokens; and how long that takes at a machine's pace.

What is not read here (sets on the hub, a tokenizer that cannot be had) is assumed as in `USUAL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neurondrift.base.errors import UserError
from neurondrift.models.data import DataReference, Example, PromptKind, encode, is_local, load_examples
from neurondrift.study.cost.pace import Pace
from neurondrift.study.settings import Study


class Rows(NamedTuple):
    """A set of examples: how many, their mean length in tokens, answers among it, and what all of them begin with."""

    size: int
    tokens: float
    answer: float
    beginning: int


USUAL = Rows(500, 100.0, 50.0, 0)  # short chat turns, as in the built-in sets
LOADING = 4.0  # seconds to start and to read a model of 135 million parameters
SORTS = 2.5  # how often groups put each score in order
ANALYSIS = 20.0  # seconds of the analysis with 2,000 resamples, and of the report
SPOKEN = 0.55  # share of the longest answer that answers run to, where they do not end early
OPENINGS = 8.0  # tokens of the margin's openings that are computed behind each prompt, all of them together


def seconds_of_stages(study: Study, pace: Pace, tokenizer: Any, *, parameters: int) -> dict[str, float]:
    """Stage -> about how many seconds it will take.

    Parameters
    ----------
    study
        The resolved configuration.
    pace
        From `measured`.
    tokenizer
        Of the study's model; None: usual lengths are taken.
    parameters
        Of the model.
    """
    loading = 1.0 + LOADING * max(1.0, parameters / 1.35e8)
    found = {}
    if study.align.enabled:
        found["align"] = loading + _alignment(study, pace, tokenizer, parameters)
    found["score"] = loading + _scoring(study, pace, tokenizer)
    found["groups"] = 2 * SORTS * pace.order * parameters
    seeds = len(study.seeds)
    found["finetune"] = seeds * (loading + _finetuning(study, pace, tokenizer, parameters))
    found["evaluate"] = seeds * loading + _evaluation(study, pace, tokenizer)
    if (attribute := getattr(study, "attribute", None)) is not None and attribute.enabled:
        found["attribute"] = seeds * (loading + _attribution(study, attribute, pace, tokenizer))
    found["analyze, report"] = ANALYSIS * (0.5 + 0.5 * study.analyze.resamples / 2000)
    return found


def _alignment(study: Study, pace: Pace, tokenizer: Any, parameters: int) -> float:
    settings = study.align
    sets = [
        rows_of(source, tokenizer, settings.max_length, kind=kind)
        for kind, source in _alignment_sets(study).items()
        if source is not None
    ]
    return _training(
        pace, _together(sets), settings.max_steps, settings.batch_size, settings.method == "full", parameters
    )


def _alignment_sets(study: Study) -> Mapping[PromptKind, DataReference | None]:
    settings = study.align
    return {"harmful": settings.refusals, "ordinary": settings.ordinary, "borderline": settings.borderline}


def _finetuning(study: Study, pace: Pace, tokenizer: Any, parameters: int) -> float:
    from neurondrift.study.sections.finetuning import snapshot_steps, total_steps

    settings = study.finetune
    rows = rows_of(settings.data, tokenizer, settings.max_length)
    steps = total_steps(rows.size, settings)
    full = settings.method == "full"
    batches = steps * settings.gradient_accumulation
    snapshots = len(snapshot_steps(steps, settings.drift_interval))
    measuring = snapshots * (0.3 + 2 * pace.update * parameters * (1 if full else 0.25))
    return measuring + _training(pace, rows, batches, settings.batch_size, full, parameters if full else 0)


def _training(pace: Pace, rows: Rows, steps: int, size: int, full: bool, updated: int) -> float:
    """Forward and back of so many batches, what all rows begin with once, and the steps of the optimizer."""
    size = min(size, rows.size)
    tokens = steps * (size * rows.tokens - (size - 1) * rows.beginning)
    positions = steps * size * rows.answer
    layers, head = (pace.train, pace.train_head) if full else (pace.adapt, pace.adapt_head)
    return tokens * layers + positions * head + (steps * updated * pace.update if full else 0.0)


def _scoring(study: Study, pace: Pace, tokenizer: Any) -> float:
    settings, tune = study.score, study.finetune
    sets = [rows_of(source, tokenizer, settings.max_length) for source in (settings.safety, settings.utility)]
    sets += [rows_of(settings.style, tokenizer, settings.max_length)] if settings.style else []
    gradient = rows_of(tune.data, tokenizer, tune.max_length)
    sets.append(gradient._replace(size=min(gradient.size, settings.gradient_examples)))
    seconds = sum(rows.size * (rows.tokens * pace.score + rows.answer * pace.adapt_head) for rows in sets)
    return seconds * (4 / 3 if settings.checkpoint_activations else 1)


def _evaluation(study: Study, pace: Pace, tokenizer: Any) -> float:
    """Answers of all points: before alignment harmful prompts alone; at both ends in full; between them shortly."""
    from neurondrift.study.sections.finetuning import evaluated_steps, total_steps
    from neurondrift.study.stages.evaluation import longest_answer

    asked, tune = study.evaluate, study.finetune
    sets = {
        kind: rows_of(getattr(asked, kind), tokenizer, asked.max_length, prompts=True)
        for kind in ("harmful", "ordinary", "borderline")
        if getattr(asked, kind) is not None
    }
    samples = asked.attack.samples if asked.attack.kind == "decoding" else 1
    sets["harmful"] = sets["harmful"]._replace(size=samples * sets["harmful"].size)
    total = total_steps(rows_of(tune.data, None, tune.max_length).size, tune)
    points = len(evaluated_steps(total, tune.drift_interval, tune.evaluated_steps))
    longest, short = longest_answer(asked), asked.max_new_tokens
    every = list(sets.values())
    answers = rows_of(asked.answers, tokenizer, asked.max_length)
    read = answers.size * (answers.tokens * pace.read + answers.answer * pace.read_head)
    ends, between = min(points, 2), max(points - 2, 0)

    def said(rows: Sequence[Rows], tokens: int, share: float) -> float:
        prompts = sum(each.size for each in rows)
        batches = -(-prompts // asked.batch_size)
        lengths = sum(each.size * (each.tokens - each.beginning) for each in rows)
        return lengths * pace.read + batches * tokens * pace.step + prompts * tokens * share * pace.row

    seconds = len(study.seeds) * (
        ends * said(every, longest, SPOKEN) + between * said(every, short, 0.7) + points * read
    )
    seconds += len(study.seeds) * points * _margins(every, pace)
    if study.align.enabled:
        seconds += said([sets["harmful"]], longest, 0.9) + _margins([sets["harmful"]], pace)
    return seconds


def _margins(sets: Sequence[Rows], pace: Pace) -> float:
    """The refusal margin of every prompt: what all begin with once, the openings behind each, and their logits."""
    tokens = sum(rows.size * (rows.tokens - rows.beginning + OPENINGS) for rows in sets)
    return tokens * pace.read + sum(rows.size for rows in sets) * (OPENINGS + 1) * pace.read_head


def _attribution(study: Study, settings: Any, pace: Pace, tokenizer: Any) -> float:
    """The margin's parts: gradients at each point of the straight way, and once between any two saved steps; of the
    examples outputs of both models, and the update that each set asks for."""
    asked, tune = study.evaluate, study.finetune
    prompts = [rows_of(getattr(asked, kind), tokenizer, 512, prompts=True) for kind in ("harmful", "ordinary")]
    size = sum(min(settings.prompts, rows.size) for rows in prompts)
    tokens = sum(min(settings.prompts, rows.size) * (rows.tokens + OPENINGS) for rows in prompts)
    gradients = settings.points + (tune.evaluated_steps - 1 if settings.along_steps else 0)
    back = pace.train if tune.method == "full" else pace.adapt
    examples = 0.0
    for source in (study.score.safety, study.score.utility):
        rows = rows_of(source, tokenizer, study.score.max_length)
        examples += min(settings.examples, rows.size) * (
            rows.tokens * (2 * pace.read + back) + rows.answer * pace.adapt_head
        )
    return gradients * (tokens * back + size * (OPENINGS + 1) * pace.adapt_head) + examples


def _together(sets: Sequence[Rows]) -> Rows:
    count = sum(rows.size for rows in sets)
    tokens = sum(rows.size * rows.tokens for rows in sets) / count
    answer = sum(rows.size * rows.answer for rows in sets) / count
    return Rows(count, tokens, answer, min(rows.beginning for rows in sets))


def rows_of(
    reference: DataReference,
    tokenizer: Any,
    max_length: int,
    *,
    kind: PromptKind | None = None,
    prompts: bool = False,
) -> Rows:
    """What a set holds, read where it can be read here."""
    try:
        if not is_local(reference):
            return USUAL._replace(size=reference.limit or USUAL.size)
        examples = load_examples(reference, require_response=not prompts, kind=kind)
        if tokenizer is None or not examples:
            return USUAL._replace(size=len(examples) or 1)
        return _asked(examples, tokenizer) if prompts else _answered(examples, tokenizer, max_length)
    except UserError:  # its own message has been given
        return USUAL._replace(size=reference.limit or USUAL.size)


def _answered(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Rows:
    encoded = encode(examples, tokenizer, max_length=max_length)
    ids = [row["input_ids"] for row in encoded]
    answers = sum(label != -100 for row in encoded for label in row["labels"][1:])
    return Rows(len(ids), sum(map(len, ids)) / len(ids), answers / len(ids), _beginning(ids))


def _asked(examples: Sequence[Example], tokenizer: Any) -> Rows:
    from neurondrift.behaviour.requests import render
    from neurondrift.models.text.templates import prompt_ids

    ids = [prompt_ids(render(example.prompt, tokenizer), tokenizer) for example in examples]
    return Rows(len(ids), sum(map(len, ids)) / len(ids), 0.0, _beginning(ids))


def _beginning(ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(map(list, ids)), max(map(list, ids))
    return next((at for at, (one, two) in enumerate(zip(first, last, strict=False)) if one != two), len(first))
