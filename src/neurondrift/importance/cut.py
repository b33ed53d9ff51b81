"""Scores of a model that FSDP2 has cut among processes: each accumulates the scores of some sites for all of them.

No process holds the model, nor the accumulators of all sites: what a batch adds to the sites of one decoder block is
summed over the processes and handed to those that keep them, before the next block is gone through.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from neurondrift.base.processes import joined, lost_as_error
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Method, Tokens
from neurondrift.models.batches import Batch
from neurondrift.models.sites import Site

logger = logging.getLogger(__name__)


class CutAccumulators:
    """The accumulators of sites, each kept by one of the joined processes.

    Parameters
    ----------
    method
        What is added up.
    sites
        All sites, in the same order in every process.
    empty
        Makes the accumulator of a site, zero.
    sizes
        Bytes of each.
    free
        Free bytes of the device, the least of all processes: the accumulators lie in main memory where they do not fit.
    """

    def __init__(
        self,
        method: Method,
        sites: Mapping[str, Site],
        empty: Callable[[Site], torch.Tensor],
        sizes: Mapping[str, int],
        free: float,
    ) -> None:
        self.method, self.sites, self.empty = method, sites, empty
        self.number, count = joined()
        loads = [0] * count
        self.keeper: dict[str, int] = {}
        for name, size in sizes.items():
            self.keeper[name] = min(range(count), key=lambda process: (loads[process], process))
            loads[self.keeper[name]] += size
        self.on_device = max(loads) <= free
        logger.info(
            "scores: at most %.1f GB of accumulators for each of %d processes, %s",
            max(loads) / 1e9,
            count,
            "with the model" if self.on_device else "in main memory",
        )
        layers = sorted({site.layer for site in sites.values()}, reverse=method.needs == "backward")
        self._order = {layer: at for at, layer in enumerate(layers)}
        self._of_layer = [[site for site in sites.values() if site.layer == layer] for layer in layers]
        self._kept: dict[str, torch.Tensor] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._handed = 0  # how many blocks of the batch have been handed over
        self.is_counting = True

    def record(self, site: Site, tokens: Tokens) -> None:
        """Add one example, and hand over the blocks that this one shows to be done."""
        self._hand_over(self._order[site.layer])
        if self.is_counting:
            if site.name not in self._waiting:
                self._waiting[site.name] = self.empty(site)
            self.method.update(self._waiting[site.name], tokens)

    def end_batch(self) -> None:
        """Hand over what is left of a batch, in all processes: also of blocks that were seen again."""
        self._hand_over(len(self._of_layer))
        self._handed = 0
        late = torch.tensor([name in self._waiting for name in self.sites], dtype=torch.uint8)
        with lost_as_error():
            dist.all_reduce(late, op=dist.ReduceOp.MAX)
        self._reduce([site for site, is_late in zip(self.sites.values(), late.tolist(), strict=True) if is_late])

    def _hand_over(self, until: int) -> None:
        while self._handed < until:
            self._reduce(self._of_layer[self._handed])
            self._handed += 1

    def _reduce(self, sites: Sequence[Site]) -> None:
        for site in sites:
            part = self._waiting.pop(site.name, None)
            part = self.empty(site) if part is None else part
            with lost_as_error():
                dist.reduce(part, self.keeper[site.name])
            if self.keeper[site.name] != self.number:
                continue
            part = part if self.on_device else part.cpu()
            if site.name in self._kept:
                self._kept[site.name] += part
            else:
                self._kept[site.name] = part

    def finished(self, examples: int, tokens: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
        """The scores of each site, in all processes, on the CPU; one site at a time is whole."""
        for name, site in self.sites.items():
            weight = site.weight  # gathered
            if self.keeper[name] == self.number:
                total = self._kept.pop(name, None)
                total = self.empty(site) if total is None else total.to(weight.device)
                with torch.no_grad():
                    result = self.method.finish(total, weight, examples, tokens, generator).contiguous()
                shape = torch.tensor([*result.shape, 0][:2])
            else:
                shape = torch.zeros(2, dtype=torch.int64)
            with lost_as_error():
                dist.broadcast(shape, self.keeper[name])
                if self.keeper[name] != self.number:
                    result = weight.new_empty([size for size in shape.tolist() if size], dtype=torch.float32)
                dist.broadcast(result, self.keeper[name])
            yield name, result.cpu()


def accumulate(
    model: nn.Module,
    accumulators: CutAccumulators,
    batches: Sequence[Batch],
    *,
    backward: bool,
    checkpoint_activations: bool,
    on_batch: Callable[[Batch], None],
) -> None:
    """Every process's share of the batches, a batch each at a time: one that has none left goes through another's for
    nothing, as all must gather the model together."""
    number, count = joined()
    for first in range(0, len(batches), count):
        accumulators.is_counting = first + number < len(batches)
        own = batches[first + number] if accumulators.is_counting else batches[first]
        run(
            model,
            accumulators.sites,
            [own],
            accumulators.record,
            backward=backward,
            checkpoint_activations=checkpoint_activations,
            on_batch=on_batch if accumulators.is_counting else lambda batch: None,
        )
        accumulators.end_batch()
