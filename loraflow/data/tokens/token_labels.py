"""The labels of a chat's tokens and their weights in the loss, from the spans of its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from loraflow.data.chats import Chat
from loraflow.data.templates.alignment import Span
from loraflow.data.templates.answer_spans import Answer

if TYPE_CHECKING:
    from tokenizers import Encoding

IGNORED = -100  # the label of a token that is not learned: torch's ignore_index


def labels_of_spans(ids: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """Return the labels: the ids of the tokens in spans, IGNORED elsewhere."""
    labels = np.full(len(ids), IGNORED, np.int32)
    for first, last in spans:
        labels[first:last] = ids[first:last]
    return labels


def spans_by_message(chat: Chat, answers: Sequence[Answer], tokens: Sequence[Span]) -> dict[int, Sequence[Span]]:
    """Return {number of an answer's message: its spans of tokens}. `tokens` are the spans of all answers in order."""
    found: dict[int, Sequence[Span]] = {}
    at = 0
    for number, answer in zip((n for n, m in enumerate(chat) if m["role"] == "assistant"), answers, strict=True):
        found[number] = tokens[at : at + len(answer.spans)]
        at += len(answer.spans)
    return found


def mask_others(labels: np.ndarray, spans: dict[int, Sequence[Span]], learned: Sequence[int]) -> None:
    """Take the answers that are not learned out of the labels, in place."""
    for number, parts in spans.items():
        if number not in learned:
            for first, last in parts:
                labels[first:last] = IGNORED


def token_weights(
    labels: np.ndarray, spans: dict[int, Sequence[Span]], learned: Sequence[int], weights: Sequence[float]
) -> np.ndarray:
    """Return the weight of each token in the loss."""
    found: np.ndarray = (labels != IGNORED).astype(np.float32)
    for number, weight in zip(learned, weights, strict=True):
        for first, last in spans.get(number, ()):
            found[first:last] *= np.float32(weight)
    return found


def all_weights(labels: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return the weight of each token in the loss, float32: 1 for those with a label, if no weights are given."""
    return (labels != IGNORED).astype(np.float32) if weights is None else weights


def joined_weights(parts: Sequence[tuple[np.ndarray, np.ndarray | None]]) -> np.ndarray | None:
    """Return the weights of parts, each with its labels, one after another; None if no part has weights."""
    if all(weights is None for _, weights in parts):
        return None
    return np.concatenate([all_weights(labels, weights) for labels, weights in parts])


def token_span(encoding: Encoding, start: int, end: int) -> Span:
    """Map a span of characters to the tokens that begin inside it."""
    first = next((t for c in range(start, end) if (t := encoding.char_to_token(c)) is not None), None)
    last = next((t for c in range(end - 1, start - 1, -1) if (t := encoding.char_to_token(c)) is not None), None)
    if first is None or last is None:
        return len(encoding.ids), len(encoding.ids)
    # "<|assistant|>" swallows the white space after it, even white space of the answer. That token belongs to the prompt.
    while first <= last and (chars := encoding.token_to_chars(first)) is not None and chars[0] < start:
        first += 1
    # One character can be several tokens (the bytes of an emoji), which all have its offsets.
    while last + 1 < len(encoding.ids) and encoding.token_to_chars(last + 1) == encoding.token_to_chars(last):
        last += 1
    return first, last + 1
