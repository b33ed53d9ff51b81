"""The Trainer of a study: the loss of responses alone, over a batch that one process has, or several share.

To transformers each process trains alone, on all rows in the same order; what makes them one is here. So a checkpoint
is the same whatever number of processes wrote it, and any number goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from neurondrift.base.processes import Joined, lost_as_error
from neurondrift.models.architecture.packing import draws
from neurondrift.models.batches import Batch, batches_without_padding, token_losses
from neurondrift.models.data import IGNORED
from neurondrift.models.sites import unwrap
from neurondrift.study.parallel.gradients import SameStart, sum_gradients

Encoded = Sequence[Mapping[str, Any]]


class ResponseTrainer(Trainer):
    """A Trainer whose loss is the mean over the response tokens of the (accumulated) batch, with logits computed at
    those positions only.

    Parameters
    ----------
    group
        The processes that train together: each has its share of the rows of every batch, and their gradients are
        summed before they are clipped. The batch is the one that is set, whatever their number.
    callbacks, **given
        As transformers' Trainer.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *, group: Joined, callbacks: Sequence[TrainerCallback], **given: Any) -> None:
        self.group = group
        pad = given["model"].config.pad_token_id
        collator = _Collator(given["model"], 0 if pad is None else pad, group)
        together = [SameStart()] if group.count > 1 else []
        super().__init__(data_collator=collator, callbacks=[*together, *callbacks], **given)

    def is_world_process_zero(self) -> bool:
        return self.group.number == 0

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
        losses_N = torch.cat([token_losses(model, part.to(device)).losses for part in inputs["parts"]])
        loss = losses_N.sum() / (inputs["targets"] if num_items_in_batch is None else num_items_in_batch)
        loss = loss if inputs["counts"] else loss * 0
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.group.count > 1:
            if self.accelerator.sync_gradients:
                sum_gradients([parameter for parameter in self.model.parameters() if parameter.requires_grad])
            with lost_as_error():
                dist.all_reduce(loss)
        return loss


class _Collator:
    """The rows of a step's batch that are this process's, to what the model computes at once: all of them without
    padding, or rows of one length each; and how many tokens the rows of all processes have a loss on.

    A process without a row (`counts` False) computes one for nothing, so that all do the same steps.
    """

    def __init__(self, model: nn.Module, pad_token_id: int, group: Joined) -> None:
        self.model, self.pad_token_id, self.group = model, pad_token_id, group
        self.share = not draws(model, unwrap(model))

    def __call__(self, rows: Encoded) -> dict[str, list[Batch] | int | bool]:
        own = self._own(rows)
        parts = batches_without_padding(
            self.model, own or rows[:1], batch_size=len(rows), pad_token_id=self.pad_token_id, share=self.share
        )
        return {"parts": parts, "targets": sum(map(_targets, rows)), "counts": bool(own)}

    def _own(self, rows: Encoded) -> Encoded:
        """About as many tokens for each process."""
        number, count = self.group
        if count == 1:
            return rows
        longest = sorted(range(len(rows)), key=lambda index: (-len(rows[index]["input_ids"]), index))
        return [rows[index] for index in longest[number::count]]


def _targets(row: Mapping[str, Any]) -> int:
    """How many tokens of a row are predicted: nothing predicts the first."""
    labels = [int(label) for label in row["labels"]]
    if (mask := row.get("attention_mask")) is not None:
        labels = [label for label, keep in zip(labels, mask, strict=True) if keep]
    return sum(label != IGNORED for label in labels[1:])
