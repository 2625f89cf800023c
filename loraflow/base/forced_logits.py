"""The logits that `generate` of transformers computes, for a continuation that is fixed beforehand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraflow.base.generation_settings import plain_generation

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_FIRST = 8  # id of the first token of every continuation; the next ones follow it


def continuation(tokens: int) -> range:
    """Return the ids that every row continues with."""
    return range(_FIRST, _FIRST + tokens)


def forced_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, pad_id: int, tokens: int) -> Tensor:
    """Return the logits [tokens, rows, vocabulary] of the next tokens, in float32. All rows continue with `continuation`.

    They are the model's own: settings of its generation_config.json, such as suppressed tokens, do not apply.

    Args:
        model: in evaluation mode.
        ids: the prompts' ids [rows, width], padded on the left.
        mask: 0 where there is padding.
        pad_id: the token id of the padding.
        tokens: how many are generated.
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
