"""The Trainer of a study: the loss of responses alone, over a batch that one process has, or several share.

To transformers each process trains alone, on all rows in the same order; what makes them one is here. So a checkpoint
is the same whatever number of processes wrote it, and any number goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from neurondrift.base.files import read_json, write_json
from neurondrift.base.processes import Joined, lost_as_error
from neurondrift.models.architecture.packing import draws
from neurondrift.models.batches import Batch, batches_without_padding, token_losses
from neurondrift.models.data import IGNORED
from neurondrift.models.sites import gathered, unwrap
from neurondrift.study.parallel.gradients import start_alike, sum_gradients
from neurondrift.study.parallel.sharding import cut_state, shard, whole_optimiser, whole_state

Encoded = Sequence[Mapping[str, Any]]
#: In a checkpoint: the sum of the losses since the last line of the log, and that line's step.
UNLOGGED = "unlogged.json"


class ResponseTrainer(Trainer):
    """A Trainer whose loss is the mean over the response tokens of the (accumulated) batch, with logits computed at
    those positions only.

    Parameters
    ----------
    group
        The processes that train together: each has its share of the rows of every batch, and their gradients are
        summed before they are clipped. The batch is the one that is set, whatever their number.
    shard_on
        The device among whose like the model, its gradients and the optimiser's state are cut (FSDP2); None: every
        process holds all.
    **given
        As transformers' Trainer.
    """

    loss_is_scaled_for_ga = True
    optimizer: Any

    def __init__(self, *, group: Joined, shard_on: torch.device | None = None, **given: Any) -> None:
        self.group, self.shard_on = group, shard_on
        self._whole: tuple[dict[str, Any], dict[str, Any]] | None = None  # of model and optimiser, while they are saved
        pad = given["model"].config.pad_token_id
        collator = _Collator(given["model"], 0 if pad is None else pad, group, alike=shard_on is not None)
        super().__init__(data_collator=collator, **given)
        self.add_callback(_GoesOnLogging(self))

    def is_world_process_zero(self) -> bool:
        return self.group.number == 0

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self.shard_on is None:  # else it goes there block by block
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser of parameters that are the same everywhere, and cut where they are to be."""
        if self.group.total > 1 and self.optimizer is None:
            start_alike(self.model)
            if self.shard_on is not None:
                shard(self.model, self.shard_on)
        optimiser: torch.optim.Optimizer = super().create_optimizer(model)
        if self.shard_on is not None:
            optimiser.register_load_state_dict_pre_hook(cut_state)
        return optimiser

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        return torch.tensor(sum(batch["targets"] for batch in batch_samples), device=device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        device = next(model.parameters()).device
        sums = [token_losses(model, part.to(device)).losses.sum() for part in inputs["parts"]]
        counted = [loss if at < inputs["counts"] else loss * 0 for at, loss in enumerate(sums)]
        loss = torch.stack(counted).sum() / (inputs["targets"] if num_items_in_batch is None else num_items_in_batch)
        loss = loss if self.shard_on is None else loss * self.group.total  # FSDP2 takes the mean over processes
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        with lost_as_error(among=self.group.total):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            if self.group.total > 1:
                if self.shard_on is None and self.accelerator.sync_gradients:
                    sum_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
                dist.all_reduce(loss)
        return loss if self.shard_on is None else loss / self.group.total

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        norm: torch.Tensor = gathered(super()._clip_grad_norm(model))
        return norm

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self.shard_on is not None:
            self._whole = whole_state(self.model), whole_optimiser(self.optimizer)
        if self.group.number == 0:
            super()._save_checkpoint(model, trial)
        self._whole = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict if self._whole is None else self._whole[0])
        if output_dir is not None:
            write_json(Path(output_dir) / UNLOGGED, [float(self._tr_loss), self._globalstep_last_logged])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimiser = self.optimizer
        if self._whole is not None:
            self.optimizer = _State(self._whole[1])
        try:
            super()._save_optimizer_and_scheduler(output_dir)
        finally:
            self.optimizer = optimiser


class _GoesOnLogging(TrainerCallback):
    """A resumed training logs the mean loss since it last did, as if it had never stopped: transformers forgets it."""

    def __init__(self, trainer: ResponseTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        file = Path(args.output_dir) / f"checkpoint-{state.global_step}" / UNLOGGED
        if state.global_step and file.exists():
            loss, self.trainer._globalstep_last_logged = read_json(file)
            self.trainer._tr_loss += loss


class _State:
    """What the Trainer asks an optimiser for when it saves it."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state


class _Collator:
    """The rows of a step's batch that are this process's, to what the model computes at once: all of them without
    padding, or rows of one length each; and how many tokens the rows of all processes have a loss on.

    The first `counts` of the parts count: a process without a row computes one for nothing, and where the model is cut
    (`alike`) each as many as the others, so that all do the same steps.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, group: Joined, *, alike: bool) -> None:
        self.model, self.pad_token_id, self.group, self.alike = model, pad_token_id, group, alike
        self.share = not draws(model, unwrap(model))

    def __call__(self, rows: Encoded) -> dict[str, list[Batch] | int]:
        own = self._parts(rows, self.group.number)
        numbers = range(self.group.total) if self.alike else [self.group.number]
        most = max(1, *(len(own if n == self.group.number else self._parts(rows, n)) for n in numbers))
        idle = own[:1] or self._of(rows[:1], len(rows))
        parts = [*own, *(idle * (most - len(own)))]
        return {"parts": parts, "targets": sum(map(_targets, rows)), "counts": len(own)}

    def _parts(self, rows: Encoded, number: int) -> list[Batch]:
        """What is computed of the rows of a process: each has about as many tokens."""
        if self.group.total > 1:
            longest = sorted(range(len(rows)), key=lambda index: (-len(rows[index]["input_ids"]), index))
            rows = [rows[index] for index in longest[number :: self.group.total]]
        return self._of(rows, len(rows)) if rows else []

    def _of(self, rows: Encoded, count: int) -> list[Batch]:
        return batches_without_padding(
            self.model, rows, batch_size=count, pad_token_id=self.pad_token_id, share=self.share
        )


def _targets(row: Mapping[str, Any]) -> int:
    """How many tokens of a row are predicted: nothing predicts the first."""
    labels = [int(label) for label in row["labels"]]
    if (mask := row.get("attention_mask")) is not None:
        labels = [label for label, keep in zip(labels, mask, strict=True) if keep]
    return sum(label != IGNORED for label in labels[1:])
