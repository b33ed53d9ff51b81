"""What any other PEFT method does to the weight of a site: PEFT's own merge, on a float64 copy of that one layer.

Nothing is trusted unseen. The copy's output before the merge, on inputs drawn at random, must be its output after
it; where PEFT cannot merge, the weight is read off as the copy's answer to unit vectors, and checked in the same way.
A layer that passes neither (its change depends on the input, or is computed coarsely) is an error that names it.
The model itself is not touched.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from neurondrift.base.errors import ModelError
from neurondrift.models.architecture.conventions import close, some_tokens
from neurondrift.models.sites import Site, is_quantised, unwrap

# Largest difference between the two outputs: as a share of the change, and (rounding) of the output itself.
TOLERANCE = 1e-5
ROUNDING = 1e-12
PROBES = 5
UNITS = 1024
# What logits may change by when an adapter is merged in float32, as a share of their length; on how many tokens.
MERGED, TOKENS = 1e-5, 6


@torch.no_grad()
def adapted_change(site: Site) -> torch.Tensor:
    """Δ of a site under its active adapters, whatever their method, float64 `[out, in]`, on the site's device.

    The layer is taken as in evaluation: no dropout, no sampling.

    Raises
    ------
    ModelError
        No single weight does what the layer does, to a share of `TOLERANCE` of the change.
    """
    base_OI = site.weight.double()
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, PROBES, site.shape[1], dtype=torch.float64, generator=generator).to(base_OI.device)
    # Methods whose forward draws random numbers must not move the caller's generator.
    with torch.random.fork_rng(devices=[base_OI.device] if base_OI.is_cuda else []), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autocast(base_OI.device.type, enabled=False):
            failure: Exception | None = None
            for read in (_by_merging, _by_asking):
                try:
                    layer = _float64_copy(site, base_OI)
                    answer = layer(probe)[0]
                    offset = layer(torch.zeros_like(probe))[0, :1]
                    now_OI = read(layer, site)
                except Exception as error:  # PEFT's layers fail in many ways; the next way, or our error, follows
                    failure = error
                    continue
                expected = functional.linear(probe[0], now_OI) + offset
                moved = float((expected - offset - functional.linear(probe[0], base_OI)).norm())
                missed = float((answer - expected).norm())
                if missed <= TOLERANCE * moved + ROUNDING * float(answer.norm()):
                    return now_OI - base_OI
                failure = None
    raise ModelError(
        f"The drift of {site.name} under this adapter cannot be measured exactly: no weight does what its layer does",
        received=f"{type(site.wrapper).__module__.removeprefix('peft.tuners.')}.{type(site.wrapper).__name__}",
        allowed="adapters whose effect is one change of the weight, the same for every input",
    ) from failure


def _float64_copy(site: Site, base_OI: torch.Tensor) -> Any:
    """PEFT's layer of a site with all its parameters in float64; a quantised base becomes a plain linear layer."""
    owner: Any = site.owner
    known: dict[int, Any] = {}
    if is_quantised(site.tensor):
        plain = nn.Linear(site.shape[1], site.shape[0], bias=owner.bias is not None, device="meta")
        plain.weight = nn.Parameter(base_OI.clone(), requires_grad=False)
        if owner.bias is not None:
            plain.bias = nn.Parameter(owner.bias.detach().clone(), requires_grad=False)
        known[id(owner)] = plain
    return copy.deepcopy(site.wrapper, known).double().eval()


def _by_merging(layer: Any, site: Site) -> torch.Tensor:
    layer.merge()
    return site.oriented(layer.get_base_layer().weight.detach()).double()


def _by_asking(layer: Any, site: Site) -> torch.Tensor:
    width = site.shape[1]
    parameter = next(layer.parameters())
    offset = layer(torch.zeros(1, 1, width, dtype=torch.float64, device=parameter.device))[0]
    columns = []
    for start in range(0, width, UNITS):
        units = torch.zeros(min(UNITS, width - start), width, dtype=torch.float64, device=parameter.device)
        units[torch.arange(len(units)), start + torch.arange(len(units))] = 1
        columns.append((layer(units[None])[0] - offset).T)
    return torch.cat(columns, dim=1)


@torch.no_grad()
def merge_to_read(model: Any) -> bool:
    """Merge a LoRA adapter into the weights of a model that is only to be read from, where nothing is lost by it.

    Returns
    -------
    Whether it is merged: only into float32 weights (a merge into 16 bits rounds most of a small change away), only
    plain LoRA, and only where the logits of some tokens stay what they were but for rounding. The products of the
    adapter cost a tenth of decoding on a CPU, and most of the kernels of a pass on a GPU.

    Notes
    -----
    The base weights are gone from `model`; drift is never measured so.
    """
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    plain = all(type(layer) is Linear and not layer.lora_variant for layer in layers)
    floats = all(parameter.dtype == torch.float32 for parameter in model.parameters() if parameter.is_floating_point())
    if not layers or not plain or not floats or any(layer.merged or layer.disable_adapters for layer in layers):
        return False
    tokens = some_tokens(unwrap(model), TOKENS)
    before = model(input_ids=tokens, use_cache=False).logits
    for layer in layers:
        layer.merge()
    if close(model(input_ids=tokens, use_cache=False).logits, before, torch.float32, wide=MERGED):
        return True
    for layer in layers:
        layer.unmerge()
    return False
