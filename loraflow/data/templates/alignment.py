"""Find the character spans of a text in its token ids, from the number of bytes of each token.

A byte-level BPE is lossless: each token stands for a fixed number of bytes, so the cumulative sum of these numbers gives
the byte at which each token starts. This is as exact as the tokenizer's own offsets, which cost as much time as computing
the ids. Each row is checked: the sum must equal the text's length, and tokens must end exactly where the spans end. Rows
that fail the check, and tokenizers of other kinds, use the tokenizer's own offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from pydantic import JsonValue

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]  # start and end, end excluded

_UNUSED = 1 << 40  # "bytes" of an id that no text produces: a sum with it never equals the length of a text
# White space that control tokens swallow, as Rust's regex crate defines it. Python's \s has four more characters.
_SPACE = "[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*"


class AddedToken(TypedDict):
    """An item of added_tokens in tokenizer.json."""

    id: int
    content: str
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool


class TokenizerParts(TypedDict):
    """The keys of tokenizer.json that are read."""

    normalizer: dict[str, JsonValue] | None
    pre_tokenizer: JsonValue
    post_processor: JsonValue
    model: BpeModel
    added_tokens: list[AddedToken]


class BpeModel(TypedDict, total=False):
    """The keys of tokenizer.json's model that are read."""

    type: str
    dropout: float | None
    byte_fallback: bool
    continuing_subword_prefix: str | None
    end_of_word_suffix: str | None
    unk_token: str | None
    vocab: dict[str, int]


class ByteAlignment:
    """The number of bytes of each token of a byte-level BPE.

    Raises:
        ValueError: the tokenizer may drop or change text, so the bytes of its tokens may not add up to the text.
    """

    def __init__(self, tokenizer: Tokenizer):
        parts: TokenizerParts = json.loads(tokenizer.to_str())
        self._ascii_only = _normalizer(parts["normalizer"])
        if _byte_levels(parts["pre_tokenizer"]) != 1:
            raise ValueError("not byte-level")
        self._trimmed = _trims(parts["post_processor"])
        vocabulary = _vocabulary(parts["model"])
        added = parts["added_tokens"]
        if any(token["single_word"] for token in added):
            raise ValueError("matching a control token depends on its neighbours")
        self._bytes = np.full(max([*vocabulary.values(), *(t["id"] for t in added)]) + 1, _UNUSED, np.int64)
        letters = set(_alphabet())
        if not letters.issuperset("".join(vocabulary)):  # control tokens may be in the vocabulary too
            vocabulary = {token: number for token, number in vocabulary.items() if letters.issuperset(token)}
        self._bytes[list(vocabulary.values())] = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
        for token in added:
            self._bytes[token["id"]] = len(token["content"].encode())
        self._greedy = self._swallowing(added)

    @staticmethod
    def _swallowing(added: list[AddedToken]) -> re.Pattern[str] | None:
        """Return the pattern of control tokens and the white space after them that they swallow; None if none does."""
        if any(token["lstrip"] for token in added):
            raise ValueError("a control token swallows white space before it")
        if not any(token["rstrip"] for token in added):
            return None
        if any(token["normalized"] or token["content"] != token["content"].strip() for token in added):
            raise ValueError("which control token matches depends on more than its length")
        longest_first = sorted(((t["content"], t["rstrip"]) for t in added), key=lambda pair: -len(pair[0]))
        parts = [f"({re.escape(content)}){_SPACE if rstrip else ''}" for content, rstrip in longest_first]
        return re.compile("|".join(parts))

    def spans(
        self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, spans: Sequence[Sequence[Span]]
    ) -> list[list[Span] | None]:
        """Map each text's spans of characters to spans of tokens; None for a text that cannot be verified.

        Args:
            ids: the ids of all texts, one text after another.
        """
        ends = np.zeros(len(ids) + 1, np.int64)  # ends[k]: bytes before token k
        np.cumsum(self._bytes[ids], out=ends[1:])
        rows = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=rows[1:])
        bases = ends[rows]
        boundaries: list[int] = []  # bytes where the spans of all texts start and end
        byte_spans: list[list[Span] | None] = []
        for text, base, total, found in zip(texts, bases[:-1].tolist(), np.diff(bases).tolist(), spans, strict=True):
            byte_spans.append(self._byte_spans(text, total, found))
            for start, end in byte_spans[-1] or ():
                boundaries += (base + start, base + end)
        bytes_wanted = np.array(boundaries, np.int64)
        at = np.searchsorted(ends, bytes_wanted)
        exact = (ends[np.minimum(at, len(ids))] == bytes_wanted).tolist()
        tokens = at.tolist()
        out: list[list[Span] | None] = []
        k = 0
        for row, in_bytes in zip(rows[:-1].tolist(), byte_spans, strict=True):
            if in_bytes is None:
                out.append(None)
                continue
            upto = k + 2 * len(in_bytes)
            verified = all(exact[k:upto])
            out.append([(tokens[j] - row, tokens[j + 1] - row) for j in range(k, upto, 2)] if verified else None)
            k = upto
        return out

    def _byte_spans(self, text: str, total: int, spans: Sequence[Span]) -> list[Span] | None:
        """Return spans in the bytes that the ids stand for; None if the ids do not add up to the text."""
        plain = text.isascii()
        if not plain and self._ascii_only:
            return None
        # If the last character of a span is split into several tokens, only the tokenizer knows which of them count.
        for start, end in spans:
            if start >= end or text[end - 1] > "\x7f":
                return None
            if self._trimmed and (text[start].isspace() or text[end - 1].isspace()):
                return None
        if self._greedy is not None:
            text, spans = _without_swallowed(self._greedy, text, spans)
            if any(start >= end for start, end in spans):
                return None
        if plain:
            return list(spans) if len(text) == total else None
        if len(text.encode()) != total:
            return None
        return [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]


def _without_swallowed(greedy: re.Pattern[str], text: str, spans: Sequence[Span]) -> tuple[str, list[Span]]:
    """Return a text without the white space that control tokens swallow, and its spans in the shorter text."""
    cuts: list[Span] = []
    for match in greedy.finditer(text):
        end = match.end(match.lastindex or 0)
        if end < match.end():
            cuts.append((end, match.end()))
    pieces, at = [], 0
    for start, end in cuts:
        pieces.append(text[at:start])
        at = end
    pieces.append(text[at:])

    def moved(position: int) -> int:
        return position - sum(min(position, end) - start for start, end in cuts if start < position)

    return "".join(pieces), [(moved(start), moved(end)) for start, end in spans]


def _normalizer(part: dict[str, JsonValue] | None) -> bool:
    """Tell whether only ASCII text is safe from the normalizer (NFC); without a normalizer, all text is."""
    if part is None:
        return False
    if part["type"] == "NFC":
        return True
    raise ValueError("a normalizer rewrites the text")


def _byte_levels(part: JsonValue) -> int:
    """Return how often a pre-tokenizer converts text to bytes."""
    match part:
        case {"type": "Sequence", "pretokenizers": list(inner)}:
            return sum(map(_byte_levels, inner))
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return 1
        case {"type": "Digits"}:
            return 0
        case {"type": "Split" | "Punctuation", "behavior": behavior} if behavior != "Removed":
            return 0
    raise ValueError("a pre-tokenizer may lose text")


def _trims(part: JsonValue) -> bool:
    """Tell whether a post-processor excludes white space from the offsets."""
    match part:
        case None | {"type": "TemplateProcessing"}:
            return False
        case {"type": "ByteLevel", "trim_offsets": bool(trims)}:
            return trims
        case {"type": "Sequence", "processors": list(inner)}:
            return any(map(_trims, inner))
    raise ValueError("an unknown post-processor")


def _vocabulary(model: BpeModel) -> dict[str, int]:
    """Return {token: id}."""
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise ValueError("not a plain BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("tokens contain more than their text")
    vocabulary = model["vocab"]
    # A byte without a token is dropped, and the check of the sum finds that. An unknown token in its place could hide it.
    if model.get("unk_token") is not None and not all(letter in vocabulary for letter in _alphabet()):
        raise ValueError("bytes may become the unknown token")
    return vocabulary


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
