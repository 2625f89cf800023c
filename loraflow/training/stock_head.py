"""Make trl's loss that of the model: trl computes it from the head's weight, which not all logits follow from."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from trl.trainer.utils import FusedCausalLMOutput

from loraflow.base.architecture import is_tested, scales_logits_unknown_to_trl
from loraflow.data.token_labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class _Outputs(Protocol):
    """The outputs of a causal model."""

    logits: Tensor  # [rows, tokens, vocabulary]


_TOLERANCE = 0.01  # nats of a token
_ROUNDING = 0.1  # the same, of logits in 16 bits


def use_own_logits_where_trl_is_wrong(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    """Compare the log probabilities of trl's head with those of the model, and replace trl's if they differ.

    Some models scale or cap their logits, or transform the state before the head, in ways that trl does not know.

    Args:
        model: transformers' model after trl has patched it (`add_fused_lm_head`). Changed in place.
        compute_dtype: the dtype of matrix products.

    Returns:
        whether trl's were replaced. The model's own logits take more memory.
    """
    if is_tested(model.config) or not (scales_logits_unknown_to_trl(model.config) or _differs(model, compute_dtype)):
        return False
    log.info("The loss is computed from the model's own logits: trl's head computes others for this architecture.")
    fused = model.forward
    model.forward = types.MethodType(_with_own_logits(fused), model)
    return True


def _differs(model: PreTrainedModel, compute_dtype: torch.dtype) -> bool:
    ids = torch.arange(12, device=model.device)[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, compute_dtype, enabled=model.dtype != compute_dtype):
            expected = _log_probs(model(input_ids=ids, use_cache=False).logits, ids[:, 1:])[0]
            try:
                found = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
            except (AttributeError, TypeError, IndexError, RuntimeError) as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                log.info("trl's head does not fit this architecture: %s", error)
                return True
    finally:
        model.train(was_training)
    tolerance = _TOLERANCE if compute_dtype == torch.float32 else _ROUNDING
    return not bool((found - expected).abs().max() <= tolerance)


def _log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of labels, 0 where they are ignored, and those of all tokens; in float32."""
    everything = torch.log_softmax(logits[:, :-1].float(), -1)
    mask = labels != IGNORED
    chosen = everything.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.masked_fill(~mask, 0), everything


def _with_own_logits(fused: Callable[..., _Outputs]) -> Callable[..., object]:
    @functools.wraps(fused)
    def forward(
        self: PreTrainedModel,
        *args: Tensor,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Tensor,
    ) -> object:
        if not fused_lm_head or labels is None:
            return fused(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        items = kwargs.pop("num_items_in_batch", None)
        outputs = fused(*args, **kwargs)
        targets = labels[:, 1:]
        mask = targets != IGNORED
        chosen, everything = _log_probs(outputs.logits, targets)
        with torch.no_grad():
            entropy = -(everything.exp() * everything).sum(-1).masked_fill(~mask, 0)
            top = (everything.argmax(-1) == targets) & mask
        return FusedCausalLMOutput(
            loss=-chosen.sum() / (mask.sum().clamp(min=1) if items is None else items),
            log_probs=chosen,
            entropy=entropy,
            is_top1=top,
            label_mask=mask,
            aux_loss=getattr(outputs, "aux_loss", None),
        )

    return forward
