"""The hooks on all sites in a pass, and what they see of each example.

Knows nothing of what a method does with what it sees. A site counts as seen where its module gave the product of its
weight with one row for each token; all others are left to `unseen.py`. Shapes: B = examples, T = tokens, I = in, O =
out, N = rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from neurondrift.importance.experts import is_observable, observed_experts
from neurondrift.importance.methods import Tokens
from neurondrift.models.architecture.experts import is_router
from neurondrift.models.batches import Batch
from neurondrift.models.data import IGNORED
from neurondrift.models.sites import Site, is_quantised

Record = Callable[[Site, Tokens], None]


class _PassingOn(torch.autograd.Function):
    """The identity on a site's output; its backward hands the site's inputs and δ to a receiver.

    A function rather than a hook, because `save_for_backward` obeys activation checkpointing. What it gives is a view
    of the output, or a copy where the model goes on to write into it.
    """

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, inputs: torch.Tensor, receive: Callable[..., None], copied: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(inputs.detach(), output.detach())
        ctx.receive = receive
        return output.clone() if copied else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        inputs, output = ctx.saved_tensors
        ctx.receive(inputs, output, gradients)
        return gradients, None, None, None


class _Seen(NamedTuple):
    """What a site saw of a batch in one use: rows of the flattened batch (None: all), `[N, I]`, `[N, O]`, `[N, O]`."""

    rows: torch.Tensor | None
    inputs: torch.Tensor
    outputs: torch.Tensor
    gradients: torch.Tensor | None


@dataclass(kw_only=True)
class Observer:
    """The hooks on all sites in one run, and the batch that they are looking at."""

    record: Record
    backward: bool
    batch: Batch | None = None
    is_response_N: torch.Tensor | None = None  # [B·T]
    uses: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, list[_Seen]] = field(default_factory=dict)  # sites whose other uses are still to come
    sites: dict[str, Site] = field(default_factory=dict)
    strange: set[str] = field(default_factory=set)  # sites that are not given one row a token, or answer otherwise
    blind: set[str] = field(default_factory=set)  # experts that compute in a way of their own
    narrowed: tuple[torch.Tensor, torch.Tensor] | None = None  # inputs of the last site, and in 16 bits
    is_counting: bool = True  # a block that is computed again in the backward pass does not use its sites again
    is_looking: bool = True
    writes_in_place: bool = False  # the model writes into what a site gave it

    def watching(self, batch: Batch, losses: Callable[[Batch, bool], torch.Tensor]) -> torch.Tensor:
        """The losses of a batch, its sites seen; again with copies where the model writes into what it was given."""
        self._start(batch)
        try:
            return losses(batch, self.writes_in_place)
        except RuntimeError as error:
            written = "modified inplace" in str(error) or "used in an in-place operation" in str(error)
            if self.writes_in_place or not written:
                raise
        self.writes_in_place = True
        self._start(batch)
        return losses(batch, True)

    def _start(self, batch: Batch) -> None:
        self.batch = batch
        self.is_response_N = (batch.labels != IGNORED).reshape(-1)
        self.uses, self.waiting, self.strange = {}, {}, set()
        self.narrowed = None

    @contextlib.contextmanager
    def not_counting(self) -> Iterator[None]:
        """Uses of sites within the block are not counted."""
        before, self.is_counting = self.is_counting, False
        try:
            yield
        finally:
            self.is_counting = before

    @contextlib.contextmanager
    def looking_away(self) -> Iterator[None]:
        """Nothing is recorded within the block."""
        self.is_looking = False
        try:
            yield
        finally:
            self.is_looking = True

    def _count(self, site: Site) -> None:
        self.uses[site.name] = self.uses.get(site.name, 0) + self.is_counting

    def finish(self) -> None:
        """Record the sites of which a use has had no gradient: nothing came of it."""
        for name in list(self.waiting):
            self._cut(self.sites[name], self.waiting.pop(name))

    def unseen(self, sites: Mapping[str, Site]) -> dict[str, Site]:
        """The sites that were not seen in this batch; of experts only those that never can be."""
        return {
            name: site
            for name, site in sites.items()
            if name in self.blind or name in self.strange or (site.expert is None and not self.uses.get(name))
        }

    @contextlib.contextmanager
    def attached(self, sites: Mapping[str, Site]) -> Iterator[None]:
        handles = []
        experts: dict[nn.Module, dict[tuple[str, int], Site]] = {}
        self.sites = dict(sites)
        for site in sites.values():
            for owner in (site.owner, *(other.owner for other in site.also)):
                if site.expert is not None:
                    experts.setdefault(owner, {})[site.parameter, site.expert] = site
                elif is_router(owner):
                    handles.append(owner.register_forward_hook(self._router_hook(site)))
                else:
                    handles.append(owner.register_forward_hook(self._linear_hook(site)))
        for module in [module for module in experts if not is_observable(module)]:
            self.blind |= {site.name for site in experts.pop(module).values()}
        try:
            with observed_experts(experts, self.see_expert):
                yield
        finally:
            # A graph leads to this observer, by what is called on the way back through it; an observer that led to the
            # graph in turn would live for ever, and with it all that it records into.
            self.narrowed, self.waiting = None, {}
            for handle in handles:
                handle.remove()

    def _linear_hook(self, site: Site) -> Callable[..., Any]:
        plain = is_plain(site)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if not self.is_looking:
                return output
            inputs = args[0] if args and isinstance(args[0], torch.Tensor) else None
            if inputs is None or not self._lies_as_tokens(inputs) or not (plain or _is_linear(site, inputs, output)):
                self.strange.add(site.name)
                return output
            return self.see(site, self.as_computed(inputs, output.dtype), output)

        return hook

    def _lies_as_tokens(self, inputs: torch.Tensor) -> bool:
        """Whether inputs are `[B, T, ..., I]` or `[B·T, ..., I]`: rows for each token of the batch, in its order."""
        assert self.batch is not None
        batch, length = self.batch.input_ids.shape
        leading = tuple(inputs.shape[:-1])
        return leading[:2] == (batch, length) or leading[:1] == (batch * length,) or leading == (1, batch * length)

    def as_computed(self, inputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The inputs in the dtype that autocast gave them: one copy for all sites that have the same."""
        if inputs.dtype == dtype:
            return inputs
        if self.narrowed is None or self.narrowed[0] is not inputs:
            self.narrowed = inputs, inputs.detach().to(dtype)
        return self.narrowed[1]

    def _router_hook(self, site: Site) -> Callable[..., None]:
        # A router returns its logits among others but goes on from them inside: a hook on that tensor sees all of δ.
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not self.is_looking:
                return
            given = output if isinstance(output, tuple) else (output,)
            inputs = args[0] if args and isinstance(args[0], torch.Tensor) else None
            logits = next((one for one in given if inputs is not None and _is_linear(site, inputs, one)), None)
            if inputs is None or logits is None or not self._lies_as_tokens(inputs):
                self.strange.add(site.name)
                return
            inputs = self.as_computed(inputs, logits.dtype).detach()
            self._count(site)
            outputs = logits.detach()
            if self.backward:
                logits.register_hook(lambda gradients: self.receive(site, None, inputs, outputs, gradients))
            else:
                self.receive(site, None, inputs, outputs, None)

        return hook

    def see_expert(
        self, site: Site, inputs: torch.Tensor, output: torch.Tensor, rows: torch.Tensor | None
    ) -> torch.Tensor:
        """As `see`, of one expert."""
        return self.see(site, self.as_computed(inputs, output.dtype), output, rows) if self.is_looking else output

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
        passed: torch.Tensor = _PassingOn.apply(
            output, inputs, lambda x, y, d: self.receive(site, rows, x, y, d), self.writes_in_place
        )
        return passed

    def receive(
        self,
        site: Site,
        rows: torch.Tensor | None,
        inputs: torch.Tensor,
        output: torch.Tensor,
        gradients: torch.Tensor | None,
    ) -> None:
        """Record what a site saw of the batch, once all its uses are there: their gradients add up."""
        if site.name in self.strange:  # in another use: autograd is asked for all of them
            return
        output_NO = output.reshape(-1, output.shape[-1])
        if site.bias is not None:
            output_NO = output_NO - site.bias
        gradients_NO = None if gradients is None else gradients.reshape(-1, gradients.shape[-1])
        seen = _Seen(rows, inputs.reshape(-1, inputs.shape[-1]), output_NO, gradients_NO)
        if gradients is None or self.uses.get(site.name, 0) <= 1:
            self._cut(site, [seen])
            return
        self.waiting.setdefault(site.name, []).append(seen)
        if len(self.waiting[site.name]) == self.uses[site.name]:
            self._cut(site, self.waiting.pop(site.name))

    def _cut(self, site: Site, uses: Sequence[_Seen]) -> None:
        """Cut what a site saw of the batch into examples, without padding, and record each."""
        assert self.batch is not None
        for example in range(len(self.batch.names)):
            parts = [self._tokens(seen, example) for seen in uses]
            with torch.no_grad():
                self.record(site, parts[0] if len(parts) == 1 else _joined(parts))

    def _tokens(self, seen: _Seen, example: int) -> Tokens:
        assert self.batch is not None and self.is_response_N is not None
        rows, is_response = seen.rows, self.is_response_N.to(seen.inputs.device)
        first, last = self.batch.span(example)
        if rows is not None:
            is_response = is_response[rows]
            first, last = torch.searchsorted(rows, torch.tensor([first, last], device=rows.device)).tolist()
        elif len(seen.inputs) > len(is_response):  # several rows a token, such as one a head
            each = len(seen.inputs) // len(is_response)
            is_response, first, last = is_response.repeat_interleave(each), first * each, last * each
        span = slice(first, last)
        return Tokens(
            inputs=seen.inputs[span],
            outputs=seen.outputs[span],
            gradients=None if seen.gradients is None else seen.gradients[span],
            is_response=is_response[span],
        )


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of all uses of a site as one."""
    assert all(part.gradients is not None for part in parts)
    return Tokens(**{key: torch.cat([getattr(part, key) for part in parts]) for key in Tokens.__dataclass_fields__})


def is_plain(site: Site) -> bool:
    """Whether a module computes as torch's own linear layer, or transformers' Conv1D, or is a quantised one."""
    owner: Any = site.owner
    return type(owner).forward in (nn.Linear.forward, Conv1D.forward) or is_quantised(site.tensor)


@torch.no_grad()
def _is_linear(site: Site, inputs: Any, output: Any) -> bool:
    """Whether a module of a class of its own has given the product with its weight, up to rounding."""
    if not isinstance(output, torch.Tensor) or inputs.shape[-1] != site.shape[1]:
        return False
    if output.numel() * site.shape[1] != inputs.numel() * site.shape[0]:
        return False
    weight_OI = site.weight.float()
    expected = F.linear(inputs.float(), weight_OI, None if site.bias is None else site.bias.float())
    missed = (expected.reshape(-1) - output.float().reshape(-1)).norm()
    return bool(missed <= (1e-3 if site.tensor.dtype == torch.float32 else 0.05) * expected.norm())
