"""Greedy decoding on a GPU: the decoding step of a batch is captured once as a CUDA graph and replayed for every token.

Launching a step's thousand small kernels takes longer than computing them: 30 ms against 7 for 8 rows of Phi-3 mini on
an H100. A compiled static cache of transformers is as fast, but compiles for a minute, again for each shape.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast

log = logging.getLogger(__name__)


class PreallocatedLayer(DynamicLayer):
    """A layer's keys and values [rows, heads, tokens, width], written in place, with memory for the whole answer.

    transformers' DynamicCache copies all keys and values for each token. On a CPU, that took two fifths of an evaluation (36
    rows of 185 tokens are 300 MB).

    `keys` and `values` are views of the tokens so far; `capacity` is the largest number of tokens.
    """

    is_initialized: bool

    def __init__(self, capacity: int):
        super().__init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Tensor, **kwargs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Append new tokens; return all keys and values."""
        cached_tokens = self.get_seq_length()
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self._keys, self._values = self._allocate(key_states), self._allocate(value_states)
        filled = cached_tokens + key_states.shape[-2]
        if filled > self.capacity:
            raise ValueError(f"{filled} tokens in a cache for {self.capacity}")
        self._keys[..., cached_tokens:filled, :], self._values[..., cached_tokens:filled, :] = key_states, value_states
        keys, values = self._keys[..., :filled, :], self._values[..., :filled, :]
        self.keys, self.values = keys, values
        return keys, values

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [rows, heads, capacity, width], zero behind the tokens so far."""
        cached_tokens = self.get_seq_length()
        self._keys[..., cached_tokens:, :].zero_()
        self._values[..., cached_tokens:, :].zero_()
        return self._keys, self._values

    def _allocate(self, like: Tensor) -> Tensor:
        rows, heads, _, width = like.shape
        return like.new_empty((rows, heads, self.capacity, width))


def preallocated_cache(layers: int, capacity: int) -> DynamicCache:
    """Return an empty cache with memory for `capacity` tokens per row in each layer."""
    cache = DynamicCache()
    cache.layers = [PreallocatedLayer(capacity) for _ in range(layers)]
    return cache


EAGER_STEPS = 2  # before the capture: libraries may allocate memory in them, but not while a graph is captured
# The capacity of a cache is a multiple of it. Otherwise attention with a mask copies the mask in every layer.
ALIGNED = 16
CHECK_EVERY = 16  # steps between two checks whether all rows have ended: a check waits for the GPU
# Fields of a generation config that do not change a greedy answer, or that the arguments set anyway.
_HARMLESS = {
    "bos_token_id", "decoder_start_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "min_p",
    "pad_token_id", "temperature", "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
    "_from_model_config",
}  # fmt: skip


def is_supported(model: PreTrainedModel) -> bool:
    """Tell whether `decode` gives the model's own greedy answers: it runs on a GPU, and nothing changes its logits."""
    return (
        model.device.type == "cuda"
        and model.config._attn_implementation == "sdpa"
        and "logits_to_keep" in inspect.signature(model.forward).parameters
        and set(model.generation_config.to_diff_dict()) <= _HARMLESS
    )


class _FixedLayer(DynamicLayer):
    """Keys and values of fixed shape [rows, heads, capacity, width]; `slot` [1] is the index of the next token."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor):
        super().__init__()  # type: ignore[no-untyped-call]  # transformers does not annotate it
        self._keys, self._values = keys, values
        self.keys, self.values = keys, values
        self.slot, self.is_initialized = slot, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: torch.Tensor, **kwargs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a token at the slot; return the whole capacity: the mask hides what is not filled yet."""
        self._keys.index_copy_(2, self.slot, key_states)
        self._values.index_copy_(2, self.slot, value_states)
        return self._keys, self._values


class _Answers:
    """The answers so far of a batch: ids [rows, max_new_tokens], pads behind a row's stop id."""

    def __init__(self, rows: int, max_new_tokens: int, stop_ids: list[int], pad_id: int, device: torch.device):
        self.ids = torch.full((rows, max_new_tokens), pad_id, device=device)
        self.ended = torch.zeros((rows, 1), dtype=torch.bool, device=device)
        self._stops, self._pad_id = torch.tensor(stop_ids, device=device), pad_id

    def choose(self, output: CausalLMOutputWithPast) -> torch.Tensor:
        """Return the next token [rows, 1] of each row, and note which rows end with it."""
        assert output.logits is not None
        chosen = output.logits[:, -1:].argmax(-1).masked_fill(self.ended, self._pad_id)
        self.ended.logical_or_(torch.isin(chosen, self._stops))
        return chosen


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache,
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    pad_id: int,
) -> torch.Tensor:
    """Return the answers' ids [rows, max_new_tokens]; pads follow a row's stop id.

    Args:
        model: a model for which `is_supported` holds.
        ids: prompts [rows, width], padded on the left.
        mask: 1 where an id counts.
        cache: `PreallocatedLayer`s with a capacity of at least `width + max_new_tokens`, best a multiple of ALIGNED.
            It may already hold the first tokens of each row.
    """
    answers = _Answers(len(ids), max_new_tokens, stop_ids, pad_id, ids.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    token = _prefill(model, ids, mask, positions, cache, answers)
    answers.ids[:, :1] = token
    step = _decoding_step(model, token, mask, positions[:, -1:] + 1, cache, answers)
    _repeat(step, max_new_tokens - 1, answers)
    return answers.ids


def _prefill(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: DynamicCache,
    answers: _Answers,
) -> torch.Tensor:
    """Compute the prompts, except for tokens that the cache already holds; return the first token of each answer."""
    cached_tokens = int(cache.get_seq_length())
    output = model(
        input_ids=ids[:, cached_tokens:],
        attention_mask=mask,
        position_ids=positions[:, cached_tokens:],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return answers.choose(output)


def _decoding_step(
    model: PreTrainedModel,
    token: torch.Tensor,
    mask: torch.Tensor,
    position: torch.Tensor,
    cache: DynamicCache,
    answers: _Answers,
) -> Callable[[], None]:
    """Return a function that computes the next token of each row.

    A captured CUDA graph reads and writes tensors at their addresses. So the step changes its tensors only in place.
    """
    rows, width = mask.shape
    slot = torch.tensor([width], device=mask.device)
    layers = _preallocated_layers(cache)
    fixed = DynamicCache()
    fixed.layers = [_FixedLayer(*layer.padded(), slot) for layer in layers]
    shape = (rows, 1, 1, layers[0].capacity)
    attention_bias = torch.full(shape, float("-inf"), dtype=model.dtype, device=mask.device)
    attention_bias[:, 0, 0, :width].masked_fill_(mask.bool(), 0)

    def step() -> None:
        attention_bias.index_fill_(-1, slot, 0)
        output = model(
            input_ids=token, attention_mask=attention_bias, position_ids=position, past_key_values=fixed, use_cache=True
        )
        token.copy_(answers.choose(output))
        slot.add_(1)
        position.add_(1)
        answers.ids.index_copy_(1, slot - width, token)

    return step


def _preallocated_layers(cache: DynamicCache) -> list[PreallocatedLayer]:
    layers = [layer for layer in cache.layers if isinstance(layer, PreallocatedLayer)]
    if len(layers) != len(cache.layers):
        raise ValueError("decoding needs a preallocated cache")
    return layers


def _repeat(step: Callable[[], None], times: int, answers: _Answers) -> None:
    """Run a step until all rows have ended, at most so many times. On a GPU, capture it and replay it."""
    run = step
    for done in range(1, times + 1):
        if done % CHECK_EVERY == 0 and bool(answers.ended.all()):
            break
        if done == 1 + EAGER_STEPS:
            run = capture_cuda_graph(step) if answers.ids.is_cuda else step
        run()


def capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Capture a step that uses the same tensors each time, and return its replay; return the step itself on failure."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):  # captures the kernels without running them
            step()
    except RuntimeError as error:
        log.warning(
            "a CUDA graph of this model cannot be captured, so decoding is slower: %s", str(error).splitlines()[0]
        )
        torch.cuda.synchronize()
        return step
    replay: Callable[[], None] = graph.replay
    return replay
