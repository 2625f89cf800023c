"""Check, with the loaded weights, that no token depends on later tokens, on padding, or on other documents of its row.

It also checks that transformers generates answers from the logits that are trained: some decoders of encoder-decoders
cannot generate with a cache, and some models count positions differently then. Each answer would be wrong.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from loraflow.adapters.targets import has_experts
from loraflow.base.architecture import is_tested
from loraflow.base.generation_settings import continuation, forced_logits
from loraflow.failures import BadModel, Failure, first_line
from loraflow.training.collation import concatenated, packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


log = logging.getLogger(__name__)

_Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
LENGTHS = (24, 40)  # tokens of the two documents
# Experts group the tokens of a batch, so that the shapes of their products, and the rounding, depend on all documents.
EXPERT_NOISE = 0.02
ROUNDING_16_BITS = 0.01
ROUNDING = 1e-3  # without experts, logits of earlier tokens have equal bits with most kernels


def refuse_leaking_documents(
    model: PreTrainedModel, pad_id: int, *, is_concatenated: bool, compute_dtype: torch.dtype
) -> None:
    """Compute two documents in one row, twice, with another first document. The second one's logits must be equal.

    Args:
        model: the base as it is trained, on its device.
        is_concatenated: the layout of training: concatenated documents with their borders, else packed rows.

    Raises:
        BadModel: the second document's logits depend on the first document.
    """
    size = model.config.get_text_config().vocab_size
    draw = np.random.default_rng(0)
    first, other = (draw.integers(0, size, LENGTHS[0]) for _ in range(2))
    second = draw.integers(0, size, LENGTHS[1])
    expected, found = (
        _logits(model, [ids, second], pad_id, is_concatenated, compute_dtype)[LENGTHS[0] :] for ids in (first, other)
    )
    if torch.equal(expected, found):
        return
    difference = float((found - expected).norm() / expected.norm())
    if difference <= EXPERT_NOISE and has_experts(model.config):
        log.info("documents in one row: logits differ by %.1e, as expected of experts' rounding", difference)
        return
    raise BadModel(
        "Documents that share a row influence each other in this model.",
        where="training_config.packing",
        expected="logits of a document that do not depend on the document before it",
        got=f"architecture {model.config.model_type}: logits change by {difference:.2g} of their norm",
        next_step="set training_config.packing to false"
        if not is_concatenated
        else "set runtime.engine to stock, and training_config.packing to false",
    )


def refuse_seeing_later_tokens(
    model: PreTrainedModel, pad_id: int, *, is_concatenated: bool, compute_dtype: torch.dtype
) -> None:
    """Compute a document twice, with another last token. The logits of the tokens before it must not change.

    In an encoder with a head for text, each token sees the answer that it has to predict: training learns nothing.

    Args:
        is_concatenated: the layout of training: concatenated documents with their borders, else padded rows.

    Raises:
        BadModel: they change by more than rounding.
    """
    size = model.config.get_text_config().vocab_size
    ids = np.random.default_rng(0).integers(0, size, sum(LENGTHS))
    other = np.concatenate([ids[:-1], [(ids[-1] + 1) % size]])
    expected, found = (
        _logits(model, [row], pad_id, is_concatenated, compute_dtype, packs=False)[:-1] for row in (ids, other)
    )
    difference, rounding = _difference(model, expected, found, compute_dtype)
    if difference > rounding:
        raise BadModel(
            "This model's attention is not causal: in training, each token would see the tokens that it must predict.",
            where="base.model",
            expected="logits of a token that do not depend on later tokens",
            got=f"architecture {model.config.model_type}: a token's logits change by {difference:.2g} of their norm",
            next_step="choose a model for text generation, not an encoder such as BERT",
        )


def refuse_padding_that_is_seen(model: PreTrainedModel, pad_id: int, *, compute_dtype: torch.dtype) -> None:
    """Compute a row twice, with more padding behind it and with less. The logits of the tokens before it must not change.

    CPM-Ant puts tokens of its own in front, and cuts their mask where the padding begins. Both grids have the same shape
    and a mask, so that the same kernels compute them.

    Args:
        model: the base as it is trained, on its device; its tokens do not see later ones.

    Raises:
        BadModel: they change by more than rounding.
    """
    size = model.config.get_text_config().vocab_size
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, size, (2, LENGTHS[1])))
    logits = []
    for length in (LENGTHS[0], LENGTHS[1] - 1):
        grid, mask = ids.clone(), torch.ones_like(ids)
        grid[0, length:], mask[0, length:] = pad_id, 0
        logits.append(_computed(model, {"input_ids": grid, "attention_mask": mask}, compute_dtype)[0, : LENGTHS[0]])
    expected, found = logits
    difference, rounding = _difference(model, expected, found, compute_dtype)
    if difference > rounding:
        raise BadModel(
            "Padding changes this model's logits, so the other rows of a batch would change how a row is trained.",
            where="base.model",
            expected="logits of a document that do not depend on the padding behind it",
            got=f"architecture {model.config.model_type}: a token's logits change by {difference:.2g} of their norm",
            next_step="choose another base",
        )


def _difference(
    model: PreTrainedModel, expected: Tensor, found: Tensor, compute_dtype: torch.dtype
) -> tuple[float, float]:
    """Return by how much of their norm a token's logits differ, and how much rounding alone may change them."""
    differences = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    if has_experts(model.config):
        # Rounding may give a single token another expert. In an encoder nearly all tokens change.
        return float(differences.median()), EXPERT_NOISE
    return float(differences.max()), ROUNDING if compute_dtype == torch.float32 else ROUNDING_16_BITS


def _logits(
    model: PreTrainedModel,
    documents: list[_Ids],
    pad_id: int,
    is_concatenated: bool,
    compute_dtype: torch.dtype,
    *,
    packs: bool = True,
) -> Tensor:
    """Return the logits of the documents, [tokens, vocabulary], in float32."""
    row = [[(ids, np.full(len(ids), -100)) for ids in documents]]
    inputs: dict[str, Tensor | int]
    if is_concatenated:
        longest = max(len(ids) for ids in documents)
        batch = concatenated(row, sum(LENGTHS), len(LENGTHS) + 1, longest, pad_id)
        inputs = {
            "input_ids": batch["input_ids"],
            "position_ids": batch["position_ids"],
            "cu_seq_lens_q": batch["cu_seq_lens_q"],
            "cu_seq_lens_k": batch["cu_seq_lens_k"],
            "max_length_q": batch["max_length_q"],
            "max_length_k": batch["max_length_k"],
        }
    elif not packs:
        inputs = {"input_ids": torch.from_numpy(documents[0])[None]}
        inputs["attention_mask"] = torch.ones(1, len(documents[0]), dtype=torch.long)
    else:
        grid = packed(row, sum(LENGTHS), pad_id)
        inputs = {"input_ids": grid["input_ids"], "position_ids": grid["position_ids"]}
    return _computed(model, inputs, compute_dtype)[0]


def _computed(model: PreTrainedModel, inputs: Mapping[str, Tensor | int], compute_dtype: torch.dtype) -> Tensor:
    """Return a model's logits, [rows, tokens, vocabulary], in float32."""
    device = model.device
    tensors = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with evaluating(model, compute_dtype), errors_as_refusal(model, NO_ROW, "rows of any length"):
        logits: Tensor = model(**tensors, use_cache=False).logits
    return logits.float()


@contextlib.contextmanager
def evaluating(model: PreTrainedModel, compute_dtype: torch.dtype) -> Iterator[None]:
    """Compute without gradients, in evaluation mode and in the precision of the training."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, compute_dtype, enabled=model.dtype != compute_dtype):
            yield
    finally:
        model.train(was_training)


NO_ROW = "transformers fails to compute a row of tokens with this model."
_NO_ANSWER = "transformers fails to generate with this model, so it could not be evaluated."
_PROMPT = 14  # tokens; a prime number with the new ones, because some kernels compute whole blocks only
_NEW = 4
_ROUNDING = 0.01  # share of the logits' norm; states of recurrent layers are computed in blocks and in steps
_ROUNDING_16_BITS = 0.1  # a cache and a whole row are computed by different kernels, and experts may change


def refuse_other_generation(model: PreTrainedModel, pad_id: int, *, compute_dtype: torch.dtype) -> None:
    """Generate a few fixed tokens. Their logits must be those of the whole row, which training computes.

    Raises:
        BadModel: the model does not generate, cannot compute the row, or computes other logits.
    """
    size = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, size, (1, _PROMPT), generator=torch.Generator().manual_seed(0))
    row = torch.cat([prompt, torch.tensor([list(continuation(_NEW - 1))])], dim=1)
    logits = _computed(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}, compute_dtype)
    trained = logits[0, -_NEW:]
    with evaluating(model, compute_dtype), errors_as_refusal(model, _NO_ANSWER, "a model that generates text"):
        generated = forced_logits(model, prompt, torch.ones_like(prompt), pad_id, _NEW)[:, 0]
    differences = (generated - trained).norm(dim=-1) / trained.norm(dim=-1)
    # Rounding may give a single token another expert.
    difference = float(differences.median() if has_experts(model.config) else differences.max())
    allowed = _ROUNDING if compute_dtype == torch.float32 else _ROUNDING_16_BITS
    if not difference <= allowed:  # NaN is refused too
        raise BadModel(
            "This model's logits differ between training and generation, so its answers would not be those that it learned.",
            where="base.model",
            expected="the same logits for a generated token as for the whole row",
            got=f"architecture {model.config.model_type}: they differ by {difference:.2g} of their norm",
            next_step="choose another base, or another version of transformers",
        )


@contextlib.contextmanager
def errors_as_refusal(model: PreTrainedModel, what: str, expected: str) -> Iterator[None]:
    """Refuse a model whose own code fails, in any way; errors of the device and of tested architectures pass.

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
            got=f"architecture {model.config.model_type}: {first_line(error)}",
            next_step="choose another base, or another version of transformers",
        ) from error


def _is_of_the_model(error: Exception) -> bool:
    if isinstance(error, MemoryError | OSError | torch.OutOfMemoryError | torch.AcceleratorError | Failure):
        return False
    text = str(error).lower()
    return "can't allocate memory" not in text and "cuda error" not in text
