"""Sites that no hook can see: their gradients by plain autograd, one example at a time.

A weight may be used outside of its module (`layer.weight @ states`), its module may be given something other than one
row for each token, or its experts may compute in a way of their own. The gradient of the weight is then asked for
itself, and handed to the method as tokens that have it for their sum: exact, but one backward pass for each example.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from neurondrift.base.errors import ModelError
from neurondrift.importance.methods import Tokens
from neurondrift.models.architecture.saying import kinds_of, say_once
from neurondrift.models.batches import Batch
from neurondrift.models.sites import Site, is_quantised

logger = logging.getLogger(__name__)

Losses = Callable[[Batch], torch.Tensor]


def record_unseen(
    sites: Mapping[str, Site], batch: Batch, losses: Losses, record: Callable[[Site, Tokens], None], backward: bool
) -> None:
    """`record` the sites of a batch that the hooks have not seen.

    `losses` gives the loss of each example `[B]` with a graph. A weight that no loss depends on has taken no part: its
    gradients are zero, and a warning names it once. Raises `ModelError` where one that takes part is to be recorded
    without gradients: what goes into it is not known.
    """
    packed = [name for name, site in sites.items() if is_quantised(site.tensor)]
    if packed:
        raise ModelError(
            f"What {packed[0]} computes cannot be seen, and a quantised weight has no gradient of its own",
            fix="load the model in a plain dtype",
        )
    used: set[str] = set()
    examples = range(len(batch.names)) if backward else range(1)
    for example in examples:
        gradients = _gradients(sites, batch.only(example) if backward else batch, losses)
        used |= set(gradients)
        for name in gradients if backward else ():
            with torch.no_grad():
                record(sites[name], tokens_of(gradients[name], sites[name].weight))
    if used and not backward:
        first = min(used, key=list(sites).index)
        raise ModelError(
            f"What goes into {first} cannot be seen: its weight is used outside of its module",
            received=f"{len(used)} such sites",
            fix="score the other sites only (sites=...), or use a method of gradients: snip, fisher, taylor",
        )
    if used:
        say_once(f"scored one example at a time, as no hook sees what they compute: {kinds_of(sorted(used))}")
    idle = [name for name in sites if name not in used and sites[name].expert is None]
    if idle:
        say_once(f"took no part in a forward pass, so that their scores are 0: {kinds_of(idle)}")


def _gradients(sites: Mapping[str, Site], batch: Batch, losses: Losses) -> dict[str, torch.Tensor]:
    """Site name -> gradient `[out, in]` of the summed losses, for those that they depend on."""
    tensors = {id(site.tensor): site.tensor for site in sites.values()}
    with torch.enable_grad(), _requiring_gradients(list(tensors.values())):
        found = torch.autograd.grad(losses(batch).sum(), list(tensors.values()), allow_unused=True)
    by_id = dict(zip(tensors, found, strict=True))
    gradients = {name: by_id[id(site.tensor)] for name, site in sites.items()}
    return {name: sites[name].oriented(gradient) for name, gradient in gradients.items() if gradient is not None}


@contextlib.contextmanager
def _requiring_gradients(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        yield
    finally:
        for tensor in tensors:
            tensor.requires_grad_(False)


def tokens_of(gradient_OI: torch.Tensor, weight_OI: torch.Tensor) -> Tokens:
    """Tokens whose sum of δᵀx is a gradient, and whose Σ y·δ is Σⱼ Wᵢⱼ Gᵢⱼ: unit vectors on the shorter side."""
    rows, columns = gradient_OI.shape
    units = torch.eye(min(rows, columns), dtype=gradient_OI.dtype, device=gradient_OI.device)
    inputs, gradients = (gradient_OI, units) if rows <= columns else (units, gradient_OI.T)
    outputs = inputs @ weight_OI.to(inputs.dtype).T
    everything = torch.ones(len(units), dtype=torch.bool, device=gradient_OI.device)
    return Tokens(inputs=inputs, outputs=outputs, gradients=gradients, is_response=everything)
