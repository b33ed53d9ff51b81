"""How several processes share a study's model, and what they cannot do, found before any work begins."""

from __future__ import annotations

import torch

from neurondrift.base.errors import ConfigError
from neurondrift.base.processes import from_first, in_step, process_count
from neurondrift.importance.scores import free_memory
from neurondrift.models.loading import describe_checkpoint, resolve_device, resolve_dtype
from neurondrift.study.settings import Study

#: Bytes for each weight of training all of them: weight, gradient, and AdamW's two moments in float32.
OF_TRAINING = 16
#: Share of a device's memory that the model may take: the rest is for activations.
MOST = 0.8


def enough_for_each(items: int, what: str, setting: str) -> None:
    """Raise `ConfigError` where there are more processes than `items`, of which each is to have some."""
    if process_count() > items:
        raise ConfigError(
            f"There are more processes than {what}: some would have nothing to do",
            received=f"{process_count()} processes",
            allowed=f"{items} or fewer, as {setting} is now",
            fix=f"start fewer processes (--nproc-per-node), or raise {setting}",
        )


def check_strategy(study: Study) -> None:
    """Raise `ConfigError` where FSDP2 is asked for and cannot do what the study wants."""
    if study.parallel.strategy != "fsdp2" or process_count() == 1:
        return
    for setting, value, why in (
        ("finetune.freeze", study.finetune.freeze, "what is held still is cut among processes, and put back by none"),
        (
            "align.method",
            study.align.method == "lora" and study.align.enabled and "lora",
            "the adapter is merged into the model, of which no process has all",
        ),
    ):
        if value:
            raise ConfigError(
                f"FSDP2 cannot do what {setting} asks for: {why}",
                received=value,
                fix='set parallel.strategy = "ddp", or run in one process',
            )


def cut_on(study: Study, reference: str, *, of_training: bool = False) -> torch.device | None:
    """The device among whose like processes cut the model with this reference (FSDP2); None where each holds all of it.

    Without `parallel.strategy` it is cut where it does not fit one device, with what training all weights needs beside
    it (`of_training`).
    """
    if in_step().total == 1:
        return None
    device = resolve_device(study.model.device)
    if study.parallel.strategy is None:
        room = free_memory(device)
        has_room = from_first(lambda: fits(_bytes(study, reference, device, of_training), room))
        return None if has_room else device
    return device if study.parallel.strategy == "fsdp2" else None


def fits(size: float, room: float) -> bool:
    """Whether a model of so many bytes fits a device with so many, activations beside it."""
    return size <= MOST * room


def _bytes(study: Study, reference: str, device: torch.device, of_training: bool) -> int:
    weights = int(describe_checkpoint(reference, revision=study.model.revision)["parameters"])
    return weights * (OF_TRAINING if of_training else resolve_dtype(study.model.dtype, device).itemsize)
