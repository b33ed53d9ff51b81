"""One forward and one backward pass for all sites.

Owns the state of the model during the pass; the hooks are in `observer.py`. The
per-example gradient of a site is δᵀx over the example's tokens, taken while the backward pass runs: no parameter
requires a gradient and no `.grad` is ever stored. Shapes: B = examples, T = tokens, I = in, O = out, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from neurondrift.base.errors import DataError, ModelError
from neurondrift.importance.observer import Observer, Record
from neurondrift.importance.unseen import record_unseen
from neurondrift.models.architecture.conventions import check_causal
from neurondrift.models.batches import Batch, as_laid_out, attention_for, is_checkpointing, response_losses
from neurondrift.models.sites import Site, is_quantised, is_sharded, unwrap

Objective = Callable[[nn.Module, Batch], torch.Tensor]


def run(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Batch],
    record: Record,
    *,
    backward: bool,
    objective: Objective = response_losses,
    kept: Sequence[nn.Parameter] = (),
    checkpoint_activations: bool = False,
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> None:
    """Send every batch through the model once and `record` what each site sees of each example.

    Parameters
    ----------
    model
        A causal language model; put in evaluation mode for the pass and left as it was.
    sites
        The sites to record.
    batches
        From `make_batches`.
    record
        Called once per site and example, with the example's tokens only (no padding).
    backward
        Whether gradients are needed.
    objective
        `objective(model, batch)`: the values `[B]` whose sum is gone back from; by default each example's loss.
    kept
        Parameters that are no sites and whose gradients are wanted too: added up in their `.grad`.
    checkpoint_activations
        Keep only the inputs of each block, and compute the rest again in the backward pass. Also where the model has
        its own activation checkpointing switched on.
    on_batch
        Called after each batch, for progress.

    Raises
    ------
    DataError
        A loss that is not finite; the example is named.
    ModelError
        No causal language model; no blocks to checkpoint; a site whose inputs cannot be seen, where a method needs them
        and no gradients.

    Notes
    -----
    A site that is used several times in a forward pass, or shared by several layers, has its tokens of all uses
    together: its gradient is their sum. One that hooks cannot see is recorded by autograd (`unseen.py`).
    """
    device = unwrap(model).get_input_embeddings().weight.device
    narrow = _narrow_dtype(model, sites)
    is_cut = any(is_sharded(site.tensor) for site in sites.values())
    observer = Observer(record=record, backward=backward)
    with contextlib.ExitStack() as changed:
        changed.enter_context(_frozen_in_evaluation_mode(model))
        check_causal(unwrap(model))
        for parameter in kept:
            parameter.requires_grad_(backward)
        changed.enter_context(observer.attached(sites))
        if backward and (checkpoint_activations or is_checkpointing(model)):
            changed.enter_context(_checkpointed_blocks(model, observer.not_counting))
        if narrow is not None:
            changed.enter_context(_wide_norms(model))
        for batch in batches:
            batch = batch.to(device)
            losses_B = observer.watching(
                batch, lambda batch, copied: _losses(model, batch, narrow, objective, backward=backward, copied=copied)
            )
            for name, loss in zip(batch.names, losses_B.tolist(), strict=True):
                if not math.isfinite(loss):
                    raise DataError(
                        f"The loss of example {name} is {loss}", fix="use dtype float32, or drop the example"
                    )
            if backward:
                # What is computed anew must be computed in the same way.
                with attention_for(model, batch), as_laid_out(model, batch):
                    losses_B.sum().backward()
            observer.finish()
            unseen = observer.unseen(sites)
            if unseen and is_cut:
                raise ModelError(
                    "What a site sees cannot be seen by a hook, and a model that is cut among processes (FSDP2) has no "
                    "gradient of it to ask for",
                    received=next(iter(unseen)),
                    fix='set parallel.strategy = "ddp"',
                )
            if unseen:
                losses = partial(
                    _losses, model, narrow=narrow, objective=objective, backward=True, copied=observer.writes_in_place
                )
                with observer.looking_away():
                    record_unseen(unseen, batch, losses, record, backward)
            on_batch(batch)


def _losses(
    model: nn.Module,
    batch: Batch,
    narrow: torch.dtype | None,
    objective: Objective,
    *,
    backward: bool,
    copied: bool,
) -> torch.Tensor:
    """The objective of each example `[B]`, with a graph from the embeddings on where a backward pass is to follow;
    `copied` where the model writes into what it is given."""
    embeddings = unwrap(model).get_input_embeddings()

    def enter(module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        # A leaf that requires a gradient makes autograd run, although no parameter does.
        leaf = (embedded if narrow is None else embedded.float()).requires_grad_(backward)
        return leaf.clone() if copied else leaf

    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.set_grad_enabled(backward))
        settings.enter_context(attention_for(model, batch))
        settings.enter_context(torch.autocast(batch.input_ids.device.type, narrow, enabled=narrow is not None))
        settings.callback(embeddings.register_forward_hook(enter).remove)
        return objective(model, batch)


def _narrow_dtype(model: nn.Module, sites: Mapping[str, Site]) -> torch.dtype | None:
    """The dtype of a model in 16 bits, whose sums over its blocks are then kept in float32: the products stay in 16
    bits, but what they add up to is not rounded once a block. None for wider models and quantised ones."""
    dtype: torch.dtype = unwrap(model).dtype
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    tensors = [site.tensor for site in sites.values()] or list(model.parameters())
    return dtype if is_narrow and not any(map(is_quantised, tensors)) else None


@contextlib.contextmanager
def _wide_norms(model: nn.Module) -> Iterator[None]:
    """torch's own LayerNorm has float32 parameters within the block: it takes no others for a float32 input."""
    parameters = [
        parameter for module in model.modules() if isinstance(module, nn.LayerNorm) for parameter in module.parameters()
    ]
    before = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = data


@contextlib.contextmanager
def _checkpointed_blocks(
    model: nn.Module, again: Callable[[], contextlib.AbstractContextManager[None]]
) -> Iterator[None]:
    """Every decoder block recomputes its activations in the backward pass, each time within a context of `again`.

    Not by transformers' own switch, which has no effect outside training mode, where dropout would be.
    """
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ModelError(
            "This model has no blocks whose activations could be checkpointed", received=type(unwrap(model)).__name__
        )
    before = [block.__dict__.get("forward") for block in blocks]

    def recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (contextlib.nullcontext(), again()),
            **kwargs,
        )

    try:
        for block in blocks:
            block.forward = recomputing(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


@contextlib.contextmanager
def _frozen_in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no parameter gradient within the block; everything as before afterwards."""
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
