"""Keys and values with room for a whole answer: transformers' own cache copies all of them for every new token.

On a CPU that copying took two fifths of an evaluation (36 rows of 185 tokens are 300 MB, each token anew).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):
    """A layer's keys and values [rows, heads, tokens, width], written in place; `keys` and `values` are what is filled."""

    is_initialized: bool

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Put new tokens behind the others; return all keys and values."""
        held = self.get_seq_length()
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._keys, self._values = self._allocate(key_states), self._allocate(value_states)
        filled = held + key_states.shape[-2]
        if filled > self.room:
            raise ValueError(f"{filled} tokens in a cache for {self.room}")
        self._keys[..., held:filled, :], self._values[..., held:filled, :] = key_states, value_states
        self.keys, self.values = self._keys[..., :filled, :], self._values[..., :filled, :]
        return self.keys, self.values

    def whole(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, heads, room, width], zero where nothing is filled in yet."""
        held = self.get_seq_length()
        self._keys[..., held:, :].zero_()
        self._values[..., held:, :].zero_()
        return self._keys, self._values

    def _allocate(self, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        return like.new_empty((rows, heads, self.room, width))


def roomy_cache(layers: int, room: int) -> Any:
    """Return an empty cache of so many layers with room for so many tokens a row."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer(room) for _ in range(layers)]
    return cache
