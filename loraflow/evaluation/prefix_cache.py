"""Divide rows into batches, and share what they have in common.

Prefix sharing: the keys and values of the prefix that all prompts share are computed once, and used in every batch. Padding
is between the prefix and the rest of a row. The attention mask hides it, and positions count only what is not hidden, so
that each token has the position that it has without padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraflow.base.load import sees_all_before
from loraflow.base.longrope import Side, longrope_modules
from loraflow.data.tokens.packing import common_prefix_length
from loraflow.data.tokens.positions import Positions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache, PreTrainedModel


# Below these, a forward pass for the prefix and a copy of its keys for each batch cost more than they save.
MIN_TOKENS = 16
MIN_ROWS = 4
# The rotary angles of these depend on the number of tokens read at once, which a cache changes.
_ROPE_BY_LENGTH = ("dynamic", "longrope")


class SharedPrefix:
    """The ids that all rows begin with, and a model's keys and values for them."""

    def __init__(self, ids: list[int], layers: list[tuple[Tensor, Tensor]]):
        self.ids = ids
        self.layers = layers

    def cache(self, rows: int, capacity: int) -> DynamicCache:
        """Return a new cache that holds the prefix in each of `rows` rows, with memory for `capacity` tokens per row."""
        from loraflow.evaluation.greedy_decoding import preallocated_cache

        cache = preallocated_cache(len(self.layers), capacity)
        for index, (keys, values) in enumerate(self.layers):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache


def shared_prefix(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], longest: int, length: int, side: Side = "unchanged"
) -> SharedPrefix | None:
    """Compute the common prefix of all rows once; return None if sharing it would save nothing, or change results.

    Sharing is exact only if a model's cache consists of the keys and values of every position: no recurrent state, no
    rotary angles that depend on the sequence length, no attention window shorter than a row.

    Args:
        longest: the largest number of ids to share.
        length: positions of the longest row, with its padding and its answer.
        side: whether a longrope model's angles are fixed (`fixed_angles`).
    """
    import torch
    from transformers import DynamicCache

    shared = common_prefix_length(rows, longest)
    if len(rows) < MIN_ROWS or shared < MIN_TOKENS or not has_plain_cache(model, length, side):
        return None
    ids = [int(i) for i in rows[0][:shared]]
    cache = DynamicCache()
    with torch.inference_mode():
        model.get_decoder()(
            input_ids=torch.tensor([ids], device=model.device),
            attention_mask=torch.ones((1, shared), dtype=torch.long, device=model.device),
            past_key_values=cache,
            use_cache=True,
        )
    layers = [
        (keys, values)
        for keys, values in ((getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers)
        if keys is not None and keys.shape[-2] == shared and values is not None
    ]
    # Fewer if a layer caches something else, or not every position.
    return SharedPrefix(ids, layers) if len(layers) == len(cache.layers) == model.config.num_hidden_layers else None


def innermost(model: PreTrainedModel) -> PreTrainedModel:
    """Return transformers' model: peft's wrapper, and one that samples, hide the arguments of its forward pass."""
    get_base_model = getattr(model, "get_base_model", None)
    base: PreTrainedModel = model if get_base_model is None else get_base_model()
    return base


def has_plain_cache(model: PreTrainedModel, length: int, side: Side = "unchanged") -> bool:
    """Tell whether a model's cache is the keys and values of every position and nothing else, in rows of this length."""
    generation = model.generation_config
    if generation.cache_implementation is not None or generation.use_cache is False:
        return False
    if getattr(getattr(model, "active_peft_config", None), "alora_invocation_tokens", None):
        return False  # peft looks for them in the whole prompt, at each call
    if hasattr(model.config, "decoder_layers"):  # a decoder of an encoder-decoder: num_hidden_layers are the encoder's
        return False
    rope = getattr(model.config, "rope_parameters", None) or getattr(model.config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return (
        "past_key_values" in inspect.signature(innermost(model).forward).parameters  # not in OpenAI's first GPT
        and sees_all_before(model, length)
        and (kind not in _ROPE_BY_LENGTH or (kind == "longrope" and side != "unchanged"))
        and getattr(model.config, "_attn_implementation", None) in ("sdpa", "eager")
    )


@dataclass(frozen=True)
class RowGroup:
    """Rows that can share a batch."""

    rows: tuple[int, ...]  # indices, longest first
    batch_size: int
    side: Side = "unchanged"
    switch: int = 0

    def batches(self) -> Iterator[list[int]]:
        """Yield the indices of each batch's rows."""
        for first in range(0, len(self.rows), self.batch_size):
            yield list(self.rows[first : first + self.batch_size])


def group_rows(
    lengths: Sequence[int], batch_size: int, switch: int | None = None, new_tokens: int = 0, *, fixable: bool = True
) -> list[RowGroup]:
    """Return the rows in groups, longest rows first, so that little is padded.

    A LongRoPE model has other angles for rows that are longer than its switch, and transformers chooses them for a whole
    batch. So a batch has rows of one side only. An answer that passes the switch is generated in a batch of its own, as
    transformers does it: when the row passes the switch, all of it is computed again with the angles of long rows.

    Args:
        lengths: tokens of each row.
        switch: longer rows have other angles; None for models without one.
        fixable: the model's angles are computed by transformers' own code, so that they can be fixed.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if switch is None:
        return [RowGroup(tuple(order), batch_size)] if order else []
    above = tuple(i for i in order if lengths[i] > switch)
    below = tuple(i for i in order if lengths[i] + new_tokens <= switch)
    passing = tuple(i for i in order if lengths[i] <= switch < lengths[i] + new_tokens)
    groups = [
        RowGroup(above, batch_size if fixable else 1, "long" if fixable else "unchanged", switch),
        RowGroup(passing, 1, "unchanged", switch),
        RowGroup(below, batch_size, "short" if fixable else "unchanged", switch),
    ]
    return [group for group in groups if group.rows]


def groups_of(model: PreTrainedModel, lengths: Sequence[int], batch_size: int, new_tokens: int = 0) -> list[RowGroup]:
    """Return the rows of a model in groups; see `group_rows`."""
    switch = Positions.of(model.config.to_dict()).switch
    return group_rows(lengths, batch_size, switch, new_tokens, fixable=bool(longrope_modules(model)))
