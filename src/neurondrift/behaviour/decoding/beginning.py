"""What prompts have in common, computed once: the tokens that all begin with, and parts of a batch of like length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from neurondrift.behaviour.decoding.cache import GrowingLayer

SHORTEST_SHARED = 8  # tokens that prompts must have in common before they are computed once
# What one more pass of a model costs, in tokens of a pass: the weights are read once more (on a CPU), or all the
# kernels of a pass are started again, which some thousand tokens do not take longer than one.
PASS_CPU, PASS = 24, 4096


@dataclass(eq=False)
class Beginning:
    """Tokens that all of some prompts begin with (the head of a chat template), and what a model keeps of them.

    `layers`: the keys and values of each layer of the cache, `[1, H, T, D]`; None until a model has read them. They
    are of one state of one model: make a new beginning where weights or hooks have changed.
    """

    tokens: tuple[int, ...]
    layers: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def keep(self, cache: DynamicCache) -> None:
        """Take what a model has read of the tokens from its cache."""
        self.layers = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]

    def caches(self, template: DynamicCache, rows: int, length: int, room: int) -> DynamicCache:
        """A cache of `rows` rows that begin so and count `length` tokens, with room for `room`."""
        assert self.layers is not None
        layers = []
        for keys, values in self.layers:
            layer = GrowingLayer(room)
            layer.begin(keys, values, rows, length)
            layers.append(layer)
        template.layers = layers
        return template


def common_beginning(ids: Sequence[Sequence[int]]) -> Beginning:
    """The tokens that all prompts begin with, at least one token of each left over; none where it saves nothing."""
    distinct = set(map(tuple, ids))
    if len(distinct) < 2:
        return Beginning(())
    first, last = min(distinct), max(distinct)
    most = min(map(len, distinct)) - 1
    shared = next((at for at in range(most) if first[at] != last[at]), most)
    return Beginning(first[:shared] if shared >= SHORTEST_SHARED else ())


def parts_of_like_length(lengths: Sequence[int], device: torch.device) -> list[slice]:
    """Where to divide prompts, sorted by length, so that padding and passes together cost least."""
    cost = PASS_CPU if device.type == "cpu" else PASS
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n prompts: the cost, and where the last part begins
    for end in range(1, len(lengths) + 1):
        best.append(
            min(
                (best[start][0] + cost + (end - start) * max(lengths[start], lengths[end - 1]), start)
                for start in range(end)
            )
        )
    parts, end = [], len(lengths)
    while end:
        start = best[end][1]
        parts.append(slice(start, end))
        end = start
    return parts[::-1]
