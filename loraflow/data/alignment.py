"""Where text and token ids meet, from the ids alone.

A byte-level BPE loses nothing: each token stands for a fixed number of bytes, so a running sum over the ids says
where every token begins. It is as exact as the tokenizer's own alignment, which costs as much again as
the ids. Every row is proved by its sum, and by tokens that end exactly where its spans do; a row that
fails, and every other kind of tokenizer, is left to the tokenizer's alignment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Span = tuple[int, int]

_NEVER = 1 << 40  # bytes of a token that no text gives: a sum with it is wrong
# White space as Rust's regex crate has it, with which control tokens swallow it. Python's \s holds four characters more.
_SPACE = "[\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]*"


class ByteAlignment:
    """The bytes of every token of a byte-level BPE."""

    def __init__(self, tokenizer: Any):
        """Take a `tokenizers.Tokenizer`.

        Raises:
            ValueError: its tokens do not add up to its text.
        """
        parts = json.loads(tokenizer.to_str())
        self._ascii_only = _normalizer(parts["normalizer"])
        if _byte_levels(parts["pre_tokenizer"]) != 1:
            raise ValueError("not byte-level")
        self._trimmed = _trims(parts["post_processor"])
        vocabulary = _vocabulary(parts["model"])
        added = parts["added_tokens"]
        if any(token["single_word"] for token in added):
            raise ValueError("a control token looks at its neighbours")
        self._bytes = np.full(max([*vocabulary.values(), *(t["id"] for t in added)]) + 1, _NEVER, np.int64)
        letters = set(_alphabet())
        if not letters.issuperset("".join(vocabulary)):  # a control token may stand in the vocabulary too
            vocabulary = {token: number for token, number in vocabulary.items() if letters.issuperset(token)}
        self._bytes[list(vocabulary.values())] = np.fromiter(map(len, vocabulary), np.int64, len(vocabulary))
        for token in added:
            self._bytes[token["id"]] = len(token["content"].encode())
        self._greedy = self._swallowing(added)

    @staticmethod
    def _swallowing(added: list[dict[str, Any]]) -> re.Pattern[str] | None:
        """Return what matches control tokens and the white space behind that they swallow; None where none does."""
        if any(token["lstrip"] for token in added):
            raise ValueError("a control token swallows what stands before it")
        if not any(token["rstrip"] for token in added):
            return None
        if any(token["normalized"] or token["content"] != token["content"].strip() for token in added):
            raise ValueError("which control token is matched depends on more than their length")
        longest_first = sorted(((t["content"], t["rstrip"]) for t in added), key=lambda pair: -len(pair[0]))
        parts = [f"({re.escape(content)}){_SPACE if rstrip else ''}" for content, rstrip in longest_first]
        return re.compile("|".join(parts))

    def spans(
        self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray, spans: Sequence[Sequence[Span]]
    ) -> list[list[Span] | None]:
        """Carry spans of characters to spans of tokens, or None for a row where that is not proved.

        Args:
            texts: what was encoded.
            ids: the ids of all texts, one behind another.
            lengths: how many ids each text has.
            spans: of each text, in characters.
        """
        ends = np.zeros(len(ids) + 1, np.int64)  # ends[k]: bytes before token k
        np.cumsum(self._bytes[ids], out=ends[1:])
        rows = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=rows[1:])
        bases = ends[rows]
        wanted: list[int] = []
        places: list[list[Span] | None] = []
        for text, base, total, found in zip(texts, bases[:-1].tolist(), np.diff(bases).tolist(), spans, strict=True):
            places.append(self._places(text, total, found))
            for start, end in places[-1] or ():
                wanted += (base + start, base + end)
        bytes_wanted = np.array(wanted, np.int64)
        at = np.searchsorted(ends, bytes_wanted)
        exact = (ends[np.minimum(at, len(ids))] == bytes_wanted).tolist()
        tokens = at.tolist()
        out: list[list[Span] | None] = []
        k = 0
        for row, here in zip(rows[:-1].tolist(), places, strict=True):
            if here is None:
                out.append(None)
                continue
            upto = k + 2 * len(here)
            proved = all(exact[k:upto])
            out.append([(tokens[j] - row, tokens[j + 1] - row) for j in range(k, upto, 2)] if proved else None)
            k = upto
        return out

    def _places(self, text: str, total: int, spans: Sequence[Span]) -> list[Span] | None:
        """Return spans in the bytes that the ids stand for; None where the ids do not add up to the text."""
        plain = text.isascii()
        if not plain and self._ascii_only:
            return None
        # Of a letter in several tokens, a span's last one, only an alignment can say which of them count.
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
    """Return a text without the white space that control tokens swallow, and where its spans are then."""
    cuts: list[Span] = []
    for match in greedy.finditer(text):
        end = match.end(match.lastindex or 0)
        if end < match.end():
            cuts.append((end, match.end()))
    kept, at = [], 0
    for start, end in cuts:
        kept.append(text[at:start])
        at = end
    kept.append(text[at:])

    def moved(place: int) -> int:
        return place - sum(min(place, end) - start for start, end in cuts if start < place)

    return "".join(kept), [(moved(start), moved(end)) for start, end in spans]


def _normalizer(part: dict[str, Any] | None) -> bool:
    """Return whether a normalizer leaves ASCII alone only (NFC), not everything (none)."""
    if part is None:
        return False
    if part["type"] == "NFC":
        return True
    raise ValueError("a normalizer rewrites the text")


def _byte_levels(part: dict[str, Any] | None) -> int:
    """Return how often a pre-tokenizer turns text into bytes."""
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


def _trims(part: dict[str, Any] | None) -> bool:
    """Return whether a post-processor takes white space out of the offsets."""
    match part:
        case None | {"type": "TemplateProcessing"}:
            return False
        case {"type": "ByteLevel", "trim_offsets": bool(trims)}:
            return trims
        case {"type": "Sequence", "processors": list(inner)}:
            return any(map(_trims, inner))
    raise ValueError("a post-processor that is not known")


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] != "BPE" or model.get("dropout") or model.get("byte_fallback"):
        raise ValueError("no plain BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("tokens hold more than their text")
    vocabulary: dict[str, int] = model["vocab"]
    # A byte without a token is dropped, which the sum shows; an unknown token in its place could hide it.
    if model.get("unk_token") is not None and not all(letter in vocabulary for letter in _alphabet()):
        raise ValueError("bytes may become the unknown token")
    return vocabulary


def _alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()
