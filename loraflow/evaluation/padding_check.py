"""Whether padding changes a model's answers: before a prompt, its prompts cannot share a batch; behind a prefix that all
prompts share, that prefix cannot be computed once for all.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from loraflow.base.architecture import is_tested
from loraflow.base.forced_logits import forced_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)
_LENGTHS = (5, 14)  # tokens of two prompts
_PREFIX = 6  # tokens that both share
_NEW = 3  # tokens of their answers
_TOLERANCE = {"float32": 1e-3}  # share of the logits' norm; layers with a state that reads padding change by far more
_ROUNDING = 0.1  # the same in 16 bits, where experts may change


def batches_are_exact(model: PreTrainedModel, pad_id: int) -> bool:
    """Compare a prompt's logits in a padded batch with those of the prompt alone, for untested architectures.

    Some layers with a state, and some with an index of earlier tokens, ignore the mask and read the padding.

    Args:
        model: the model, in evaluation mode.
        pad_id: the token id of the padding.
    """
    return is_tested(model.config) or _is_exact(model, pad_id, 0, "Answers are generated one at a time")


def prefix_is_exact(model: PreTrainedModel, pad_id: int) -> bool:
    """Compare the same with padding between a shared prefix and the rest of a prompt, for untested architectures.

    MPT's bias for distances counts the padding: the prefix would be farther away.
    """
    return is_tested(model.config) or _is_exact(model, pad_id, _PREFIX, "Prompts are computed without a shared prefix")


def _is_exact(model: PreTrainedModel, pad_id: int, prefix: int, otherwise: str) -> bool:
    """Compare a prompt's logits in a padded batch with those of the prompt alone.

    Args:
        model: the model, in evaluation mode.
        pad_id: the token id of the padding.
        prefix: tokens that the prompts share, before the padding.
        otherwise: what is logged if they differ.
    """
    import torch

    # A stand-in that samples would draw other tokens in both passes.
    get_base_model = getattr(model, "get_base_model", None)
    model = model if get_base_model is None else get_base_model()
    size = model.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, size, (length,), generator=draw) for length in _LENGTHS]
    shared = torch.randint(0, size, (prefix,), generator=draw)
    width = prefix + max(_LENGTHS)
    ids = torch.full((2, width), pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        for part, at in ((shared, 0), (prompt, width - len(prompt))):
            ids[row, at : at + len(part)], mask[row, at : at + len(part)] = part, 1
    try:
        together = forced_logits(model, ids, mask, pad_id, _NEW)[:, 0]
    except (RuntimeError, IndexError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        log.warning("%s: this architecture takes no batch: %s", otherwise, error)
        return False
    first = torch.cat([shared, prompts[0]])[None]
    alone = forced_logits(model, first, torch.ones_like(first), pad_id, _NEW)[:, 0]
    difference = float(((together - alone).norm(dim=-1) / alone.norm(dim=-1)).max())
    if difference <= _TOLERANCE.get(str(model.dtype).removeprefix("torch."), _ROUNDING):
        return True
    log.warning(
        "%s: padding changes the logits of architecture %s by %.2g of their norm.",
        otherwise,
        model.config.model_type,
        difference,
    )
    return False
