"""How much memory each stage takes at most: of a device, or of a process where the CPU computes.

Activations are counted as in Korthikanti et al. (Reducing Activation Recomputation in Large Transformer Models, 2022),
from the widths of the products rather than from a fixed form of block. The stages that load no model are left out.
"""

from __future__ import annotations

from typing import Any

from neurondrift.study.cost.devices import ALONE, Devices
from neurondrift.study.cost.shape import Shape
from neurondrift.study.cost.work import Rows, rows_of
from neurondrift.study.parallel.checks import OF_TRAINING
from neurondrift.study.settings import Study
from neurondrift.study.stages.evaluation import longest_answer

PROGRAM = 0.7e9  # bytes of the program itself: its libraries, or a device's context
LONGEST = 1.5  # the longest row of a set, in mean lengths
LOGIT = 8  # bytes for each logit beside its own: in float32, and its gradient


def bytes_of_stages(
    study: Study, shape: Shape, tokenizer: Any, *, itemsize: int, devices: Devices = ALONE, room: float = float("inf")
) -> dict[str, float]:
    """Stage -> most bytes of each process (where a GPU computes: of its device).

    Parameters
    ----------
    study, shape, tokenizer
        The resolved configuration, the model's sizes, and its tokenizer (None: usual lengths).
    itemsize
        Bytes of a weight as the study loads the model.
    devices
        The processes.
    room
        Bytes that each has: what is added up for each weight stays with the model where it fits; else scores keep it in
        main memory, or sites take turns.
    """
    found: dict[str, float] = {}
    block = shape.blocks / shape.layers

    def held(each: float, computing: float, among: Devices = devices) -> float:
        """All weights at so many bytes each; or a part of them, and two blocks that are whole to compute with."""
        if not among.is_cut:
            return PROGRAM + shape.parameters * each
        return PROGRAM + shape.parameters * each / among.total + 2 * block * computing

    def behind(rows: Rows, size: int) -> float:
        """What a batch leaves behind for the backward pass."""
        size = int(devices.share(size))
        tokens = size * rows.tokens * LONGEST
        logits = size * rows.answer * LONGEST * shape.vocabulary * (itemsize + LOGIT)
        return tokens * shape.widths * shape.layers * itemsize + logits

    def training(rank: int | None, loaded: int, rows: Rows, size: int) -> float:
        """All weights (no rank), which then are in float32; or an adapter beside those that were loaded."""
        if rank is None:
            return held(OF_TRAINING, 4, devices.training(full=True)) + behind(rows, size)
        return held(loaded, loaded) + OF_TRAINING * shape.trained(rank) + behind(rows, size)

    align, tune, score, asked = study.align, study.finetune, study.score, study.evaluate
    if align.enabled:
        rows = rows_of(align.ordinary, tokenizer, align.max_length)
        found["align"] = training(None if align.method == "full" else align.lora_r, 4, rows, align.batch_size)
    rows = rows_of(score.utility, tokenizer, score.max_length)
    batch = behind(rows, score.batch_size * devices.total)
    if score.checkpoint_activations:
        batch = batch / shape.layers + score.batch_size * rows.tokens * shape.hidden * shape.layers * itemsize
    sums = 4 * shape.blocks / (devices.total if devices.is_cut else 1)
    scored = held(itemsize, itemsize) + batch + 4 * block
    found["score"] = scored + (sums if scored + sums <= room else 0.0)
    rows = rows_of(tune.data, tokenizer, tune.max_length)
    found["finetune"] = training(None if tune.method == "full" else tune.lora_r, itemsize, rows, tune.batch_size)
    rows = rows_of(asked.ordinary, tokenizer, asked.max_length, prompts=True)
    whole = PROGRAM + shape.parameters * itemsize
    longest = rows.tokens * LONGEST + longest_answer(asked)
    found["evaluate"] = whole + asked.batch_size * (
        longest * shape.cached * itemsize + shape.vocabulary * (itemsize + LOGIT)
    )
    if study.attribute.enabled:  # most for provenance: the gradients of a set
        rows = rows_of(score.utility, tokenizer, score.max_length)
        attributed = whole + behind(rows, study.attribute.batch_size * devices.total) + 4 * block
        gradients = 4 * shape.blocks
        found["attribute"] = attributed + (gradients if attributed + gradients <= room else 0.0)
    return found
