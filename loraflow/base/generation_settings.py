"""Settings of a model's generation_config.json that `generate` must not apply here.

A checkpoint may ask for several answers, for stop strings, for suppressed tokens. Such a setting makes `generate` fail
without a tokenizer, return something else than ids, or change the logits: it says nothing about the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Arguments of `generate`, so that it returns the ids of one answer a row, whatever the file says.
ONE_ANSWER: dict[str, int | bool | None] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "stop_strings": None,  # needs the tokenizer
    "token_healing": False,  # needs the tokenizer, and changes the prompt
    "prompt_lookup_num_tokens": None,  # takes one row at a time; the answers are the same
    "penalty_alpha": None,  # decoding methods that transformers downloads
    "dola_layers": None,
}


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Let `generate` use the model alone: no setting of generation_config.json applies, except whether it has a cache.

    `generate` fills what its arguments leave open from the model's settings, so these are replaced meanwhile.

    Args:
        model: a model of transformers, without a wrapper.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(use_cache=own.use_cache)
    try:
        yield
    finally:
        model.generation_config = own


def forget_earlier_prompts(model: PreTrainedModel) -> None:
    """Reset what a model keeps in its modules between two calls of `generate`.

    RecurrentGemma's convolutions keep their last inputs there, not in the cache. A prompt of one token looks like the next
    token of an answer to them, so it would continue from the prompt before it.
    """
    for module in model.modules():
        if getattr(module, "conv1d_state", None) is not None:
            module.conv1d_state = None  # type: ignore[assignment]  # a buffer by its class, but a plain attribute there
