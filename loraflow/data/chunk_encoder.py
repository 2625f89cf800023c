"""Encode a file of chats chunk by chunk, in several processes, with the rows in order."""

from __future__ import annotations

import gc
import json
import mmap
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np

from loraflow.config.stage_configs import TokenizeConfig
from loraflow.data.answer_spans import IfCut
from loraflow.data.chats import ChatRecord
from loraflow.data.loss_mask import IGNORED, ChatTemplate, Encoded, name_row
from loraflow.data.token_files import TokenBatch
from loraflow.data.token_report import LongRow, long_rows
from loraflow.failures import Killed

CHUNK_ROWS = 500  # rows that are sent to a process at a time
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
    problems: Problems
    lengths: np.ndarray  # tokens of each row of the file, before rows are left out or cut, int32
    longest: list[LongRow]  # of the same rows


def encoded_chunks(source: Path, template: ChatTemplate, config: TokenizeConfig, processes: int) -> Iterator[Chunk]:
    """Encode a file's rows in order.

    Raises:
        Killed: a process was killed.
    """
    _set_worker_state(template, config)
    chunks = _line_chunks(source)
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


def _line_chunks(source: Path) -> Iterator[list[str]]:
    lines: list[str] = []
    with source.open(encoding="utf-8") as file:
        for line in file:
            lines.append(line)
            if len(lines) == CHUNK_ROWS:
                yield lines
                lines = []
    if lines:
        yield lines


# State of a process. Forked processes inherit it, so that the template is neither pickled nor loaded again.
_template: ChatTemplate
_config: TokenizeConfig


def _set_worker_state(template: ChatTemplate, config: TokenizeConfig) -> None:
    global _template, _config
    _template, _config = template, config


def _encode(lines: list[str]) -> Chunk:
    records: list[ChatRecord] = [json.loads(line) for line in lines]
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    problems = Problems()
    if_cut: IfCut = "context" if _config.thinking == "keep" else "error"
    with name_row([record["place"] for record in records]):
        learned = [record.get("learned") for record in records]
        factors = [record.get("weights") for record in records]
        chats = [record["messages"] for record in records]
        encoded = _template.encode(chats, _config.loss_on, if_cut, learned, factors)
    for record, row in zip(records, encoded, strict=True):
        part = _part_to_learn(row, record["place"], _config, problems)
        if part is not None:
            ids.append(part[0])
            labels.append(part[1])
            weights.append(_weights_of(row)[: len(part[0])])
    none = np.empty(0, np.int32)
    lengths = np.fromiter(map(len, ids), np.int32, len(ids))
    of_tokens = np.concatenate([np.empty(0, np.float32), *weights]) if any(f is not None for f in factors) else None
    batch = TokenBatch(np.concatenate([none, *ids]), np.concatenate([none, *labels]), lengths, of_tokens)
    all_lengths = [len(row.ids) for row in encoded]
    longest = long_rows([record["place"] for record in records], all_lengths)
    return Chunk(batch, problems, np.array(all_lengths, np.int32), longest)


def _weights_of(row: Encoded) -> np.ndarray:
    return (row.labels != IGNORED).astype(np.float32) if row.weights is None else row.weights


def _part_to_learn(
    row: Encoded, place: str, config: TokenizeConfig, problems: Problems
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a row's ids and labels, cut to max_length if the config says so; None if the row is dropped."""
    ids, labels = row.ids, row.labels
    if row.not_learned:
        problems.add("cut_reasoning", place)
    if row.special_in_text and config.special_tokens != "allow":
        problems.add("special_tokens", f"{place}: {row.special_in_text}")
        return None
    if len(ids) > config.max_length:
        problems.add("too_long", f"{place}: {len(ids)} tokens")
        if config.too_long != "truncate":
            return None
        # No stop token is added at the cut: the model would learn to stop in the middle of a sentence.
        ids, labels = ids[: config.max_length], labels[: config.max_length]
    if not (labels[1:] != IGNORED).any():  # the first token is never predicted
        problems.add("nothing_to_learn", place)
        return None
    return ids, labels
