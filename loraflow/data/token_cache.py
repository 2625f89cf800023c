"""Encoded rows as entries of a cache, so that appended rows alone are tokenized.

An entry is a segment of rows (`loraflow/data/segments.py`). It depends on the chats and marks of its rows, the base's
tokenizer and template, and `data.loss_on`; not on places, `max_length`, packing, or what happens to long rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from pydantic import JsonValue

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.loss_mask import Encoded
from loraflow.data.segments import segments as cut
from loraflow.data.token_labels import IGNORED
from loraflow.job import Job

FORMAT = 2  # of the entries; those of version 1 had no key in their hash
MAX_BYTES = 4_000_000  # of a segment, but for its last row: the arrays of long documents must fit into memory
_BATCH_CHARACTERS = 1_000_000  # of lines that are read together
_CONTENT = ', "messages": '  # of a row begins here; what stands before it is its id, set and place


@dataclass(frozen=True)
class EncodedRows:
    """Rows as flat arrays, one row after another, before rows are left out or cut."""

    lengths: np.ndarray  # tokens of each row, int32
    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    weights: np.ndarray | None  # float32, of each token in the loss; None: 1 for all that have a label
    special: dict[int, str]  # row → the first control token in its text
    cut: dict[int, int]  # row → answers that the template cuts

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> EncodedRows:
        """Join encoded rows."""
        none = np.empty(0, np.int32)
        weights = None
        if any(row.weights is not None for row in rows):
            weights = np.concatenate([_weights(row) for row in rows])
        return cls(
            np.fromiter((len(row.ids) for row in rows), np.int32, len(rows)),
            np.concatenate([none, *(row.ids for row in rows)]),
            np.concatenate([none, *(row.labels for row in rows)]),
            weights,
            {number: row.special_in_text for number, row in enumerate(rows) if row.special_in_text},
            {number: row.not_learned for number, row in enumerate(rows) if row.not_learned},
        )

    def as_bytes(self) -> bytes:
        """Return the content of a cache's entry: a line of JSON, and the arrays."""
        is_small = bool((self.ids < 1 << 16).all())
        learned = self.labels != IGNORED
        if not np.array_equal(self.labels[learned], self.ids[learned]):
            raise AssertionError("a label is neither its token nor IGNORED")
        head = {
            "rows": len(self.lengths),
            "tokens": len(self.ids),
            "small": is_small,
            "weighted": self.weights is not None,
            "special": list(self.special.items()),
            "cut": list(self.cut.items()),
        }
        parts = [self.lengths, self.ids.astype(np.uint16 if is_small else np.int32), np.packbits(learned)]
        if self.weights is not None:
            parts.append(self.weights)
        return json.dumps(head).encode() + b"\n" + b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, content: bytes) -> EncodedRows:
        """Return what `as_bytes` wrote."""
        begin = content.index(b"\n") + 1
        head = json.loads(content[:begin])
        tokens = head["tokens"]

        def take(dtype: type[np.generic], count: int) -> np.ndarray:
            nonlocal begin
            part = np.frombuffer(content, dtype, count, begin)
            begin += part.nbytes
            return part

        lengths = take(np.int32, head["rows"])
        ids = take(np.uint16 if head["small"] else np.int32, tokens).astype(np.int32)
        learned = np.unpackbits(take(np.uint8, -(-tokens // 8)), count=tokens).astype(bool)
        weights = take(np.float32, tokens) if head["weighted"] else None
        labels = np.where(learned, ids, np.int32(IGNORED))
        return cls(lengths, ids, labels, weights, dict(head["special"]), dict(head["cut"]))


def _weights(row: Encoded) -> np.ndarray:
    return (row.labels != IGNORED).astype(np.float32) if row.weights is None else row.weights


def key_of_job(job: Job[TokenizeConfig]) -> bytes:
    """Return what the entries of a job depend on beside their rows."""
    base = job.inputs["base"].identity(job.facets.get("base"))
    values: list[JsonValue] = [FORMAT, job.version, base, job.config.loss_on, job.config.thinking]
    return json.dumps([*values, *(version(name) for name in ("tokenizers", "transformers"))]).encode()


def key_of_rows(of_job: bytes, lines: Iterable[str]) -> str:
    """Return the key of a segment."""
    found = hashlib.sha256(of_job)
    for line in lines:
        found.update(_content(line))
    return found.hexdigest()


def segments(source: Path) -> Iterator[list[str]]:
    """Yield the lines of a file of checked rows, cut into segments by their content."""
    with source.open(encoding="utf-8") as file:
        batches = iter(lambda: file.readlines(_BATCH_CHARACTERS), [])
        yield from cut(batches, lambda lines: [_content(line) for line in lines], MAX_BYTES)


def _content(line: str) -> bytes:
    begin = line.find(_CONTENT)
    return line[max(begin, 0) :].encode()
