"""Training: the alignment before a study, and the fine-tuning that the study is about.

Owns how transformers' Trainer and PEFT are set up; the loss is that of the responses only. Drift comes from
`drift.callback`, which works in any other Trainer too.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from neurondrift.base.errors import ArtifactError, FreezeError, ModelError
from neurondrift.base.files import atomic_path, manifest_stands, write_manifest
from neurondrift.base.processes import alone, from_first, is_first_process, joined
from neurondrift.groups.group import Group
from neurondrift.interventions.acting.freezing import FreezeCallback
from neurondrift.models.batches import check_lengths
from neurondrift.models.loading import quiet_transformers
from neurondrift.models.sites import Sites
from neurondrift.study.folder import saved_step, saved_steps
from neurondrift.study.parallel.sharding import is_cut, whole_state
from neurondrift.study.parallel.trainer import Encoded, ResponseTrainer
from neurondrift.study.settings import AlignSection, FinetuneSection

logger = logging.getLogger(__name__)

#: The manifest of a checkpoint, written last.
SEAL = "neurondrift.json"

Advance = Callable[[int], None]


class _Advance(TrainerCallback):
    """Tells the caller's progress bar of each step, and keeps the losses."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step:  # resumed: a rate does not come from these
            getattr(self.advance, "already", self.advance)(state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.advance(1)


class _SaveAdapters(TrainerCallback):
    """Writes the adapter (or the whole model with its tokenizer) at the steps whose behaviour will be measured."""

    def __init__(self, folder: Path, steps: Sequence[int], tokenizer: Any = None) -> None:
        self.folder, self.steps, self.tokenizer = folder, set(steps), tokenizer

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # After a resume, later adapters will be made again.
        for step in saved_steps(self.folder) if state.is_world_process_zero else ():
            if step > state.global_step:
                shutil.rmtree(saved_step(self.folder, step))

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step not in self.steps:
            return
        how = {"state_dict": whole_state(model)} if is_cut(model) else {}  # all processes help
        if state.is_world_process_zero:
            with atomic_path(saved_step(self.folder, state.global_step)) as partial, quiet_transformers():
                model.save_pretrained(str(partial), **how)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(str(partial))


class _SealCheckpoint(TrainerCallback):
    """Marks a checkpoint as whole, with the checksums of its files and of those that a resumed run goes on from; then
    deletes the ones before it, whatever the clock says of their age."""

    def __init__(self, folder: Path, beside: Sequence[Path]) -> None:
        self.folder, self.beside = folder, beside
        self.known: dict[tuple[str, int, int], str] = {}

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        checkpoint = self.folder / f"checkpoint-{state.global_step}"
        kept = [path for folder in self.beside if folder.is_dir() for path in sorted(folder.iterdir())]
        (checkpoint / SEAL).unlink(missing_ok=True)
        write_manifest(
            checkpoint / SEAL,
            root=_root(self.folder, self.beside),
            stage="checkpoint",
            inputs=str(state.global_step),
            outputs=[checkpoint, *(path for path in kept if path != self.folder and not path.name.startswith("."))],
            details={},
            known=self.known,
        )
        for other in self.folder.glob("checkpoint-*"):
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)


def _root(folder: Path, beside: Sequence[Path]) -> Path:
    return Path(os.path.commonpath([folder, *beside]))


def align(
    model: Any,
    encoded: Encoded,
    settings: AlignSection,
    *,
    seed: int,
    scratch: Path,
    autocast: bool = False,
    advance: Advance = lambda n: None,
    shard_on: torch.device | None = None,
) -> list[dict[str, float]]:
    """Supervised fine-tuning in place: of all weights, or of a LoRA adapter that is merged into them at the end.

    The model must be in float32; `autocast` computes in bfloat16, but the adapter is merged in float32. Returns the
    Trainer's log: step, loss, learning rate. `shard_on`: as in `finetune`, of all weights.
    """
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ModelError("Alignment changes all weights and needs them in float32", received=str(model.dtype))
    check_lengths(model, encoded)
    set_seed(seed)
    trained = _with_lora(model, settings) if settings.method == "lora" else model
    arguments: dict[str, Any] = {
        "output_dir": str(scratch),
        "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.learning_rate,
        "max_steps": settings.max_steps,
        "warmup_steps": settings.warmup_steps,
        "lr_scheduler_type": "linear",
        "bf16": autocast,
        "save_strategy": "no",
    }
    log = _train(trained, encoded, arguments, seed=seed, callbacks=[_Advance(advance)], shard_on=shard_on)
    if trained is not model:
        trained.merge_and_unload()
        _free_again(trained)
    return log


def finetune(
    model: Any,
    tokenizer: Any,
    encoded: Encoded,
    settings: FinetuneSection,
    *,
    seed: int,
    folder: Path,
    save_at: Sequence[int],
    autocast: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    advance: Advance = lambda n: None,
    freeze: Group | None = None,
    resumable: bool = True,
    beside: Sequence[Path] = (),
    tracked_in: Path | None = None,
    shard_on: torch.device | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Fine-tune on responses, with LoRA or in full, resuming from the last checkpoint in `folder` if there is one.

    Parameters
    ----------
    model
        The model to fine-tune; LoRA wraps it, full fine-tuning changes it in place (float32 needed).
    tokenizer
        Saved beside whole models, so that their folders load by themselves.
    encoded
        Training examples.
    settings
        The study's section `finetune`.
    seed
        Seeds the adapters' initialisation, the order of the data and dropout.
    folder
        Where checkpoints (`trainer/`) and the adapters of the steps in `save_at` go.
    save_at
        Steps whose adapter (model) is kept as `step=000025/`.
    autocast
        Compute in bfloat16, with adapters (or all weights, in full fine-tuning) in float32.
    callbacks
        For example a `DriftCallback`.
    advance
        Called with the number of steps done, for progress.
    freeze
        Neurons, weights or hidden units that must not move; asserted at the end (`freezing`, with its errors). The same
        as a `FreezeCallback` among the callbacks, which also reports.
    resumable
        Whether checkpoints are written at all.
    beside
        Further folders that a resumed run goes on from (drift snapshots): a checkpoint is whole while what lay there
        is as it was.
    shard_on
        The device among whose like the joined processes cut the model, which lies in main memory; None: each has all.

    Returns
    -------
    The trained (wrapped) model, and the Trainer's log. `detach_adapter` takes LoRA off again.

    Raises
    ------
    ArtifactError
        A checkpoint that holds more than numbers: nothing is unpickled.
    DataError
        An example that is longer than the model has positions.
    """
    check_lengths(model, encoded)
    set_seed(seed)
    if settings.method == "lora":
        model = _with_lora(model, settings)
    if shard_on is not None and (freeze is not None or any(isinstance(each, FreezeCallback) for each in callbacks)):
        raise FreezeError(
            "A group cannot be held still in a model that is cut among processes (FSDP2): none has all of its weights",
            fix='set parallel.strategy = "ddp", or run in one process',
        )
    if not is_first_process():
        tracked_in = None
    arguments: dict[str, Any] = {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.scheduler,
        **_optimiser(settings),
        **({} if tracked_in is None else _trackers(settings.report_to, folder)),
        "bf16": autocast,
        "save_strategy": "steps" if resumable else "no",
        "save_steps": settings.checkpoint_interval or settings.drift_interval,
    }
    added = [
        *(_tensorboard(tracked_in) if tracked_in is not None and "tensorboard" in settings.report_to else []),
        *([FreezeCallback(freeze)] if freeze is not None else []),
        *callbacks,
        _SaveAdapters(folder, save_at, tokenizer if settings.method == "full" else None),
        _SealCheckpoint(folder / "trainer", (folder, *beside)),
        _Advance(advance),
    ]
    resume = from_first(lambda: str(last_checkpoint(folder / "trainer", (folder, *beside)) or ""))
    log = _train(model, encoded, arguments, seed=seed, callbacks=added, resume=resume, shard_on=shard_on)
    return model, log


def last_checkpoint(folder: Path, beside: Sequence[Path] = ()) -> Path | None:
    """The last whole checkpoint below a Trainer's folder.

    One without its seal (killed while saving) is passed over; so is one of which a file has changed, or a file of
    `beside` that was there when it was saved, and that is said.
    """
    found = []
    for entry in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-([0-9]+)", entry.name)
        if not match or not (entry / SEAL).exists():
            continue
        if manifest_stands(entry / SEAL, root=_root(folder, beside), inputs=match[1]):
            found.append((int(match[1]), entry))
        else:
            logger.warning("%s is not as it was saved, or what belongs to it is not: not gone on from", entry)
    return max(found)[1] if found else None


def _with_lora(model: Any, settings: FinetuneSection | AlignSection) -> Any:
    from peft import LoraConfig, get_peft_model

    targets: Any = settings.target_modules
    sites = Sites(model)
    if targets == "all-linear":
        targets = sorted({site.module_type for site in sites.values() if site.expert is None})
    else:
        known = {site.module_type for site in sites.values()}
        if unknown := sorted(set(targets) - known):
            raise ModelError(
                "The model has no modules of this name to adapt", received=unknown, allowed=", ".join(sorted(known))
            )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
    )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = get_peft_model(model, config)
    wrapped._neurondrift_trainable = trainable
    return wrapped


def detach_adapter(model: Any) -> Any:
    """Take PEFT's wrapper off a model, without merging, and give back the base model.

    The base is what it was before `finetune`: the same modules and parameters, bit-equal, those trainable that were, so
    that it can be fine-tuned again without being loaded again. The adapter is gone; save it first.

    Raises `ModelError` for a model without an adapter, or with a merged one: unmerging would leave rounding behind.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise ModelError("The model has no adapter to take off", received=type(model).__name__)
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ModelError("The adapter is merged into the base model, which is not what it was", fix="load it again")
    base: Any = model.unload()
    _free_again(model)
    return base


def _free_again(wrapped: Any) -> None:
    """The base's parameters are trainable that were before `_with_lora`."""
    for parameter in getattr(wrapped, "_neurondrift_trainable", ()):
        parameter.requires_grad_(True)


def _optimiser(settings: FinetuneSection) -> dict[str, Any]:
    return {} if settings.optimiser == "adamw" else {"optim": "sgd", "optim_args": f"momentum={settings.momentum}"}


def _trackers(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """The trackers of a training, which is called after its folder: the path tells study, method and seed."""
    return {"report_to": [name for name in names if name != "tensorboard"], "run_name": str(folder)} if names else {}


def _tensorboard(folder: Path) -> list[TrainerCallback]:
    """TensorBoard's files go beside the study's: the Trainer's own folder is deleted when the training is done."""
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = callback.logging_dir or str(folder)
    return [callback]


def _arguments(device: torch.device, *, seed: int, **settings: Any) -> TrainingArguments:
    settings = {"optim": "adamw_torch_fused", "report_to": [], **settings}
    made = TrainingArguments(
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        logging_steps=5,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **settings,
    )
    if device.type == "cuda":  # the one that the model is on, rather than the first, or all of them
        torch.cuda.set_device(device)
        made.__dict__["_setup_devices"], made._n_gpu = torch.device("cuda", torch.cuda.current_device()), 1
    return made


def _train(
    model: Any,
    encoded: Encoded,
    arguments: Mapping[str, Any],
    *,
    seed: int,
    callbacks: Sequence[TrainerCallback],
    resume: str = "",
    shard_on: torch.device | None = None,
) -> list[dict[str, float]]:
    """Train, together with the other processes that have come here; `resume` names a checkpoint to go on from."""
    set_seed(seed)
    group = joined()
    shard_on = shard_on if group.total > 1 else None
    device = next(model.parameters()).device if shard_on is None else shard_on
    try:
        with alone(), quiet_transformers():
            trainer = ResponseTrainer(
                group=group,
                shard_on=shard_on,
                model=model,
                args=_arguments(device, seed=seed, **arguments),
                train_dataset=list(encoded),
                callbacks=list(callbacks),
            )
            for kind in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(kind)
            trainer.train(resume_from_checkpoint=resume or None)
    except Exception as error:
        if resume and type(error).__name__ == "UnpicklingError":  # torch reads numbers only
            raise ArtifactError(
                "The checkpoint holds something other than numbers, and nothing is ever unpickled",
                received=resume,
                fix="find out who put it there, then delete the folder: training begins again",
            ) from error
        raise
    finally:
        for callback in callbacks:
            if isinstance(callback, FreezeCallback):
                callback.release()
    model.eval()
    return [dict(entry) for entry in trainer.state.log_history if "loss" in entry]
