"""What a study will cost on this machine: seconds and memory of each stage, and disk; in one process or several."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig

from neurondrift.base.errors import ModelError
from neurondrift.importance.scores import free_memory
from neurondrift.models.architecture.classes import configuration, skeleton
from neurondrift.models.checked.gguf import is_gguf, where_to_read
from neurondrift.models.loading import load_model, quiet_transformers
from neurondrift.study.cost.devices import GLOO, H100, Devices
from neurondrift.study.cost.memory import bytes_of_stages
from neurondrift.study.cost.pace import measured
from neurondrift.study.cost.shape import shape_of
from neurondrift.study.cost.work import On, seconds_of_stages
from neurondrift.study.parallel.checks import OF_TRAINING, fits
from neurondrift.study.sections.finetuning import evaluated_steps, total_steps
from neurondrift.study.settings import Study


class Cost(NamedTuple):
    """An estimate: seconds of each stage; most bytes of memory of each that loads a model (of each process; on its
    device where there is one); whether processes cut the model; bytes on disk."""

    stages: dict[str, float]
    memory: dict[str, float]
    is_cut: bool
    disk: float

    @property
    def peak(self) -> float:
        """Most bytes of memory of a process, in any stage."""
        return max(self.memory.values())


def estimate(
    study: Study, parameters: int, *, device: str, dtype: str, tokenizer: Any = None, processes: int = 1
) -> Cost:
    """What the study will take: its tokens, stage by stage, at the pace of this machine, of which one block of the
    model and one product with its LM head are timed; and memory by the model's sizes. Several processes have like
    GPUs, linked as in a machine of H100, or the cores of this machine among them."""
    tune, on_gpu = study.finetune, device == "cuda"
    itemsize = getattr(torch, dtype).itemsize
    stages: dict[str, float] = {}
    memory = {"finetune": parameters * max(itemsize + 4.5, 18 if tune.method == "full" else 0) + 1.5e9}
    room = free_memory(torch.device(device)) / (1 if on_gpu else processes)
    is_cut, cut_to_train = (
        processes > 1 and (study.parallel.strategy or ("ddp" if fits(each * parameters, room) else "fsdp2")) == "fsdp2"
        for each in (itemsize, OF_TRAINING)
    )
    devices = Devices(processes, is_cut, H100.link if on_gpu else GLOO, cut_to_train)
    # Its files have been looked at: it is only its blocks that may be of another kind.
    with contextlib.suppress(ModelError):
        empty = skeleton_of(study)
        shape = shape_of(empty)
        memory = bytes_of_stages(study, shape, tokenizer, itemsize=itemsize, devices=devices, room=room)
        pace = measured(empty, device=torch.device(device), dtype=getattr(torch, dtype), rank=tune.lora_r)
        pace = pace if on_gpu else pace.slowed(processes)  # they share cores, and the way to the memory
        stages = seconds_of_stages(study, On(pace, shape, devices, itemsize), tokenizer)
    total = total_steps(tune.data.limit or 500, tune)
    points = len(evaluated_steps(total, tune.drift_interval, tune.evaluated_steps))
    adapters = 12 * 0.02 * parameters * (points + 1) if tune.method == "lora" else 4 * parameters * points
    disk = (4 * parameters if study.align.enabled else 0) + len(study.seeds) * adapters + 8 * parameters + 1e8
    return Cost(stages, memory, is_cut, disk)


def skeleton_of(study: Study) -> Any:
    """The study's model with all its modules and no numbers."""
    source = study.model
    reference = source.reference
    with quiet_transformers():
        if reference.startswith("tiny:"):
            return load_model(reference, dtype="float32", device="cpu")[0].to("meta")
        if is_gguf(reference):
            folder, how = where_to_read(reference)
            config = AutoConfig.from_pretrained(folder, **how)
        else:
            config = configuration(reference, revision=source.revision, trust_remote_code=source.trust_remote_code)
        return skeleton(config, reference)
