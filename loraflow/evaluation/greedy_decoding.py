"""Greedy decoding on a GPU: one step of a batch, recorded once as a CUDA graph, replayed for every token.

Launching a step's thousand small kernels takes longer than computing them: 30 ms against 7 for 8 rows of Phi-3 mini on
an H100. transformers' own way, a compiled static cache, is as fast, but compiles for a minute, anew for each shape.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from loraflow.evaluation.kv_cache import RoomyLayer

log = logging.getLogger(__name__)

EAGER_STEPS = 2  # before recording: they let libraries allocate what a recording may not
ALIGNED = 16  # places: attention with a mask copies it for every layer otherwise
LOOK_EVERY = 16  # steps between two looks at whether all rows have ended: a look waits for the GPU
# What a generation config may say without changing a greedy answer, or that the arguments say anyway.
_HARMLESS = {
    "bos_token_id", "decoder_start_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "min_p",
    "pad_token_id", "temperature", "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
    "_from_model_config",
}  # fmt: skip


def decodes(model: Any) -> bool:
    """Tell whether `greedy` gives this model's answers: on a GPU, with nothing in the way of the best token."""
    return (
        model.device.type == "cuda"
        and model.config._attn_implementation == "sdpa"
        and "logits_to_keep" in inspect.signature(model.forward).parameters
        and set(model.generation_config.to_diff_dict()) <= _HARMLESS
    )


class StepLayer(DynamicLayer):
    """Keys and values of fixed shape [rows, heads, room, width]; the next token's go to `place`, a tensor of one."""

    def __init__(self, filled: RoomyLayer, place: torch.Tensor):
        super().__init__()
        self.keys, self.values = filled.whole()
        self.place, self.is_initialized = place, True

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Put a token at its place; return all places, those not filled yet too: the mask hides them."""
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values


@torch.inference_mode()
def greedy(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    *,
    stop_ids: list[int],
    max_new_tokens: int,
    pad_id: int,
) -> torch.Tensor:
    """Return the answers' ids [rows, up to max_new_tokens]; behind a row's stop id there are pads.

    Args:
        ids: prompts [rows, width], padded on the left.
        mask: 1 where an id counts.
        cache: of `RoomyLayer`s with room for `width + max_new_tokens`, best a multiple of ALIGNED; it may hold what the
            rows begin with.
    """
    rows, width = ids.shape
    held, room = int(cache.get_seq_length()), cache.layers[0].room
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    said = torch.full((rows, max_new_tokens), pad_id, device=ids.device)
    stops = torch.tensor(stop_ids, device=ids.device)
    ended = torch.zeros((rows, 1), dtype=torch.bool, device=ids.device)

    def best(out: Any) -> torch.Tensor:
        chosen = out.logits[:, -1:].argmax(-1).masked_fill(ended, pad_id)
        ended.logical_or_(torch.isin(chosen, stops))
        return chosen

    out = model(
        input_ids=ids[:, held:], attention_mask=mask, position_ids=positions[:, held:], past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    token = best(out)
    said[:, :1] = token
    place = torch.tensor([width], device=ids.device)
    steps = DynamicCache()
    steps.layers = [StepLayer(layer, place) for layer in cache.layers]
    position = positions[:, -1:] + 1
    hidden = torch.full((rows, 1, 1, room), float("-inf"), dtype=model.dtype, device=ids.device)
    hidden[:, 0, 0, :width].masked_fill_(mask.bool(), 0)

    def step() -> None:
        hidden.index_fill_(-1, place, 0)
        out = model(
            input_ids=token, attention_mask=hidden, position_ids=position, past_key_values=steps, use_cache=True
        )
        token.copy_(best(out))
        place.add_(1)
        position.add_(1)
        said.index_copy_(1, place - width, token)

    run = step
    for done in range(1, max_new_tokens):
        if done % LOOK_EVERY == 0 and bool(ended.all()):
            break
        if done == 1 + EAGER_STEPS:
            run = recorded(step) if ids.is_cuda else step
        run()
    return said


def recorded(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step that reads and writes the same tensors each time; what cannot be recorded is returned as it is."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):  # records, computes nothing
            step()
    except RuntimeError as error:
        log.warning("decoding goes on step by step, this model's cannot be recorded: %s", str(error).splitlines()[0])
        torch.cuda.synchronize()
        return step
    return graph.replay
