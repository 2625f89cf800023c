"""Multiple-choice questions: the tokens of each choice after its question, and which choice a model finds most likely.

As in lm-eval (Gao et al.): a choice follows its question after a space, as plain text without a chat template, and the
tokenizer's own BOS is in front. A question that ends in white space gets no further space (lm-eval adds one). `accuracy`
compares the sums of the log likelihoods of the choices' tokens (acc), `accuracy_norm` these sums by the number of the
choices' characters (acc_norm). Of equal ones the first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loraflow.data.loss_mask import Encoded
from loraflow.data.token_labels import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_choice(tokenizer: PreTrainedTokenizerBase, context: str, choice: str) -> Encoded:
    """Return question and choice as token ids, where the tokens of the choice are learned.

    White space at the end of the question goes to the choice, in place of the space: most tokenizers join it with the next
    word. Of the special tokens that the tokenizer writes around a text, only those before it are there: an EOS after the
    question would end it, and one after the choice would be scored.

    Raises:
        ValueError: the question or the choice has no token.
    """
    bare = context.rstrip()
    asked = _ids(tokenizer, bare)
    whole = _ids(tokenizer, f"{context} {choice}" if bare == context else f"{context}{choice}")
    before, after = _tokens_before(tokenizer, bare, asked) + asked, whole[len(asked) :]
    if not before or not after:
        raise ValueError("no token")
    labels = [IGNORED] * len(before) + after
    return Encoded(np.array(before + after, dtype=np.int32), np.array(labels, dtype=np.int32), prompt=len(before))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _tokens_before(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]) -> list[int]:
    """Return the tokens that the tokenizer writes before a text with these ids, such as a BOS; none that it begins with."""
    around: list[int] = tokenizer(text)["input_ids"]
    extra = len(around) - len(ids)
    before = next((around[:start] for start in range(extra + 1) if around[start : start + len(ids)] == ids), [])
    return [] if ids[: len(before)] == before else before


def is_right(losses: Sequence[float], choices: Sequence[str], answer: int) -> tuple[float, float]:
    """Return accuracy and accuracy_norm of a question, 0 or 1.

    Args:
        losses: the sum of -log p of each choice's tokens, in nats.
        choices: the texts.
        answer: the position of the right one.
    """
    sums = -np.asarray(losses)
    by_length = sums / np.array([len(choice) for choice in choices])
    return float(sums.argmax() == answer), float(by_length.argmax() == answer)
