"""Logits of models on the same texts, in fp32, and how much they differ."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.config import Runtime

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from loraflow.adapters.nf4 import Nf4

MAX_TOKENS = 512  # tokens of a chat; the rest is not compared


@dataclass(frozen=True)
class LogitsComparison:
    """How much two models' logits differ on the same texts."""

    max_logit_difference: float
    mean_kl: float  # nats per token
    max_kl: float
    same_best_token: float  # share of tokens
    tokens: int


def trained_logits(
    base: Path, adapter: Path, nf4: Nf4 | None, batches: Sequence[torch.Tensor], runtime: Runtime, *, trust: bool
) -> list[torch.Tensor]:
    """Compute the logits of a base with its adapter, as it was trained.

    Args:
        nf4: how training quantized the base's weights; None if it did not.
        batches: token ids, [1, tokens] each.

    Returns:
        A tensor [tokens, vocabulary] in fp32 for each batch.
    """
    from peft import PeftModel

    from loraflow.base.load import load_model

    model = load_model(base, "float32", runtime, trust=trust)
    if nf4 is not None:
        nf4.apply(model)
    logits = _logits(PeftModel.from_pretrained(model, str(adapter)).eval(), batches)
    del model
    gc.collect()  # keep one model at a time: two of Phi-3 mini in fp32 need more memory than most hosts have
    return logits


def model_logits(folder: Path, batches: Sequence[torch.Tensor], runtime: Runtime, *, trust: bool) -> list[torch.Tensor]:
    """Compute the logits of a model in a folder: a tensor [tokens, vocabulary] in fp32 for each batch [1, tokens]."""
    from loraflow.base.load import load_model

    model = load_model(folder, "float32", runtime, trust=trust)
    logits = _logits(model, batches)
    del model
    gc.collect()
    return logits


def _logits(model: PreTrainedModel, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    with torch.inference_mode():
        return [model(input_ids=batch.to(model.device)).logits[0].float().cpu() for batch in batches]


def compare_logits(expected: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> LogitsComparison:
    """Compare logits [tokens, vocabulary] of the same texts. The KL divergence is that of `got` from `expected`."""
    import torch

    difference = max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True))
    divergences, agreements = [], []
    for a, b in zip(expected, got, strict=True):
        for some, other in zip(a.split(64), b.split(64), strict=True):  # in fp64, a few tokens at a time
            p, q = some.double().log_softmax(-1), other.double().log_softmax(-1)
            divergences.append((p.exp() * (p - q)).sum(-1))
        agreements.append(a.argmax(-1) == b.argmax(-1))
    kl, same = torch.cat(divergences), torch.cat(agreements)
    return LogitsComparison(
        max_logit_difference=round(difference, 6),
        mean_kl=round(float(kl.mean()), 9),
        max_kl=round(float(kl.max()), 9),
        same_best_token=round(float(same.float().mean()), 6),
        tokens=len(kl),
    )
