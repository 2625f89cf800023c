"""Check, with the loaded weights, that transformers generates answers with a model, from the logits that are trained.

Some decoders of encoder-decoders cannot generate with a cache, and some models count positions differently then. Their
training would succeed, and each answer would be wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from loraflow.adapters.targets import has_experts
from loraflow.base.architecture import is_tested
from loraflow.base.forced_logits import continuation, forced_logits
from loraflow.failures import BadModel, Failure

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NO_ROW = "transformers fails to compute a row of tokens with this model."
_NO_ANSWER = "transformers fails to generate with this model, so it could not be evaluated."
_PROMPT = 14  # tokens; a prime number with the new ones, because some kernels compute whole blocks only
_NEW = 4
_ROUNDING = 0.01  # share of the logits' norm; states of recurrent layers are computed in blocks and in steps
_ROUNDING_16_BITS = 0.1  # a cache and a whole row are computed by different kernels, and experts may change


def refuse_other_generation(model: PreTrainedModel, pad_id: int, *, compute_dtype: torch.dtype) -> None:
    """Generate a few fixed tokens. Their logits must be those of the whole row, which training computes.

    Args:
        model: the base as it is trained, on its device.
        pad_id: the token id of the padding.
        compute_dtype: the dtype of matrix products.

    Raises:
        BadModel: the model does not generate, cannot compute the row, or computes other logits.
    """
    size = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    row = torch.cat([prompt, torch.tensor([list(continuation(_NEW - 1))])], dim=1)
    was_training = model.training
    model.eval()
    try:
        with _precision(model, compute_dtype):
            ids = row.to(model.device)
            with torch.no_grad(), errors_as_refusal(model, NO_ROW, "rows of any length"):
                logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            trained = logits[0, -_NEW:].float()
            with errors_as_refusal(model, _NO_ANSWER, "a model that generates text"):
                generated = forced_logits(model, prompt, torch.ones_like(prompt), pad_id, _NEW)[:, 0]
    finally:
        model.train(was_training)
    differences = (generated - trained).norm(dim=-1) / trained.norm(dim=-1)
    # Rounding may give a single token another expert.
    difference = float(differences.median() if has_experts(model.config) else differences.max())
    allowed = _ROUNDING if compute_dtype == torch.float32 else _ROUNDING_16_BITS
    if not difference <= allowed:  # NaN is refused too
        raise BadModel(
            "This model generates with other logits than those that training computes, so it would not answer as trained.",
            where="base.model",
            expected="logits of a generated token that are those of the whole row",
            got=f"architecture {model.config.model_type}: they differ by {difference:.2g} of their norm",
            next_step="choose another base, or another version of transformers",
        )


@contextlib.contextmanager
def errors_as_refusal(model: PreTrainedModel, what: str, expected: str) -> Iterator[None]:
    """Refuse a model whose own code fails, in any way; errors of the device and of tested architectures pass.

    Args:
        model: whose code runs.
        what: the sentence of the refusal.
        expected: what a model for this must be able to do.

    Raises:
        BadModel: the model's code failed.
    """
    try:
        yield
    except Exception as error:  # code of an architecture may fail in any way
        if is_tested(model.config) or not _is_of_the_model(error):
            raise
        raise BadModel(
            what,
            where="base.model",
            expected=expected,
            got=f"architecture {model.config.model_type}: {type(error).__name__}: {error}".splitlines()[0][:300],
            next_step="choose another base, or another version of transformers",
        ) from error


def _is_of_the_model(error: Exception) -> bool:
    if isinstance(error, MemoryError | OSError | torch.OutOfMemoryError | torch.AcceleratorError | Failure):
        return False
    text = str(error).lower()
    return "can't allocate memory" not in text and "cuda error" not in text


def _precision(model: PreTrainedModel, compute_dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    if model.dtype == compute_dtype:
        return contextlib.nullcontext()
    return torch.autocast(model.device.type, compute_dtype)
