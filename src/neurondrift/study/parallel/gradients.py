"""Gradients of several processes: summed once a step, and weights that are the same in all of them before the first.

Not torch's DistributedDataParallel: a batch may go through the model in several forward passes, and experts may be used
in one process and not in another, neither of which it allows. What it sums is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from neurondrift.base.processes import lost_as_error

#: Elements that are sent together: smaller tensors are laid one after the other.
BUCKET = 1 << 24


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Every process's gradients become the sum over all of them; none where no process has one.

    All processes must call it with the same parameters in the same order.
    """
    if not parameters:
        return
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    with lost_as_error():
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        used = [parameter for parameter, somewhere in zip(parameters, has.tolist(), strict=True) if somewhere]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in used if parameter.grad is not None]):
            _sum(bucket)


def _sum(tensors: Sequence[torch.Tensor]) -> None:
    if len(tensors) == 1:
        dist.all_reduce(tensors[0])
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Tensors of one kind and place, in their order, as many together as there is room for."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = sum(each.numel() for each in bucket) + tensor.numel() > BUCKET
        if bucket and (full or (bucket[0].dtype, bucket[0].device) != (tensor.dtype, tensor.device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@torch.no_grad()
def start_alike(model: nn.Module) -> None:
    """What is trained becomes in all processes what it is in the first."""
    with lost_as_error():
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.detach(), 0)
