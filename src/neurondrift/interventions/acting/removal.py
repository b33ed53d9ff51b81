"""Directions as a reversible context on a loaded model: removed from its weights, and given back bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from neurondrift.base.errors import ModelError
from neurondrift.models.sites import Sites, is_quantised, is_sharded, sites_of


@contextlib.contextmanager
def remove_rank(
    model: nn.Module | Sites, projections: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """W ← W - P W at every site named, within the block; every bit is back when it is left, also by an exception.

    Parameters
    ----------
    model
        A causal language model, or its `linear_sites`. Under an adapter its base weights are changed and the adapter is
        left alone.
    projections
        Site name -> the two factors of P, `[out, k]` and `[k, out]`, for example `projection(U)` (ActSVD's removal) or
        `safety_only(U_s, U_u)` of `importance.directions`.

    Raises
    ------
    ModelError
        A site that the model does not have, of another size, or whose weight is quantised or sharded. Nothing is
        changed then.

    Notes
    -----
    The product is formed in float64 (float32 where the device has no float64) and rounded once to the weight's
    dtype. The weights of the sites named are kept beside the model meanwhile: as much memory again.
    """
    sites = sites_of(model)
    for name, change in projections.items():
        if name not in sites:
            raise ModelError("The model has no such site to remove directions from", received=name)
        if is_quantised(sites[name].tensor) or is_sharded(sites[name].tensor):
            raise ModelError(f"The weight of {name} is quantised or sharded and cannot be changed in place")
        (left, right), outputs = change, sites[name].shape[0]
        if left.shape[0] != outputs or right.shape[1] != outputs:
            raise ModelError(
                f"The directions do not fit the outputs of {name}", received=left.shape[0], allowed=str(outputs)
            )
    originals: dict[str, torch.Tensor] = {}
    try:
        with torch.no_grad():
            for name, change in projections.items():
                weight = sites[name].weight
                exact = torch.float32 if weight.device.type == "mps" else torch.float64
                left, right = (factor.to(device=weight.device, dtype=exact) for factor in change)
                originals[name] = weight.clone()
                weight.copy_(weight.to(exact) - left @ (right @ weight.to(exact)))
        yield
    finally:
        with torch.no_grad():
            for name, original in originals.items():
                sites[name].weight.copy_(original)
