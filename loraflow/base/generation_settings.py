"""Settings of a model's generation_config.json that `generate` must not apply here.

A checkpoint may ask for several answers, for stop strings, for suppressed tokens. Such a setting makes `generate` fail
without a tokenizer, return something else than ids, or change the logits: it says nothing about the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


# Arguments of `generate`, so that it returns the ids of one answer a row, whatever the file says.
ONE_ANSWER: dict[str, int | bool | None] = {
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "max_time": None,  # the machine's load would decide how long answers are
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


_FIRST = 8  # id of the first token of every continuation; the next ones follow it


def continuation(tokens: int) -> range:
    """Return the ids that every row continues with."""
    return range(_FIRST, _FIRST + tokens)


def forced_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, pad_id: int, tokens: int) -> Tensor:
    """Return the logits [tokens, rows, vocabulary] of the next tokens, in float32. All rows continue with `continuation`.

    They are the model's own: settings of its generation_config.json, such as suppressed tokens, do not apply.

    Args:
        ids: the prompts' ids [rows, width], padded on the left.
        mask: 0 where there is padding.
    """
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    found: list[Tensor] = []

    class Fixed(LogitsProcessor):
        """Note the logits, and let every row continue with the same tokens, so that rows are comparable."""

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            forced = torch.full_like(scores, -1e4)
            forced[:, _FIRST + len(found)] = 0
            found.append(scores.float().clone())
            return forced

    # not inference mode: a module may keep a tensor of it, which no later training step could save
    with plain_generation(model), torch.no_grad():
        model.generate(  # type: ignore[operator]  # hidden by __getattr__ of nn.Module
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            logits_processor=LogitsProcessorList([Fixed()]),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            pad_token_id=pad_id,
        )
    return torch.stack(found)
