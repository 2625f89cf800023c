"""Divide the rows of each optimizer step into micro-batches, and assign the micro-batches to the devices.

A row is one document; a packed row has several. A micro-batch has one of two layouts:

- concatenated: all documents in a single row of tokens, without padding between them. `cu_seq_lens` tells attention where
  each document begins. There are only a few row lengths, so that compiled code is not compiled again for new shapes. A
  micro-batch takes as many rows as fit into the token budget.
- grid: one row of tokens for each row, padded to the longest, for attention that needs a mask. If all rows begin with the
  same ids and it saves arithmetic, these ids are computed only once (`PrefixSharing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from loraflow.data.tokens.packing import common_prefix_length
from loraflow.data.tokens.token_files import Document, TokenRows
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.hardware.process_group import ProcessGroup
from loraflow.training.collation import (
    MicroBatch,
    Weights,
    concatenated,
    has_weights,
    learned_weights,
    lengths_of_documents,
    packed,
    padded,
    spread,
    token_keys,
    with_targets,
)
from loraflow.training.memory import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Compute the common prefix of a micro-batch's documents only once. Most often it is a system prompt.
#
# The prefix and the rest of each document are concatenated in one row. A token of a rest attends to the prefix and to the
# earlier tokens of its own rest. Without dropout, the prefix has the same activations in every document, so loss and
# gradients are the same as without sharing, and there is no padding. The mask is dense, so sharing is used only if it saves
# arithmetic.

MAX_COST = 0.95  # as a share of the arithmetic of padded rows


@dataclass(frozen=True)
class PrefixSharing:
    """The cost of one layer of a model, to decide between sharing and padding."""

    per_token: int  # weights of the layer's projections
    per_pair: int  # for a token that attends to a token: sizes of the queries and of the values

    @classmethod
    def of(cls, shape: ModelShape) -> PrefixSharing:
        """Return the costs of a model."""
        return cls(shape.linear_weights // shape.layers, 2 * shape.heads * shape.head_dim)

    def shared_length(self, documents: Sequence[NDArray[np.integer]]) -> int:
        """Return the length of the prefix to share; 0 if padded rows cost about the same."""
        lengths = [len(ids) for ids in documents]
        prefix = common_prefix_length(documents)
        line = prefix + sum(lengths) - prefix * len(lengths)
        grid = len(lengths) * max(lengths)
        is_cheaper = self._cost(line, line * line) < MAX_COST * self._cost(grid, grid * max(lengths))
        return prefix if prefix and is_cheaper else 0

    def _cost(self, tokens: int, pairs: int) -> int:
        return tokens * self.per_token + pairs * self.per_pair


def obstacle_to_sharing(model: PreTrainedModel, longest: int) -> str:
    """Return why a model cannot share the prefix of its documents; empty if it can.

    Args:
        model: with its adapter.
    """
    from loraflow.base.load import sees_all_before

    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        return "dropout differs from row to row"
    if getattr(model.config, "rope_parameters", None) is None or getattr(model.config, "alibi", False):
        return "positions are not given by rotary embeddings"
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return "the attention kernel takes no custom mask"
    return "" if sees_all_before(model, longest) else "a token does not see exactly the tokens before it"


def share_prefix(documents: Sequence[Document], prefix: int, weights: Weights | None = None) -> MicroBatch:
    """Return the common prefix of documents, and the rest of each, in one row.

    The attention mask is bool [1, 1, tokens, tokens]: which tokens each token attends to. A position that predicts a
    supervised token in several documents is in `loss_index` once for each of them.

    Args:
        documents: ids and labels of each; all begin with the same ids.
        weights: the weights of the documents' tokens, one row for each document.
    """
    rests = [len(ids) - prefix for ids, _ in documents]
    begins = prefix + np.cumsum([0, *rests])[:-1]
    ids = np.concatenate([documents[0][0][:prefix], *(ids[prefix:] for ids, _ in documents)]).astype(np.int64)
    positions = np.concatenate([np.arange(prefix), *(np.arange(prefix, prefix + rest) for rest in rests)])
    owner = torch.from_numpy(np.repeat(np.arange(len(documents) + 1), [prefix, *rests]))
    index, targets = [], []
    for begin, (_, labels) in zip(begins, documents, strict=True):
        learned = np.flatnonzero(labels[1:] != IGNORED)
        index.append(np.where(learned < prefix, learned, learned - prefix + begin))
        targets.append(labels[1:][learned].astype(np.int64))
    position = torch.arange(len(ids))
    visible = (position[:, None] >= position) & ((owner[:, None] == owner) | (owner == 0))
    batch: MicroBatch = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "attention_mask": visible[None, None],
        "loss_index": torch.from_numpy(np.concatenate(index)),
        "targets": torch.from_numpy(np.concatenate(targets)),
    }
    if has_weights(weights):
        batch["loss_weights"] = learned_weights([[document] for document in documents], weights)
    return batch


ROUND = 64  # tokens; lengths of concatenated micro-batches are multiples of it
MEASURED_STEPS = 2000  # optimizer steps by which the lengths of micro-batches are chosen
MOST_PADDING = 0.03  # share of padding in packed rows, if all micro-batches have the same length


@dataclass(frozen=True)
class Concatenated:
    """The layout of concatenated documents: the allowed lengths of its micro-batches, ascending."""

    lengths: tuple[int, ...]
    longest: int  # tokens of the longest document; a constant, because another value would compile the code again

    def fit(self, tokens: int) -> int:
        """Return the smallest allowed length for a number of tokens."""
        return next(length for length in self.lengths if length >= tokens)


@dataclass(frozen=True)
class GridRows:
    """The layout of a grid: the number of rows of a micro-batch."""

    rows: int


Layout = Concatenated | GridRows


def concatenated_layout(
    rows: TokenRows, steps: NDArray[np.int64], budget: int, devices: int = 1, length_cost: float = 0.0
) -> Concatenated:
    """Choose the allowed lengths of concatenated micro-batches.

    Args:
        steps: row numbers of each optimizer step, [steps, global batch].
        length_cost: what one more length costs, in tokens of padding. It depends on how the layers are computed.
    """
    longest = int(rows.lengths.max())
    most = int(rows.tokens[steps].sum(1).max())
    if rows.row_length is not None:
        micro_batch_rows = max(1, min(budget // rows.row_length, math.ceil(steps.shape[1] / devices)))
        count = math.ceil(steps.shape[1] / micro_batch_rows / devices) * devices
        length = _round_up(math.ceil(steps.shape[1] / count) * rows.row_length)
        if rows.tokens[steps].sum() >= (1 - MOST_PADDING) * len(steps) * count * length:
            return Concatenated((length,), longest)
    count = math.ceil(most / max(budget, longest) / devices) * devices
    # 5 % more than the average, because a row is never divided between micro-batches.
    full = _round_up(max(int(rows.tokens[steps].max()), math.ceil(most / count * (1.05 if count > 1 else 1.0))))
    measured = steps[:: -(-len(steps) // MEASURED_STEPS)]
    used = [int(rows.tokens[step][part].sum()) for step in measured for part in assign(rows.tokens[step], full)]
    if len(measured) < len(steps):
        used.append(full)
    return Concatenated(choose_lengths(np.array([_round_up(tokens) for tokens in used]), length_cost), longest)


def _round_up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def assign(tokens: NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Assign rows to few micro-batches, by first-fit-decreasing bin packing.

    Args:
        capacity: largest number of tokens of a micro-batch.

    Returns:
        the indices of each micro-batch's rows.
    """
    bins: list[tuple[int, list[int]]] = []
    for row in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[row])
        for i, (free, rows) in enumerate(bins):
            if size <= free:
                bins[i] = (free - size, [*rows, row])
                break
        else:
            bins.append((capacity - size, [row]))
    return [sorted(rows) for _, rows in bins]


def balance(
    batches: list[list[int]],
    tokens: NDArray[np.integer],
    costs: NDArray[np.integer],
    capacities: Sequence[int],
    devices: int,
) -> list[list[int]]:
    """Exchange rows between the micro-batches of a step, so that no device has much more to compute than the others.

    Rows of equally many tokens take different times: attention grows with the square of a document's length. The devices
    wait for each other only at the end of a step, so the sums of their micro-batches count.

    Args:
        batches: the indices of each micro-batch's rows. The devices take turns.
        tokens: of each row.
        costs: of each row; the largest sum of a device counts.
        capacities: largest number of tokens of each micro-batch.

    Returns:
        micro-batches of the same rows. They are the given ones if the others are no better, or too large.
    """
    free, spent = list(capacities), [0] * devices
    found: list[list[int]] = [[] for _ in batches]
    for row in np.argsort(-costs, kind="stable").tolist():
        size = int(tokens[row])
        places = [place for place, room in enumerate(free) if room >= size]
        if not places:
            return batches
        place = min(places, key=lambda place: (spent[place % devices], -free[place]))
        found[place].append(row)
        free[place] -= size
        spent[place % devices] += int(costs[row])
    before = max(sum(int(costs[rows].sum()) for rows in batches[device::devices]) for device in range(devices))
    return [sorted(batch) for batch in found] if all(found) and max(spent) < before else batches


class StepItem(TypedDict):
    """The work of one device in an optimizer step."""

    micro_batches: list[MicroBatch]
    num_supervised_tokens: int  # tokens with a loss in the step, on all devices
    loss_weight: float  # sum of their weights: the step's loss is divided by it
    tokens: int  # tokens of the step on all devices, without padding


class StepDataset(Dataset[StepItem]):
    """The optimizer steps of a training: item i is the work of this process in step i.

    Args:
        steps: row numbers of each step, [steps, global batch].
        dropout: whether to give every token a key, from which its dropout mask is computed.
        noise: whether to give every token a key and the length of its document, from which NEFTune's noise is computed.
        sharing: when to compute the common prefix of a grid's rows only once; None is never.
        equal_count: whether all processes get the same number of micro-batches, as a sharded base needs. A process that has
            fewer also computes padding batches, which have no loss.
        with_positions: whether padded rows get position ids that show where a document ends.
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
        noise: bool = False,
        group: ProcessGroup | None = None,
        sharing: PrefixSharing | None = None,
        equal_count: bool = False,
        with_positions: bool = False,
    ):
        self.rows, self.steps, self.layout, self.pad_id = rows, steps, layout, pad_id
        self.sharing = None if dropout or noise or rows.row_length else sharing
        self.seed, self.dropout, self.noise = seed, dropout, noise
        self.group, self.equal_count, self.with_positions = group or ProcessGroup(), equal_count, with_positions
        # The pairs of tokens in each row's documents: attention takes that long.
        squares = rows.lengths[rows.documents].astype(np.int64) ** 2
        self._costs = np.add.reduceat(squares, rows.offsets[:-1]) if len(rows) else squares
        # Length of a micro-batch → largest number of documents in it, over all steps.
        self.entries = self._most_documents(layout) if isinstance(layout, Concatenated) else {}

    def _most_documents(self, layout: Concatenated) -> dict[int, int]:
        entries: dict[int, int] = {}
        documents = np.diff(self.rows.offsets)
        for step in range(len(self.steps)):
            for indices in self.assignment(step):
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

    def assignment(self, step: int) -> list[list[int]]:
        """Return the rows of each micro-batch, as indices into the step's rows: the same list on all devices."""
        if isinstance(self.layout, Concatenated):
            tokens, costs = self.rows.tokens[self.steps[step]], self._costs[self.steps[step]]
            batches, fit = assign(tokens, self.layout.lengths[-1]), self.layout.fit
            if self.group.size == 1:
                return batches
            capacities = [fit(int(tokens[rows].sum())) for rows in batches]
            return balance(batches, tokens, costs, capacities, self.group.size)
        width, rows = len(self.steps[step]), self.layout.rows
        return [list(range(first, min(first + rows, width))) for first in range(0, width, rows)]

    def __getitem__(self, step: int) -> StepItem:
        """Return a step's item."""
        chosen = self.steps[step]
        micro_batches = []
        assignment = self.assignment(step)
        local = assignment[self.group.rank :: self.group.size]
        padding_batches = math.ceil(len(assignment) / self.group.size) - len(local) if self.equal_count else 0
        for indices in [*local, *assignment[:padding_batches]]:
            documents = [self.rows[int(chosen[index])] for index in indices]
            weights = [self.rows.weights(int(chosen[index])) for index in indices]
            keys = [self.token_keys(step, index, int(self.rows.tokens[chosen[index]])) for index in indices]
            micro_batches.append(self._micro_batch(documents, weights, keys if self.dropout or self.noise else None))
        for batch in micro_batches[len(local) :]:  # without targets, so without a loss
            batch["loss_index"], batch["targets"] = batch["loss_index"][:0], batch["targets"][:0]
            if "loss_weights" in batch:
                batch["loss_weights"] = batch["loss_weights"][:0]
        num_supervised_tokens = self._supervised_tokens(step)
        return {
            "micro_batches": micro_batches,
            "num_supervised_tokens": num_supervised_tokens,
            "loss_weight": self.loss_weight(step, num_supervised_tokens),
            "tokens": int(self.rows.tokens[chosen].sum()),
        }

    def _supervised_tokens(self, step: int) -> int:
        chosen = self.steps[step].tolist()
        return sum(int((labels[1:] != IGNORED).sum()) for row in chosen for _, labels in self.rows[int(row)])

    def loss_weight(self, step: int, num_supervised_tokens: int | None = None) -> float:
        """Return the sum of the weights of a step's supervised tokens: their number, if no row has weights.

        The number is counted if it is not given.
        """
        chosen = self.steps[step]
        weights = [self.rows.weights(int(row)) for row in chosen]
        if not has_weights(weights):
            return self._supervised_tokens(step) if num_supervised_tokens is None else num_supervised_tokens
        documents = [self.rows[int(row)] for row in chosen]
        return float(learned_weights(documents, weights).sum(dtype=torch.float64))

    def _micro_batch(
        self, rows: list[list[Document]], weights: Weights, keys: list[NDArray[np.int32]] | None
    ) -> MicroBatch:
        if isinstance(self.layout, Concatenated):
            tokens = self.layout.fit(sum(len(ids) for row in rows for ids, _ in row))
            batch = concatenated(rows, tokens, self.entries[tokens] + 1, self.layout.longest, self.pad_id, weights)
            keys = None if keys is None else [np.concatenate(keys)]
            rows = [[document for row in rows for document in row]]
        elif self.sharing and (prefix := self.sharing.shared_length([row[0][0] for row in rows])):
            return share_prefix([row[0] for row in rows], prefix, weights)
        else:
            return self.grid(rows, weights, keys)
        return self._with_keys(batch, rows, keys)

    def grid(self, rows: list[list[Document]], weights: Weights, keys: list[NDArray[np.int32]] | None) -> MicroBatch:
        """Return rows as a grid. `keys` are those of each row's tokens, for dropout."""
        length = self.rows.row_length
        batch = with_targets(
            packed(rows, length, self.pad_id, weights)
            if length
            else padded(rows, self.pad_id, weights, with_positions=self.with_positions)
        )
        return self._with_keys(batch, rows, keys)

    def _with_keys(
        self, batch: MicroBatch, rows: list[list[Document]], keys: list[NDArray[np.int32]] | None
    ) -> MicroBatch:
        """Add what dropout and noise need. `rows` are those of the batch's ids, and `keys` those of each row's tokens."""
        if keys is not None:
            width, size = batch["input_ids"].shape[1], batch["input_ids"].numel()
            batch["token_keys"] = spread(keys, width, size)
            if self.noise:
                batch["document_lengths"] = spread(lengths_of_documents(rows), width, size)
        return batch

    def token_keys(self, step: int, index: int, tokens: int) -> NDArray[np.int32]:
        """Return the keys of a row's tokens; see `token_keys`. `index` is the row's index in the step."""
        return token_keys(self.seed, step, index, tokens)


MAX_LENGTHS = 16


def choose_lengths(used: NDArray[np.integer], cost: float) -> tuple[int, ...]:
    """Return the lengths for which padding and the cost of the lengths are least, together.

    Args:
        used: tokens of each micro-batch; the largest number is always one of the lengths.
        cost: the cost of one more length, in tokens of padding. Compiling or recording for a length takes as long.

    Returns:
        at most `MAX_LENGTHS` of the values of `used`, ascending.
    """
    values, counts = np.unique(used, return_counts=True)
    number, total = np.cumsum(counts), np.cumsum(counts * values)
    # padding[i, j]: of the values from i to j, if all of them get the length of value j
    before, tokens_before = np.concatenate([[0], number[:-1]]), np.concatenate([[0], total[:-1]])
    padding = values[None, :] * (number[None, :] - before[:, None]) - (total[None, :] - tokens_before[:, None])
    padding = np.where(
        np.arange(len(values))[:, None] <= np.arange(len(values))[None, :], padding.astype(float), np.inf
    )
    best = padding[0]  # least padding of the values up to j with one length
    first_of_last: list[NDArray[np.int64]] = [np.zeros(len(values), np.int64)]
    totals = [best[-1] + cost]
    for lengths in range(2, min(MAX_LENGTHS, len(values)) + 1):
        ways = np.concatenate([[np.inf], best[:-1]])[:, None] + padding  # the last length covers the values from i to j
        first_of_last.append(ways.argmin(0))
        best = ways.min(0)
        totals.append(best[-1] + cost * lengths)
    chosen: list[int] = []
    last = len(values) - 1
    for firsts in reversed(first_of_last[: int(np.argmin(totals)) + 1]):
        chosen.append(int(values[last]))
        last = int(firsts[last]) - 1
    return tuple(reversed(chosen))
