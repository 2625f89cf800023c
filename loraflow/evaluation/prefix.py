"""What all prompts of a set begin with, computed once: its keys and values, from which every batch goes on.

Padding then stands between the prefix and the rest of a row, where the attention mask hides it; positions count what
is not hidden, so that each token has the one that it has without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loraflow.base.load import sees_all_before
from loraflow.data.common_prefix import common_prefix_length

# An own forward pass for the prefix, and a copy of its keys for each batch, have to pay.
MIN_TOKENS = 16
MIN_ROWS = 4
# Their angles depend on the length of what is read, which is another one behind a cache.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class SharedPrefix:
    """Ids that all rows begin with, and a model's keys and values for them."""

    def __init__(self, ids: list[int], layers: list[tuple[Any, Any]]):
        self.ids = ids
        self.layers = layers

    def cache(self, rows: int, room: int) -> Any:
        """Return a fresh cache that holds the prefix for that many rows, with room for so many tokens in each."""
        from loraflow.evaluation.kv_cache import roomy_cache

        cache = roomy_cache(len(self.layers), room)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache


def shared_prefix(model: Any, rows: Sequence[Sequence[int]], longest: int, places: int) -> SharedPrefix | None:
    """Return what all rows begin with, at most `longest` ids of it; None where it would not pay, or not be exact.

    It is exact for models whose cache is keys and values of every position and nothing else: no recurrent state, no
    angles that depend on the length, no window shorter than the most `places` a row takes, padding and answer included.
    """
    import torch
    from transformers import DynamicCache

    length = common_prefix_length(rows, longest)
    if len(rows) < MIN_ROWS or length < MIN_TOKENS or not plain_cache(model, places):
        return None
    ids = [int(i) for i in rows[0][:length]]
    cache = DynamicCache()
    with torch.inference_mode():
        model.get_decoder()(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=torch.ones((1, length), dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    whole = len(layers) == model.config.num_hidden_layers
    if not whole or any(keys is None or keys.shape[-2] != length for keys, _ in layers):
        return None
    return SharedPrefix(ids, layers)


def plain_cache(model: Any, places: int) -> bool:
    """Tell whether a model's cache is keys and values of every position and nothing else, for rows of so many places."""
    generation = model.generation_config
    if generation.cache_implementation is not None or generation.use_cache is False:
        return False
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    return (
        sees_all_before(model, places)
        and rope.get("rope_type", rope.get("type", "default")) not in _ROPE_BY_LENGTH
        and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
    )
