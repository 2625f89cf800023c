"""Encode a file of chats chunk by chunk, in several processes, with the rows in order.

Encoded rows are entries of a cache, so that appended rows alone are tokenized. An entry is a segment of rows
(`loraflow/store/chunk_cache.py`). It depends on the chats and marks of its rows, the base's tokenizer and template, and
`data.loss_on`; not on places, `max_length`, packing, or what happens to long rows.
"""

from __future__ import annotations

import gc
import hashlib
import json
import mmap
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.chats import ChatRecord
from loraflow.data.templates.answer_spans import IfCut
from loraflow.data.tokens.loss_mask import ChatTemplate, Encoded, name_row
from loraflow.data.tokens.token_files import TokenBatch
from loraflow.data.tokens.token_labels import IGNORED, joined_weights
from loraflow.data.tokens.token_report import LongRow, long_rows
from loraflow.failures import Killed
from loraflow.job import Job
from loraflow.store.chunk_cache import ChunkCache, split_head
from loraflow.store.chunk_cache import segments as cut

FORMAT = 2  # of the entries
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
        return cls(
            np.fromiter((len(row.ids) for row in rows), np.int32, len(rows)),
            np.concatenate([none, *(row.ids for row in rows)]),
            np.concatenate([none, *(row.labels for row in rows)]),
            joined_weights([(row.labels, row.weights) for row in rows]),
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
    def from_bytes(cls, content: bytes | memoryview) -> EncodedRows:
        """Return what `as_bytes` wrote."""
        head, begin = split_head(content)
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


def key_of_job(job: Job[TokenizeConfig]) -> bytes:
    """Return what the entries of a job depend on beside their rows."""
    base = job.inputs["base"].identity(job.facets.get("base"))
    values: list[JsonValue] = [FORMAT, job.version, base, job.config.loss_on, job.config.thinking]
    return json.dumps([*values, *(version(name) for name in ("tokenizers", "transformers"))]).encode()


def key_of_rows(of_job: bytes, lines: Iterable[str]) -> str:
    """Return the key of a segment."""
    return hashlib.sha256(of_job + b"".join(map(_content, lines))).hexdigest()


def segments(source: Path) -> Iterator[list[str]]:
    """Yield the lines of a file of checked rows, cut into segments by their content."""
    with source.open(encoding="utf-8") as file:
        batches = iter(lambda: file.readlines(_BATCH_CHARACTERS), [])
        yield from cut(batches, lambda lines: [_content(line) for line in lines], MAX_BYTES)


def _content(line: str) -> bytes:
    return line[max(line.find(_CONTENT), 0) :].encode()


ONE_PROCESS_BYTES = 1_000_000  # from the first new row on: less is encoded in this process

Problem = Literal["special_tokens", "too_long", "nothing_to_learn", "cut_reasoning"]


@dataclass(frozen=True)
class Problems:
    """How many rows were dropped, truncated or learned in part, by problem, and the first row with each."""

    counts: Counter[Problem] = field(default_factory=Counter)
    first: dict[Problem, str] = field(default_factory=dict)

    def add(self, problem: Problem, row: str) -> None:
        """Count a row. `row` is its place in the files, with details."""
        self.counts[problem] += 1
        self.first.setdefault(problem, row)


@dataclass(frozen=True)
class Chunk:
    """Encoded rows, and the problems of the others."""

    batch: TokenBatch
    kept: np.ndarray  # whether a row of the file is in the batch, bool
    problems: Problems
    lengths: np.ndarray  # tokens of each row of the file, before rows are left out or cut, int32
    longest: list[LongRow]  # of the same rows
    is_new: bool  # they were not in the cache


def encoded_chunks(
    source: Path,
    template: ChatTemplate,
    config: TokenizeConfig,
    processes: int,
    cache: ChunkCache | None = None,
    key: bytes = b"",
) -> Iterator[Chunk]:
    """Encode a file's rows in order.

    Args:
        cache: the cache of encoded rows; None encodes all of them.
        key: what the cache's entries depend on beside their rows.

    Raises:
        Killed: a process was killed.
    """
    _set_worker_state(template, config, cache)
    left = source.stat().st_size
    pool: ProcessPoolExecutor | None = None
    pending: deque[Callable[[], Chunk]] = deque()
    with ExitStack() as stack:
        try:
            for lines in segments(source):
                entry = "" if cache is None else key_of_rows(key, lines)
                content = None if cache is None else cache.read(entry)
                if content is None and pool is None and processes > 1 and left >= ONE_PROCESS_BYTES:
                    pool = stack.enter_context(_started(processes))
                if content is not None:
                    pending.append(partial(_chunk, lines, EncodedRows.from_bytes(content), is_new=False))
                elif pool is None:
                    pending.append(partial(_encode, entry, lines))
                else:
                    pending.append(pool.submit(_encode, entry, lines).result)
                left -= sum(len(line.encode()) for line in lines)
                while pending and (pool is None or len(pending) > 4 * processes):
                    yield pending.popleft()()
            while pending:
                yield pending.popleft()()
        except BrokenProcessPool as error:
            raise Killed("A tokenizer process was killed.", where="tokenize", next_step="run again") from error


def _started(processes: int) -> ProcessPoolExecutor:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    # A forked process has the tokenizer already. gc.freeze keeps its garbage collector from touching, and so copying,
    # the parent's memory pages.
    return ProcessPoolExecutor(processes, get_context("fork"), initializer=gc.freeze)


def has_weights(source: Path) -> bool:
    """Tell whether a file of checked chats has weights other than 0 and 1: a key of rows that stands behind `learned`."""
    if not source.stat().st_size:
        return False
    with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return re.search(rb'"learned": \[[\d, ]*\], "weights": \[', content) is not None


# State of a process. Forked processes inherit it, so that the template is neither pickled nor loaded again.
_template: ChatTemplate
_config: TokenizeConfig
_cache: ChunkCache | None


def _set_worker_state(template: ChatTemplate, config: TokenizeConfig, cache: ChunkCache | None) -> None:
    global _template, _config, _cache
    _template, _config, _cache = template, config, cache


def _encode(key: str, lines: list[str]) -> Chunk:
    rows = _encoded(lines)
    if _cache is not None:
        _cache.write(key, rows.as_bytes())
    return _chunk(lines, rows, is_new=True)


def _encoded(lines: list[str]) -> EncodedRows:
    records: list[ChatRecord] = [json.loads(line) for line in lines]
    if_cut: IfCut = "context" if _config.thinking == "keep" else "error"
    with name_row([record["place"] for record in records]):
        learned = [record.get("learned") for record in records]
        factors = [record.get("weights") for record in records]
        chats = [record["messages"] for record in records]
        return EncodedRows.of(_template.encode(chats, _config.loss_on, if_cut, learned, factors))


def _chunk(lines: list[str], rows: EncodedRows, *, is_new: bool) -> Chunk:
    """Leave rows out, or cut them, as the config says."""
    problems = Problems()

    def place_of(number: int) -> str:
        head, _, _ = lines[number].partition(_CONTENT)  # all else of a row need not be parsed
        place: str = json.loads(f"{head}}}")["place"]
        return place

    ends = np.cumsum(rows.lengths, dtype=np.int64)
    starts = ends - rows.lengths
    for number in rows.cut:
        problems.add("cut_reasoning", place_of(number))
    kept = np.ones(len(lines), bool)
    if _config.special_tokens != "allow":
        for number, token in rows.special.items():
            problems.add("special_tokens", f"{place_of(number)}: {token}")
            kept[number] = False
    for number in np.flatnonzero(kept & (rows.lengths > _config.max_length)).tolist():
        problems.add("too_long", f"{place_of(number)}: {rows.lengths[number]} tokens")
        # No stop token is added at the cut: the model would learn to stop in the middle of a sentence.
        kept[number] = _config.too_long == "truncate"
    lengths = np.minimum(rows.lengths, _config.max_length)
    learned = np.concatenate(([0], np.cumsum(rows.labels != IGNORED)))
    # The first token is never predicted.
    nothing = kept & (learned[starts + lengths] == learned[np.minimum(starts + 1, starts + lengths)])
    for number in np.flatnonzero(nothing).tolist():
        problems.add("nothing_to_learn", place_of(number))
    kept &= ~nothing
    lengths = np.where(kept, lengths, 0).astype(np.int32)
    is_in = slice(None) if np.array_equal(lengths, rows.lengths) else _of_rows(starts, lengths, rows.lengths)
    weights = None if rows.weights is None else rows.weights[is_in]
    batch = TokenBatch(rows.ids[is_in], rows.labels[is_in], lengths[kept], weights)
    return Chunk(batch, kept, problems, rows.lengths, long_rows(place_of, rows.lengths.tolist()), is_new)


def _of_rows(starts: np.ndarray, lengths: np.ndarray, of_rows: np.ndarray) -> np.ndarray:
    """Tell for each token whether it is among the first `lengths` tokens of its row."""
    position = np.arange(int(of_rows.sum())) - np.repeat(starts, of_rows)
    is_in: np.ndarray = position < np.repeat(lengths, of_rows)
    return is_in
