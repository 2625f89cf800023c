"""The rows of each optimizer step as micro-batches, dealt out to the devices.

A row is one document, or, packed, several. A step's rows reach the model in one of two layouts:

- end to end: one line of tokens, of a few fixed lengths, so that compiled code is never compiled again. Attention gets
  the borders of the documents (`cu_seq_lens`). A micro-batch takes as many rows as fit into the token budget.
- grid: a row each, padded to the longest, for attention that needs a mask. Where all rows begin with the same ids and
  it saves arithmetic, the grid becomes one line that holds these ids once (`prefix_sharing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from loraflow.data.loss_mask import IGNORED
from loraflow.data.token_rows import Document, TokenRows
from loraflow.hardware.process_group import ProcessGroup
from loraflow.training.collation import MicroBatch, end_to_end, packed, padded, with_targets
from loraflow.training.prefix_sharing import PrefixSharing, share_prefix

ROUND = 64  # tokens; lengths of end-to-end micro-batches are multiples of it
SHAPES = 4  # fixed lengths of end-to-end micro-batches where rows are not packed


@dataclass(frozen=True)
class EndToEnd:
    """The layout of documents end to end: the fixed lengths of its micro-batches, ascending."""

    lengths: tuple[int, ...]
    longest: int  # tokens of the longest document; a constant, or compiled code would be compiled again

    def fit(self, tokens: int) -> int:
        """Return the smallest length that holds so many tokens."""
        return next(length for length in self.lengths if length >= tokens)


@dataclass(frozen=True)
class GridRows:
    """The layout of a grid: how many rows a micro-batch takes."""

    rows: int


Layout = EndToEnd | GridRows


def end_to_end_layout(rows: TokenRows, steps: NDArray[np.int64], budget: int, devices: int = 1) -> EndToEnd:
    """Choose the lengths of end-to-end micro-batches.

    Args:
        rows: the set.
        steps: rows of each optimizer step, [steps, global batch].
        budget: tokens that memory has room for at a time.
        devices: among which the micro-batches of a step are dealt out.
    """
    longest = int(rows.lengths.max())
    most = int(rows.tokens[steps].sum(1).max())
    if rows.row_length is not None:
        at_once = max(1, min(budget // rows.row_length, math.ceil(steps.shape[1] / devices)))
        count = math.ceil(steps.shape[1] / at_once / devices) * devices
        return EndToEnd((_round_up(math.ceil(steps.shape[1] / count) * rows.row_length),), longest)
    count = math.ceil(most / max(budget, longest) / devices) * devices
    # A twentieth more than the average: rows are dealt into micro-batches whole.
    full = _round_up(max(int(rows.tokens[steps].max()), math.ceil(most / count * (1.05 if count > 1 else 1.0))))
    lengths = {_round_up(math.ceil(full * k / SHAPES)) for k in range(1, SHAPES + 1)}
    return EndToEnd(tuple(sorted(lengths)), longest)


def _round_up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def deal(tokens: NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Deal rows into as few micro-batches as first-fit-decreasing finds.

    Args:
        tokens: of each row.
        capacity: tokens of a micro-batch.

    Returns:
        the indices of each micro-batch's rows.
    """
    bins: list[tuple[int, list[int]]] = []
    for row in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[row])
        for i, (room, rows) in enumerate(bins):
            if size <= room:
                bins[i] = (room - size, [*rows, row])
                break
        else:
            bins.append((capacity - size, [row]))
    return [sorted(rows) for _, rows in bins]


class StepItem(TypedDict):
    """What one device computes in an optimizer step."""

    micro: list[MicroBatch]
    learned: int  # learned tokens of the whole step, on all devices
    tokens: int  # of the whole step, without padding


class StepDataset(Dataset[StepItem]):
    """The optimizer steps of a run: item i is what this process computes in step i.

    Args:
        rows: the set.
        steps: rows of each step, [steps, global batch].
        layout: of the micro-batches.
        pad_id: of the padding.
        seed: of dropout.
        dropout: give every token a key, from which its dropout mask is computed.
        group: the processes among which the micro-batches are dealt out.
        sharing: how to share what the rows of a grid begin with; None never does.
        even: give all processes as many micro-batches. Those that have none left in the last round compute one that
            nothing is learned from.
    """

    def __init__(
        self,
        rows: TokenRows,
        steps: NDArray[np.int64],
        layout: Layout,
        pad_id: int,
        *,
        seed: int = 0,
        dropout: bool = False,
        group: ProcessGroup | None = None,
        sharing: PrefixSharing | None = None,
        even: bool = False,
    ):
        self.rows, self.steps, self.layout, self.pad_id = rows, steps, layout, pad_id
        self.sharing = None if dropout or rows.row_length else sharing
        self.seed, self.dropout, self.group, self.even = seed, dropout, group or ProcessGroup(), even
        # Length of a micro-batch → room for documents in it, the same in every step.
        self.entries = self._most_documents(layout) if isinstance(layout, EndToEnd) else {}

    def _most_documents(self, layout: EndToEnd) -> dict[int, int]:
        entries: dict[int, int] = {}
        documents = np.diff(self.rows.offsets)
        for step in range(len(self.steps)):
            for indices in self.dealt(step):
                chosen = self.steps[step][indices]
                used = int(self.rows.tokens[chosen].sum())
                length = layout.fit(used)
                needed = int(documents[chosen].sum()) + math.ceil((length - used) / layout.longest)
                entries[length] = max(entries.get(length, 0), needed)
        return entries

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepItem]:
        return (self[step] for step in range(len(self)))

    def dealt(self, step: int) -> list[list[int]]:
        """Return the rows of each micro-batch of all devices, as indices into the step's rows. All devices agree on them."""
        if isinstance(self.layout, EndToEnd):
            return deal(self.rows.tokens[self.steps[step]], self.layout.lengths[-1])
        width, at_once = len(self.steps[step]), self.layout.rows
        return [list(range(first, min(first + at_once, width))) for first in range(0, width, at_once)]

    def __getitem__(self, step: int) -> StepItem:
        """Return a step's item."""
        chosen = self.steps[step]
        micro = []
        dealt = self.dealt(step)
        mine = dealt[self.group.rank :: self.group.size]
        idle = math.ceil(len(dealt) / self.group.size) - len(mine) if self.even else 0
        for indices in [*mine, *dealt[:idle]]:
            documents = [self.rows[int(chosen[index])] for index in indices]
            keys = [self._token_keys(step, index, int(self.rows.tokens[chosen[index]])) for index in indices]
            micro.append(self._micro_batch(documents, keys if self.dropout else None))
        for batch in micro[len(mine) :]:
            batch["loss_index"], batch["targets"] = batch["loss_index"][:0], batch["targets"][:0]
        learned = sum(
            int((labels[1:] != IGNORED).sum()) for row in chosen.tolist() for _, labels in self.rows[int(row)]
        )
        return {"micro": micro, "learned": learned, "tokens": int(self.rows.tokens[chosen].sum())}

    def _micro_batch(self, rows: list[list[Document]], keys: list[NDArray[np.int32]] | None) -> MicroBatch:
        if isinstance(self.layout, EndToEnd):
            tokens = self.layout.fit(sum(len(ids) for row in rows for ids, _ in row))
            batch = end_to_end(rows, tokens, self.entries[tokens] + 1, self.layout.longest, self.pad_id)
            keys = None if keys is None else [np.concatenate(keys)]
            row_width = tokens
        elif self.sharing and (prefix := self.sharing.shared_length([row[0][0] for row in rows])):
            return share_prefix([row[0] for row in rows], prefix)
        else:
            length = self.rows.row_length
            batch = with_targets(packed(rows, length, self.pad_id) if length else padded(rows, self.pad_id))
            row_width = batch["input_ids"].shape[1]
        if keys is not None:
            batch["token_keys"] = _spread(keys, row_width, batch["input_ids"].numel())
        return batch

    def _token_keys(self, step: int, index: int, tokens: int) -> NDArray[np.int32]:
        """Return a number for each token of a row, from seed, step, the row's index in the step and the token's in it."""
        token = np.arange(tokens, dtype=np.uint64) + np.uint64(index << 32)
        return (mix(token ^ mix(np.array([(self.seed << 32) ^ step], np.uint64))) >> np.uint64(32)).astype(np.int32)


def _spread(rows: Sequence[NDArray[np.int32]], row_width: int, size: int) -> torch.Tensor:
    """Return the values of rows, each of which begins `row_width` behind the one before; zero elsewhere."""
    flat = np.zeros(size, np.int32)
    for i, values in enumerate(rows):
        flat[i * row_width : i * row_width + len(values)] = values
    return torch.from_numpy(flat)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix 64-bit numbers so that neighbours have nothing in common (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return mixed
