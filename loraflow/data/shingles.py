"""Compare texts by their character 5-grams: the exact Jaccard index, and MinHash sketches that propose pairs.

The exact index decides. A sketch only says which pairs are worth comparing, so that not every pair has to be.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from loraflow.data.chats import Chat
from loraflow.data.split import normalize, to_json, without_call_ids
from loraflow.failures import MissingExtra

GRAM = 5  # characters
HASHES = 80  # MinHash values of a text; a byte of each is kept
_SEED = 1
# Of texts that are sketched together: their arrays stay in a core's cache, which is twice as fast as 1,000,000.
_BATCH_CHARACTERS = 12_000
# Odd numbers with mixed bits (from the golden ratio and from MurmurHash3): a gram's hash only decides what is proposed.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


def comparable_text(messages: Chat) -> str:
    """Return a chat's text without differences of case, white space and Unicode form, and without its system message.

    Datasets often have one long system message for all rows, which would make all rows similar.
    """
    parts: list[str] = []
    for message in messages:
        if message["role"] != "system":
            parts.append(message["content"] or "")
            others = {k: v for k, v in without_call_ids(message).items() if k not in ("role", "content", "tools")}
            if others:  # such as tool calls; the tools themselves are often the same in all rows
                parts.append(to_json(others))
    return normalize(" ".join(parts))


def grams(text: str) -> set[str]:
    """Return the 5-grams of a text. A shorter text is its own gram."""
    return {text[start : start + GRAM] for start in range(max(1, len(text) - GRAM + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    """Return the Jaccard index of two sets: the share of their union that is in both."""
    both = len(one & other)
    return both / (len(one) + len(other) - both)


def sketch(texts: Sequence[str]) -> np.ndarray:
    """Return the low byte of each MinHash value [texts, HASHES]. The share of equal bytes estimates the Jaccard index.

    Raises:
        MissingExtra: rensa is not installed.
    """
    parts = [np.empty((0, HASHES), np.uint8)]
    begin = characters = 0
    for end, text in enumerate(texts, 1):
        characters += max(len(text), GRAM)
        if characters >= _BATCH_CHARACTERS or end == len(texts):
            parts.append(_sketch(texts[begin:end]))
            begin, characters = end, 0
    return np.concatenate(parts)


def _sketch(texts: Sequence[str]) -> np.ndarray:
    hashes, offsets = _hashed_grams(texts)
    matrix = _rensa().RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, HASHES, _SEED)
    # An array of each row takes a fifth of the time of one numpy array of the lists.
    values = b"".join([array("I", row).tobytes() for row in matrix.to_rows()])
    return np.frombuffer(values, np.uint32).astype(np.uint8).reshape(-1, HASHES)


def _hashed_grams(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash of each 5-gram of all texts, and where each text's hashes begin."""
    padded = [text if len(text) >= GRAM else text.ljust(GRAM, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    lengths = np.fromiter(map(len, padded), np.int64, len(padded))
    ends = np.cumsum(lengths)
    inside = np.ones(len(codes), bool)
    for back in range(1, GRAM):  # grams that would reach into the next text
        inside[ends - back] = False
    size = len(codes) - GRAM + 1
    hashes = codes[:size].copy()
    for offset in range(1, GRAM):
        hashes *= _FACTOR
        hashes += codes[offset : offset + size]
    hashes = hashes[inside[:size]]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    hashes ^= hashes >> np.uint64(29)
    return hashes, np.concatenate(([0], np.cumsum(lengths - GRAM + 1))).astype(np.uint64)


def _rensa() -> Any:
    try:
        import rensa
    except ImportError as error:
        raise MissingExtra(
            "The search for near-duplicates needs the package rensa.",
            where="data.near_duplicates",
            got=str(error),
            next_step="`pip install rensa`, or set data.near_duplicates: off",
        ) from error
    return rensa
