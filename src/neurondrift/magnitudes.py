"""|w| of whatever a group can hold, site by site: what controls are matched on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from neurondrift.drift.exact import row_norms
from neurondrift.groups import Granularity
from neurondrift.sites import Site, linear_sites, mlp_units


@torch.no_grad()
def magnitudes_of(model: nn.Module, granularity: Granularity) -> Mapping[str, Any]:
    """|w| of the members of every site (MLP) of a model, as `groups.matched` takes it; of w₀ under an adapter.

    Neurons: ‖row‖, float64 `[out]`. Hidden units: ‖rows and column‖ together, float64 `[units]`. Weights: |w|, float32
    `[out, in]`, formed when it is asked for, so that one site at a time is in memory.
    """
    sites = linear_sites(model)
    if granularity == "weight":
        return _Weights(sites)
    if granularity == "neuron":
        return {name: row_norms(site.weight).cpu().numpy() for name, site in sites.items()}
    result = {}
    for name, unit in mlp_units(sites).items():
        square = row_norms(sites[unit.down].weight.T).square()
        for site, offset in unit.ups:
            square = square + row_norms(sites[site].weight[offset : offset + unit.count]).square()
        result[name] = square.sqrt().cpu().numpy()
    return result


class _Weights(Mapping[str, Any]):
    def __init__(self, sites: Mapping[str, Site]) -> None:
        self._sites = sites

    def __getitem__(self, name: str) -> Any:
        return self._sites[name].weight.float().abs().cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)
