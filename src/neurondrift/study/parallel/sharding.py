"""A model cut among processes by FSDP2 while it is trained or scored, and what is whole again of it on disk.

The model is loaded in main memory and goes to the devices block by block, each process keeping its part: no device ever
holds all of it. What is written is what one process writes, so that any number goes on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from neurondrift.base.errors import ModelError
from neurondrift.base.processes import leave_no_gaps
from neurondrift.models.architecture.blocks import decoder_blocks
from neurondrift.models.architecture.packing import packs
from neurondrift.models.sites import gathered, is_quantised, is_sharded, unwrap


def shard(model: nn.Module, device: torch.device) -> None:
    """Cut every parameter among the joined processes, in place: decoder block by decoder block, and the rest.

    Raises `ModelError` for a model with quantised weights, or whose blocks are not found.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cpu":  # blocks that are gathered and freed leave a quarter of a process's memory in gaps
        leave_no_gaps()
    inner = unwrap(model)
    packed = next((name for name, parameter in inner.named_parameters() if is_quantised(parameter)), None)
    if packed is not None:
        raise ModelError(
            "Quantised weights cannot be cut among processes",
            received=packed,
            fix='set parallel.strategy = "ddp", or load the model in 16 or 32 bits',
        )
    packs(model, inner)  # what is asked of a model is asked while each process has all of it
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for blocks in decoder_blocks(inner):
        for block in blocks.modules:
            fully_shard(block, mesh=mesh)
    fully_shard(inner, mesh=mesh)


def is_cut(model: nn.Module) -> bool:
    """Whether a model's parameters are cut among processes."""
    return any(is_sharded(parameter) for parameter in model.parameters())


@torch.no_grad()
def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a model that is cut (of a PEFT model: of what is trained), in main memory of the first process; the
    others help, tensor by tensor, and have nothing."""
    if hasattr(model, "peft_config"):
        named: Mapping[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    else:
        named = model.state_dict()
    return _whole(named)


@torch.no_grad()
def whole_optimiser(optimiser: Optimizer) -> dict[str, Any]:
    """The same of an optimiser, laid out as where nothing is cut."""
    state = optimiser.state_dict()
    return state | {"state": {key: _whole(values) for key, values in state["state"].items()}}


def _whole(values: Mapping[str, Any]) -> dict[str, Any]:
    keeps = dist.get_rank() == 0
    found = {}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            whole = gathered(value)
            if keeps:
                found[name] = whole.cpu()
        elif keeps:
            found[name] = value
    return found


def cut_state(optimiser: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A whole optimiser's state for one whose parameters are cut: to be registered as a hook before it is loaded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    def cut(parameter: torch.Tensor, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            return value
        placed = value.to(parameter.device)
        return distribute_tensor(placed, parameter.device_mesh, parameter.placements, src_data_rank=None)

    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    keys = [key for group in state["param_groups"] for key in group["params"]]
    of_key = dict(zip(keys, parameters, strict=True))
    each = state["state"].items()
    return state | {
        "state": {key: {name: cut(of_key[key], value) for name, value in values.items()} for key, values in each}
    }
