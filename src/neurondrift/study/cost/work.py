"""How much a study computes, stage by stage, in tokens; and how long that takes at a machine's pace.

What is not read here (sets on the hub, a tokenizer that cannot be had) is assumed as in `USUAL`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from neurondrift.base.errors import UserError
from neurondrift.models.data import DataReference, Example, PromptKind, encode, is_local, load_examples
from neurondrift.study.cost.devices import ALONE, Devices
from neurondrift.study.cost.pace import Pace
from neurondrift.study.cost.shape import Shape
from neurondrift.study.sections.finetuning import evaluated_steps, snapshot_steps, total_steps
from neurondrift.study.settings import Study
from neurondrift.study.stages.evaluation import longest_answer


class Rows(NamedTuple):
    """A set of examples: how many, their mean length in tokens, answers among it, and what all of them begin with."""

    size: int
    tokens: float
    answer: float
    beginning: int


USUAL = Rows(500, 100.0, 50.0, 0)  # short chat turns, as in the built-in sets
STARTING = 4.0  # seconds until a program has begun
READING = 5e8  # bytes of a model that are read in a second
SORTS = 2.5  # how often groups put each score in order
ANALYSIS = 20.0  # seconds of the analysis with 2,000 resamples, and of the report
SPOKEN = 0.55  # share of the longest answer that answers run to, where they do not end early
OPENINGS = 8.0  # tokens of the margin's openings that are computed behind each prompt, all of them together


class On(NamedTuple):
    """What a stage runs on: the pace of a process, the model's sizes, the processes, and bytes of a weight as it is
    loaded."""

    pace: Pace
    shape: Shape
    devices: Devices = ALONE
    itemsize: int = 4


def seconds_of_stages(study: Study, on: On, tokenizer: Any) -> dict[str, float]:
    """Stage -> about how many seconds it will take.

    Parameters
    ----------
    study
        The resolved configuration.
    on
        The pace from `measured` (or `pace_on`), the model's sizes, and how many processes there are.
    tokenizer
        Of the study's model; None: usual lengths are taken.
    """
    loading = STARTING + on.itemsize * on.shape.parameters / READING
    found = {}
    if study.align.enabled:
        found["align"] = loading + _alignment(study, on, tokenizer)
    found["score"] = loading + _scoring(study, on, tokenizer)
    found["groups"] = 2 * SORTS * on.pace.order * on.shape.parameters
    seeds = len(study.seeds)
    found["finetune"] = seeds * (loading + _finetuning(study, on, tokenizer))
    found["evaluate"] = seeds * loading + _evaluation(study, on, tokenizer)
    if study.attribute.enabled:
        found["attribute"] = seeds * (loading + _attribution(study, on, tokenizer))
    found["analyze, report"] = ANALYSIS * (0.5 + 0.5 * study.analyze.resamples / 2000)
    return found


def _alignment(study: Study, on: On, tokenizer: Any) -> float:
    settings = study.align
    sets = [
        rows_of(source, tokenizer, settings.max_length, kind=kind)
        for kind, source in _alignment_sets(study).items()
        if source is not None
    ]
    trained = on.shape.trained(None if settings.method == "full" else settings.lora_r)
    return _training(on._replace(itemsize=4), _together(sets), settings.max_steps, settings.batch_size, trained)


def _alignment_sets(study: Study) -> Mapping[PromptKind, DataReference | None]:
    settings = study.align
    return {"harmful": settings.refusals, "ordinary": settings.ordinary, "borderline": settings.borderline}


def _finetuning(study: Study, on: On, tokenizer: Any) -> float:
    settings = study.finetune
    rows = rows_of(settings.data, tokenizer, settings.max_length)
    steps = total_steps(rows.size, settings)
    full = settings.method == "full"
    snapshots = len(snapshot_steps(steps, settings.drift_interval))
    measuring = snapshots * (0.3 + 2 * on.pace.update * on.shape.parameters * (1 if full else 0.25))
    trained = on.shape.trained(None if full else settings.lora_r)
    on = on._replace(itemsize=4) if full else on
    return measuring + _training(on, rows, steps, settings.batch_size, trained, batches=settings.gradient_accumulation)


def _training(on: On, rows: Rows, steps: int, size: int, trained: int, *, batches: int = 1) -> float:
    """Forward and back of so many batches a step, what all rows begin with once; the steps of the optimizer; and what
    processes exchange: gradients once a step, and of a model that is cut its weights twice a batch."""
    pace, shape = on.pace, on.shape
    full = trained == shape.parameters
    devices = on.devices.training(full=full)
    size = int(devices.share(min(size, rows.size)))
    tokens = steps * batches * (size * rows.tokens - (size - 1) * rows.beginning)
    positions = steps * batches * size * rows.answer
    layers, head = (pace.train, pace.train_head) if full else (pace.adapt, pace.adapt_head)
    updated = (trained / devices.total if devices.is_cut else trained) if full else 0
    exchanged = devices.summing(4 * trained)
    if devices.is_cut:
        exchanged += batches * 2 * devices.gathering(on.itemsize * shape.parameters)
    return tokens * layers + positions * head + steps * (updated * pace.update + exchanged)


def _scoring(study: Study, on: On, tokenizer: Any) -> float:
    settings, tune, pace, devices = study.score, study.finetune, on.pace, on.devices
    sets = [rows_of(source, tokenizer, settings.max_length) for source in (settings.safety, settings.utility)]
    sets += [rows_of(settings.style, tokenizer, settings.max_length)] if settings.style else []
    gradient = rows_of(tune.data, tokenizer, tune.max_length)
    sets.append(gradient._replace(size=min(gradient.size, settings.gradient_examples)))
    seconds, sums = 0.0, 4 * on.shape.blocks
    for rows in sets:
        each = rows.tokens * pace.score + rows.answer * pace.adapt_head + pace.score_row
        seconds += devices.share(rows.size) * each * (4 / 3 if settings.checkpoint_activations else 1)
        if devices.is_cut:  # of every batch: the weights twice, and what it adds to the scores
            batches = -(-devices.share(rows.size) // settings.batch_size)
            seconds += batches * (2 * devices.gathering(on.itemsize * on.shape.parameters) + devices.gathering(sums))
        else:
            seconds += devices.summing(sums)
    return seconds


def _evaluation(study: Study, on: On, tokenizer: Any) -> float:
    """Answers of all points: before alignment harmful prompts alone; at both ends in full; between them shortly."""
    asked, tune, pace, devices = study.evaluate, study.finetune, on.pace, on.devices
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
    read = devices.share(answers.size) * (answers.tokens * pace.read + answers.answer * pace.read_head)
    ends, between = min(points, 2), max(points - 2, 0)

    def said(rows: Sequence[Rows], tokens: int, share: float) -> float:
        prompts = sum(devices.share(each.size) for each in rows)
        batches = -(-prompts // asked.batch_size)
        lengths = sum(devices.share(each.size) * (each.tokens - each.beginning) for each in rows)
        return lengths * pace.read + batches * tokens * pace.step + prompts * tokens * share * pace.row

    seconds = len(study.seeds) * (
        ends * said(every, longest, SPOKEN) + between * said(every, short, 0.7) + points * read
    )
    seconds += len(study.seeds) * points * _margins(every, on)
    if study.align.enabled:
        seconds += said([sets["harmful"]], longest, 0.9) + _margins([sets["harmful"]], on)
    return seconds


def _margins(sets: Sequence[Rows], on: On) -> float:
    """The refusal margin of every prompt: what all begin with once, the openings behind each, and their logits."""
    sizes = [on.devices.share(rows.size) for rows in sets]
    tokens = sum(size * (rows.tokens - rows.beginning + OPENINGS) for size, rows in zip(sizes, sets, strict=True))
    return tokens * on.pace.read + sum(sizes) * (OPENINGS + 1) * on.pace.read_head


def _attribution(study: Study, on: On, tokenizer: Any) -> float:
    """The margin's parts: gradients at each point of the straight way, and once between any two saved steps; of the
    examples outputs of both models (every process by itself), and the update that each set asks for."""
    asked, tune, settings = study.evaluate, study.finetune, study.attribute
    pace, share = on.pace, on.devices.share
    prompts = [rows_of(getattr(asked, kind), tokenizer, 512, prompts=True) for kind in ("harmful", "ordinary")]
    size = sum(share(min(settings.prompts, rows.size)) for rows in prompts)
    tokens = sum(share(min(settings.prompts, rows.size)) * (rows.tokens + OPENINGS) for rows in prompts)
    gradients = settings.points + (tune.evaluated_steps - 1 if settings.along_steps else 0)
    back = pace.train if tune.method == "full" else pace.adapt
    examples = 0.0
    for source in (study.score.safety, study.score.utility):
        rows = rows_of(source, tokenizer, study.score.max_length)
        count = min(settings.examples, rows.size)
        examples += count * rows.tokens * 2 * pace.read
        examples += share(count) * (rows.tokens * back + rows.answer * pace.adapt_head)
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
