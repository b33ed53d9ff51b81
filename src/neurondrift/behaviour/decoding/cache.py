"""A cache of keys and values that grows in place, and what else is asked of the caches of transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """A cache layer that grows within a buffer, so that a new token costs its own size and not the cache's."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room  # tokens
        self.buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        had = self.keys.shape[-2] if self.keys.numel() else 0
        have = had + key_states.shape[-2]
        if self.buffers is None or self.buffers[0].shape[-2] < have:
            self._rebuild(key_states, value_states, had, max(have, self.room))
        assert self.buffers is not None
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, had:have] = new
        self.keys, self.values = (buffer[:, :, :have] for buffer in self.buffers)
        return self.keys, self.values

    def _rebuild(self, keys: torch.Tensor, values: torch.Tensor, had: int, room: int) -> None:
        buffers = [new.new_empty(*new.shape[:2], room, new.shape[3]) for new in (keys, values)]
        if had:
            buffers[0][:, :, :had], buffers[1][:, :, :had] = self.keys, self.values
        self.buffers = (buffers[0], buffers[1])

    def begin(self, keys: torch.Tensor, values: torch.Tensor, rows: int, length: int) -> None:
        """Let each of `rows` rows begin with these keys and values `[1, H, T, D]`, and count `length` tokens: what
        stands behind the beginning is zero until it is filled."""
        self.lazy_initialization(keys, values)
        new = [part.new_empty(rows, part.shape[1], max(self.room, length), part.shape[3]) for part in (keys, values)]
        for buffer, part in zip(new, (keys, values), strict=True):
            buffer[:, :, : part.shape[2]] = part
            buffer[:, :, part.shape[2] : length] = 0  # a masked value is multiplied by 0, and must be finite
        self.buffers = (new[0], new[1])
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def rows(self, chosen: slice, length: int) -> GrowingLayer:
        """Some rows, up to a token, as a layer of their own: what is written there stands in this layer's buffer."""
        assert self.buffers is not None
        part = GrowingLayer(self.room)
        part.lazy_initialization(self.keys, self.values)
        part.buffers = (self.buffers[0][chosen], self.buffers[1][chosen])
        part.keys, part.values = (buffer[:, :, :length] for buffer in part.buffers)
        return part

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.buffers is not None:
            have = self.keys.shape[-2]
            self.buffers = (self.buffers[0][indices], self.buffers[1][indices])
            self.keys, self.values = (buffer[:, :, :have] for buffer in self.buffers)


def is_filled(cache: DynamicCache) -> bool:
    """Whether a model has written anything into the cache."""
    flags = ("is_conv_states_initialized", "is_recurrent_states_initialized")
    return any(
        (getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None)
        or any(any(_values(getattr(layer, flag, ()))) for flag in flags)
        for layer in cache.layers
    )


def _values(flags: Any) -> Iterable[Any]:
    return flags.values() if isinstance(flags, dict) else flags if isinstance(flags, list | tuple) else (flags,)


def selects(cache: DynamicCache) -> bool:
    """Whether rows can be dropped from, or repeated in, every layer of the cache."""
    return all(hasattr(layer, "batch_select_indices") for layer in cache.layers)
