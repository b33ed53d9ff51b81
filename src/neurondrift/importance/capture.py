"""One forward and one backward pass for all sites.

Owns the hooks; knows nothing of what a method does with what it sees. The
per-example gradient of a site is δᵀx over the example's tokens, taken while the backward pass runs: no parameter
requires a gradient and no `.grad` is ever stored. Shapes: B = examples, T = tokens, I = in, O = out, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from neurondrift.base.errors import DataError, ModelError
from neurondrift.importance.methods import Tokens
from neurondrift.models.batches import Batch, attention_for, is_checkpointing, response_losses
from neurondrift.models.data import IGNORED
from neurondrift.models.sites import Site, is_quantised, is_router, unwrap

Record = Callable[[Site, Tokens], None]


def run(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Sequence[Batch],
    record: Record,
    *,
    backward: bool,
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
        A site that is used more than once in a forward pass, or by nothing; no blocks to checkpoint.
    """
    device = unwrap(model).get_input_embeddings().weight.device
    narrow = _narrow_dtype(model, sites)
    observer = _Observer(record=record, backward=backward)
    with contextlib.ExitStack() as changed:
        changed.enter_context(_frozen_in_evaluation_mode(model))
        changed.enter_context(observer.attached(sites))
        if backward and (checkpoint_activations or is_checkpointing(model)):
            changed.enter_context(_checkpointed_blocks(model, observer.not_counting))
        if narrow is not None:
            changed.enter_context(_wide_norms(model))
        for batch in batches:
            batch = batch.to(device)
            observer.start(batch)
            losses_B = _losses(model, batch, narrow, backward=backward)
            for name, loss in zip(batch.names, losses_B.tolist(), strict=True):
                if not math.isfinite(loss):
                    raise DataError(
                        f"The loss of example {name} is {loss}", fix="use dtype float32, or drop the example"
                    )
            if backward:
                with attention_for(model, batch):  # what is computed anew must be computed in the same way
                    losses_B.sum().backward()
            observer.check(sites)
            on_batch(batch)


def _losses(model: nn.Module, batch: Batch, narrow: torch.dtype | None, *, backward: bool) -> torch.Tensor:
    """The loss of each example `[B]`, with a graph from the embeddings on where a backward pass is to follow."""
    embeddings = unwrap(model).get_input_embeddings()

    def enter(module: nn.Module, args: Any, embedded: torch.Tensor) -> torch.Tensor:
        # A leaf that requires a gradient makes autograd run, although no parameter does.
        return (embedded if narrow is None else embedded.float()).requires_grad_(backward)

    with contextlib.ExitStack() as settings:
        settings.enter_context(torch.set_grad_enabled(backward))
        settings.enter_context(attention_for(model, batch))
        settings.enter_context(torch.autocast(batch.input_ids.device.type, narrow, enabled=narrow is not None))
        settings.callback(embeddings.register_forward_hook(enter).remove)
        return response_losses(model, batch)


def _narrow_dtype(model: nn.Module, sites: Mapping[str, Site]) -> torch.dtype | None:
    """The dtype of a model in 16 bits, whose sums over its blocks are then kept in float32: the products stay in 16
    bits, but what they add up to is not rounded once a block. None for wider models and quantised ones."""
    dtype: torch.dtype = unwrap(model).dtype
    is_narrow = dtype in (torch.bfloat16, torch.float16)
    return dtype if is_narrow and not any(is_quantised(site.tensor) for site in sites.values()) else None


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


class _PassingOn(torch.autograd.Function):
    """The identity on a site's output; its backward hands the site's inputs and δ to a receiver.

    A function rather than a hook, because `save_for_backward` obeys activation checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, inputs: torch.Tensor, receive: Callable[..., None]) -> torch.Tensor:
        ctx.save_for_backward(inputs.detach(), output.detach())
        ctx.receive = receive
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        inputs, output = ctx.saved_tensors
        ctx.receive(inputs, output, gradients)
        return gradients, None, None


@dataclass(kw_only=True)
class _Observer:
    """The hooks on all sites in one run, and the batch that they are looking at."""

    record: Record
    backward: bool
    batch: Batch | None = None
    is_response_N: torch.Tensor | None = None  # [B·T]
    uses: dict[str, int] = field(default_factory=dict)
    narrowed: tuple[torch.Tensor, torch.Tensor] | None = None  # inputs of the last site, and in 16 bits
    is_counting: bool = True  # a block that is computed again in the backward pass does not use its sites again

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self.is_response_N = (batch.labels != IGNORED).reshape(-1)
        self.uses = {}
        self.narrowed = None

    @contextlib.contextmanager
    def not_counting(self) -> Iterator[None]:
        """Uses of sites within the block are not counted."""
        before, self.is_counting = self.is_counting, False
        try:
            yield
        finally:
            self.is_counting = before

    def _count(self, site: Site) -> None:
        self.uses[site.name] = self.uses.get(site.name, 0) + self.is_counting

    def check(self, sites: Mapping[str, Site]) -> None:
        for name, site in sites.items():
            uses = self.uses.get(name, 0)
            if uses > 1:
                raise ModelError(
                    f"The module {name} is used {uses} times in one forward pass: its gradients cannot be told apart"
                )
            if uses == 0 and site.expert is None:
                raise ModelError(f"The module {name} took no part in the forward pass")

    @contextlib.contextmanager
    def attached(self, sites: Mapping[str, Site]) -> Iterator[None]:
        handles = []
        experts: dict[nn.Module, dict[tuple[str, int], Site]] = {}
        for site in sites.values():
            if site.expert is not None:
                experts.setdefault(site.owner, {})[site.parameter, site.expert] = site
            elif is_router(site.owner):
                handles.append(site.owner.register_forward_hook(self._router_hook(site)))
            else:
                handles.append(site.owner.register_forward_hook(self._linear_hook(site)))
        try:
            with _observed_experts(experts, self):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _linear_hook(self, site: Site) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return self.see(site, self.as_computed(args[0], output.dtype), output)

        return hook

    def as_computed(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The inputs in the dtype that autocast gave them: one copy for all sites that have the same."""
        if inputs.dtype == dtype:
            return inputs
        if self.narrowed is None or self.narrowed[0] is not inputs:
            self.narrowed = inputs, inputs.detach().to(dtype)
        return self.narrowed[1]

    def _router_hook(self, site: Site) -> Callable[..., None]:
        # A router returns (logits, ...) but goes on from its logits inside: a hook on that tensor sees all of δ.
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            logits = output[0] if isinstance(output, tuple) else output
            inputs = self.as_computed(args[0], logits.dtype).detach()
            self._count(site)
            if self.backward:
                logits.register_hook(lambda gradients: self.receive(site, None, inputs, logits.detach(), gradients))
            else:
                self.receive(site, None, inputs, logits.detach(), None)

        return hook

    def see(
        self, site: Site, inputs: torch.Tensor, output: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Let `output` [..., O] = linear(`inputs` [..., I]) pass, and record it now or when its gradient is there.

        `rows` are the positions in the flattened batch [B·T] that the inputs belong to, ascending; None: all.
        """
        self._count(site)
        if not self.backward:
            self.receive(site, rows, inputs, output, None)
            return output
        passed: torch.Tensor = _PassingOn.apply(output, inputs, lambda x, y, d: self.receive(site, rows, x, y, d))
        return passed

    def receive(
        self,
        site: Site,
        rows: torch.Tensor | None,
        inputs: torch.Tensor,
        output: torch.Tensor,
        gradients: torch.Tensor | None,
    ) -> None:
        """Cut what a site saw of the batch into examples, without padding, and record each."""
        assert self.batch is not None and self.is_response_N is not None
        inputs_NI = inputs.reshape(-1, inputs.shape[-1])
        output_NO = output.reshape(-1, output.shape[-1])
        if site.bias is not None:
            output_NO = output_NO - site.bias
        gradients_NO = None if gradients is None else gradients.reshape(-1, gradients.shape[-1])
        is_response = self.is_response_N.to(inputs_NI.device)
        if rows is not None:
            is_response = is_response[rows]
        length = self.batch.input_ids.shape[1]
        for example, (start, count) in enumerate(zip(self.batch.starts, self.batch.lengths, strict=True)):
            first, last = example * length + start, example * length + start + count
            if rows is not None:
                first, last = torch.searchsorted(rows, torch.tensor([first, last], device=rows.device)).tolist()
            span = slice(first, last)
            tokens = Tokens(
                inputs=inputs_NI[span],
                outputs=output_NO[span],
                gradients=None if gradients_NO is None else gradients_NO[span],
                is_response=is_response[span],
            )
            with torch.no_grad():
                self.record(site, tokens)


@contextlib.contextmanager
def _observed_experts(
    experts: Mapping[nn.Module, Mapping[tuple[str, int], Site]], observer: _Observer
) -> Iterator[None]:
    """Experts modules compute expert by expert within the block, each product seen.

    Replaces the `forward` of each module instance (transformers dispatches on a global registry otherwise)
    with the plain loop over experts that transformers documents as its reference.
    """

    def forward_of(module: Any, sites: Mapping[tuple[str, int], Site]) -> Callable[..., torch.Tensor]:
        def linear(states: torch.Tensor, key: str, expert: int, rows: torch.Tensor) -> torch.Tensor:
            weight = getattr(module, key)[expert]
            bias = getattr(module, f"{key}_bias")[expert] if getattr(module, "has_bias", False) else None
            output = F.linear(states, weight.T if getattr(module, "is_transposed", False) else weight, bias)
            site = sites.get((key, expert))
            return (
                output if site is None else observer.see(site, observer.as_computed(states, output.dtype), output, rows)
            )

        def forward(
            hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
        ) -> torch.Tensor:
            result = torch.zeros_like(hidden_states)
            up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
            for expert in torch.unique(top_k_index).tolist():
                if expert >= module.num_experts:
                    continue
                rows, choice = (top_k_index == expert).nonzero(as_tuple=True)  # rows ascending
                states = linear(hidden_states[rows], up, expert, rows)
                states = module._apply_gate(states) if getattr(module, "has_gate", True) else module.act_fn(states)
                states = linear(states, "down_proj", expert, rows)
                if getattr(module, "has_post_expert_norm", False):
                    states = module.post_expert_norm(states)
                result.index_add_(0, rows, (states * top_k_weights[rows, choice, None]).to(result.dtype))
            return result

        return forward

    for module in experts:
        if not hasattr(module, "_apply_gate"):
            raise ModelError(
                "These experts do not follow transformers' experts interface", received=type(module).__name__
            )
    try:
        for module, sites in experts.items():
            module.forward = forward_of(module, sites)
        yield
    finally:
        for module in experts:
            module.__dict__.pop("forward", None)
