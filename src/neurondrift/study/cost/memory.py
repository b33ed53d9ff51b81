"""How much memory each stage takes at most: of a device, or of a process where the CPU computes.

Activations are counted as in Korthikanti et al. (Reducing Activation Recomputation in Large Transformer Models, 2022),
from the widths of the products rather than from a fixed form of block. The stages that load no model are left out.
"""

from __future__ import annotations

from typing import Any

from neurondrift.study.cost.devices import ALONE, Devices
from neurondrift.study.cost.shape import Shape
from neurondrift.study.cost.work import Rows, rows_of
from neurondrift.study.settings import Study
from neurondrift.study.stages.evaluation import longest_answer

PROGRAM = 0.7e9  # bytes of the program itself: its libraries, or a device's context
LONGEST = 1.5  # the longest row of a set, in mean lengths
TRAINED = 16  # bytes for each weight that is trained: weight, gradient, two moments
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
    found, parts = {}, devices.total if devices.is_cut else 1
    block = shape.blocks / shape.layers
    gathered = 2 * block if devices.is_cut else 0.0  # blocks that are whole for the moment

    def held(each: float, computing: float = 0.0) -> float:
        """All weights at so many bytes each, of which a part is here."""
        return PROGRAM + shape.parameters * each / parts + gathered * (computing or each)

    def behind(rows: Rows, size: int) -> float:
        """What a batch leaves behind for the backward pass."""
        size = int(devices.share(size))
        tokens = size * rows.tokens * LONGEST
        logits = size * rows.answer * LONGEST * shape.vocabulary * (itemsize + LOGIT)
        return tokens * shape.widths * shape.layers * itemsize + logits

    align, tune, score, asked = study.align, study.finetune, study.score, study.evaluate
    if align.enabled:
        rows = rows_of(align.ordinary, tokenizer, align.max_length)
        full = align.method == "full"
        adapter = 0 if full else TRAINED * align.lora_r * shape.widths * shape.layers
        found["align"] = held(TRAINED if full else 4, 4) + adapter + behind(rows, align.batch_size)
    rows = rows_of(score.utility, tokenizer, score.max_length)
    batch = behind(rows, score.batch_size * devices.total)
    if score.checkpoint_activations:
        batch = batch / shape.layers + score.batch_size * rows.tokens * shape.hidden * shape.layers * itemsize
    sums = 4 * shape.blocks / parts
    scored = held(itemsize) + batch + 4 * block
    found["score"] = scored + (sums if scored + sums <= room else 0.0)
    rows = rows_of(tune.data, tokenizer, tune.max_length)
    full = tune.method == "full"
    adapter = 0 if full else TRAINED * tune.lora_r * shape.widths * shape.layers
    found["finetune"] = held(TRAINED if full else itemsize, 4 if full else itemsize) + adapter
    found["finetune"] += behind(rows, tune.batch_size)
    rows = rows_of(asked.ordinary, tokenizer, asked.max_length, prompts=True)
    whole = PROGRAM + shape.parameters * itemsize
    longest = rows.tokens * LONGEST + longest_answer(asked)
    found["evaluate"] = whole + asked.batch_size * (
        longest * shape.cached * itemsize + shape.vocabulary * (itemsize + LOGIT)
    )
    if study.attribute.enabled:  # most for provenance: the gradients of two sets
        rows = rows_of(score.utility, tokenizer, score.max_length)
        attributed = whole + behind(rows, study.attribute.batch_size * devices.total) + 4 * block
        pair = 2 * 4 * shape.blocks
        found["attribute"] = attributed + (pair if attributed + pair <= room else 0.0)
    return found
