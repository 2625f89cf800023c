"""Encode a file of chats chunk by chunk, in several processes, with the rows in order."""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, overload

import numpy as np

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.answer_spans import IfCut
from loraflow.data.chats import ChatRecord
from loraflow.data.loss_mask import ChatTemplate, name_row
from loraflow.data.token_cache import EncodedRows, key_of_rows, segments
from loraflow.data.token_files import TokenBatch
from loraflow.data.token_labels import IGNORED
from loraflow.data.token_report import LongRow, long_rows
from loraflow.failures import Killed
from loraflow.store.chunk_cache import ChunkCache

ONE_PROCESS_BYTES = 1_000_000  # a smaller file is encoded in this process

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
    is_new: bool = True  # they were not in the cache


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
        source: the file.
        template: the base's template.
        config: the stage's config.
        processes: how many to use.
        cache: the cache of encoded rows; None encodes all of them.
        key: what the cache's entries depend on beside their rows.

    Raises:
        Killed: a process was killed.
    """
    _set_worker_state(template, config, cache, key)
    chunks = segments(source)
    if processes == 1 or source.stat().st_size < ONE_PROCESS_BYTES:
        yield from map(_encode, chunks)
        return
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    # A forked process has the tokenizer already. gc.freeze keeps its garbage collector from touching, and so copying,
    # the parent's memory pages.
    with ProcessPoolExecutor(processes, get_context("fork"), initializer=gc.freeze) as pool:
        pending: deque[Future[Chunk]] = deque()
        try:
            for lines in chunks:
                pending.append(pool.submit(_encode, lines))
                if len(pending) > 4 * processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise Killed("A tokenizer process was killed.", where="tokenize", next_step="run again") from error


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
_key: bytes


def _set_worker_state(template: ChatTemplate, config: TokenizeConfig, cache: ChunkCache | None, key: bytes) -> None:
    global _template, _config, _cache, _key
    _template, _config, _cache, _key = template, config, cache, key


def _encode(lines: list[str]) -> Chunk:
    if _cache is None:
        return _chunk(lines, _encoded(lines), is_new=True)
    key = key_of_rows(_key, lines)
    content = _cache.read(key)
    if content is not None:
        return _chunk(lines, EncodedRows.from_bytes(content), is_new=False)
    rows = _encoded(lines)
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
    places, problems = _Places(lines), Problems()
    ends = np.cumsum(rows.lengths, dtype=np.int64)
    starts = ends - rows.lengths
    for number in rows.cut:
        problems.add("cut_reasoning", places[number])
    kept = np.ones(len(lines), bool)
    if _config.special_tokens != "allow":
        for number, token in rows.special.items():
            problems.add("special_tokens", f"{places[number]}: {token}")
            kept[number] = False
    for number in np.flatnonzero(kept & (rows.lengths > _config.max_length)).tolist():
        problems.add("too_long", f"{places[number]}: {rows.lengths[number]} tokens")
        # No stop token is added at the cut: the model would learn to stop in the middle of a sentence.
        kept[number] = _config.too_long == "truncate"
    lengths = np.minimum(rows.lengths, _config.max_length)
    learned = np.concatenate(([0], np.cumsum(rows.labels != IGNORED)))
    # The first token is never predicted.
    nothing = kept & (learned[starts + lengths] == learned[np.minimum(starts + 1, starts + lengths)])
    for number in np.flatnonzero(nothing).tolist():
        problems.add("nothing_to_learn", places[number])
    kept &= ~nothing
    lengths = np.where(kept, lengths, 0).astype(np.int32)
    is_in = slice(None) if np.array_equal(lengths, rows.lengths) else _of_rows(starts, lengths, rows.lengths)
    weights = None if rows.weights is None else rows.weights[is_in]
    batch = TokenBatch(rows.ids[is_in], rows.labels[is_in], lengths[kept], weights)
    return Chunk(batch, kept, problems, rows.lengths, long_rows(places, rows.lengths.tolist()), is_new)


def _of_rows(starts: np.ndarray, lengths: np.ndarray, of_rows: np.ndarray) -> np.ndarray:
    """Tell for each token whether it is among the first `lengths` tokens of its row."""
    position = np.arange(int(of_rows.sum())) - np.repeat(starts, of_rows)
    is_in: np.ndarray = position < np.repeat(lengths, of_rows)
    return is_in


class _Places(Sequence[str]):
    """The places of rows, which are parsed only where they are needed."""

    def __init__(self, lines: list[str]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> list[str]: ...
    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        record: ChatRecord = json.loads(self._lines[number])
        return record["place"]
