"""From token shards to batches: which rows, in which order, in which shape.

A row is one document, or, packed, several. The order is one permutation of all rows for each epoch, drawn from seed
and epoch alone; every optimizer step takes the next `global_batch` rows of it. So a resumed run, another micro-batch
or another number of devices sees the same rows in the same steps.

A step's rows reach the model as micro-batches, in one of two layouts:

- flat: one line of tokens, documents end to end, of a few fixed lengths, so that compiled code never compiles again.
  Attention is told where documents begin (`cu_seq_lens`). What fits into the token budget goes in at once.
- grid: a row each, padded to the longest, for attention that needs a mask; or, where all rows begin with the same and
  that saves arithmetic, one line that has it once (`shared`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from loraflow.data.loss_mask import IGNORED
from loraflow.data.token_rows import Document, TokenRows
from loraflow.training.prefix_sharing import Sharing, shared

ROUND = 64  # tokens; lengths of flat micro-batches are multiples of it
SHAPES = 4  # fixed lengths of flat micro-batches where rows are not packed


def steps_of(rows: int, global_batch: int, epochs: float, max_steps: int) -> tuple[int, int]:
    """Return (optimizer steps, steps per epoch)."""
    per_epoch = max(1, math.ceil(rows / global_batch))
    return (max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / global_batch))), per_epoch


def row_order(rows: int, wanted: int, seed: int) -> np.ndarray:
    """Return the first `wanted` rows of the run, epoch after epoch, each a permutation from (seed, epoch)."""
    epochs = math.ceil(wanted / rows)
    return np.concatenate([np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)])[:wanted]


def micro_batch(global_batch: int, wanted: int) -> int:
    """Return the largest number of rows up to `wanted` that divides the global batch."""
    return max(n for n in range(1, min(wanted, global_batch) + 1) if global_batch % n == 0)


@dataclass(frozen=True)
class Flat:
    """Fixed lengths of flat micro-batches, ascending, with the number of documents that each leaves room for."""

    shapes: tuple[int, ...]
    longest: int  # tokens of the longest document; a constant, or compiled code would compile again

    def fit(self, tokens: int) -> int:
        """Return the smallest length that holds so many tokens."""
        return next(shape for shape in self.shapes if shape >= tokens)


def flat_layout(rows: TokenRows, steps: np.ndarray, budget: int, devices: int = 1) -> Flat:
    """Choose the lengths of flat micro-batches.

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
        return Flat((_up(math.ceil(steps.shape[1] / count) * rows.row_length),), longest)
    count = math.ceil(most / max(budget, longest) / devices) * devices
    # A twentieth of room: documents are dealt into micro-batches whole.
    full = _up(max(int(rows.tokens[steps].max()), math.ceil(most / count * (1.05 if count > 1 else 1.0))))
    return Flat(tuple(sorted({_up(math.ceil(full * k / SHAPES)) for k in range(1, SHAPES + 1)})), longest)


def _up(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND


def deal(tokens: np.ndarray, capacity: int) -> list[list[int]]:
    """Deal rows of so many tokens into as few micro-batches as first-fit-decreasing finds; return their places."""
    bins: list[tuple[int, list[int]]] = []
    for place in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[place])
        for at, (room, places) in enumerate(bins):
            if size <= room:
                bins[at] = (room - size, [*places, place])
                break
        else:
            bins.append((capacity - size, [place]))
    return [sorted(places) for _, places in bins]


class Steps:
    """The optimizer steps of a run as a dataset: item i is what one device needs for step i.

    With `even` all devices get as many micro-batches: those of the last round that have none compute one that nothing
    is learned from.

    An item holds `micro`, the device's micro-batches; `learned`, the number of learned tokens of the whole step, on
    all devices; `tokens`, those of the step without padding.
    """

    def __init__(
        self,
        rows: TokenRows,
        steps: np.ndarray,
        layout: Flat | int,
        pad_id: int,
        *,
        seed: int = 0,
        dropout: bool = False,
        rank: int = 0,
        devices: int = 1,
        sharing: Sharing | None = None,
        even: bool = False,
    ):
        self.rows, self.steps, self.layout, self.pad_id = rows, steps, layout, pad_id
        self.sharing = None if dropout or rows.row_length else sharing
        self.seed, self.dropout, self.rank, self.devices = seed, dropout, rank, devices
        self.even = even
        self.entries: dict[int, int] = {}  # length of a micro-batch → room for documents, whatever step it is of
        if isinstance(layout, Flat):
            self._reserve(layout)

    def _reserve(self, layout: Flat) -> None:
        documents = np.diff(self.rows.offsets)
        for step in range(len(self.steps)):
            for places in self._dealt(step):
                chosen = self.steps[step][places]
                used = int(self.rows.tokens[chosen].sum())
                shape = layout.fit(used)
                here = int(documents[chosen].sum()) + math.ceil((shape - used) / layout.longest)
                self.entries[shape] = max(self.entries.get(shape, 0), here)

    def __len__(self) -> int:
        return len(self.steps)

    def _dealt(self, step: int) -> list[list[int]]:
        """Return the places of a step's micro-batches, for all devices, in an order that is the same everywhere."""
        if isinstance(self.layout, Flat):
            return deal(self.rows.tokens[self.steps[step]], self.layout.shapes[-1])
        width = len(self.steps[step])
        return [list(range(at, min(at + self.layout, width))) for at in range(0, width, self.layout)]

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return a step's item."""
        chosen = self.steps[step]
        micro = []
        dealt = self._dealt(step)
        mine = dealt[self.rank :: self.devices]
        idle = math.ceil(len(dealt) / self.devices) - len(mine) if self.even else 0
        for places in [*mine, *dealt[:idle]]:
            documents = [self.rows[int(chosen[place])] for place in places]
            keys = [self._keys(step, place, int(self.rows.tokens[chosen[place]])) for place in places]
            micro.append(self._batch(documents, keys if self.dropout else None))
        for batch in micro[len(mine) :]:
            batch["loss_index"], batch["targets"] = batch["loss_index"][:0], batch["targets"][:0]
        learned = sum(
            int((labels[1:] != IGNORED).sum()) for row in chosen.tolist() for _, labels in self.rows[int(row)]
        )
        return {"micro": micro, "learned": learned, "tokens": int(self.rows.tokens[chosen].sum())}

    def _batch(self, rows: list[list[Document]], keys: list[np.ndarray] | None) -> dict[str, Any]:
        if isinstance(self.layout, Flat):
            tokens = self.layout.fit(sum(len(ids) for row in rows for ids, _ in row))
            batch = flat(rows, tokens, self.entries[tokens] + 1, self.layout.longest, self.pad_id)
            where = [slice(0, sum(map(len, keys)))] if keys is not None else []
            flat_keys = [np.concatenate(keys)] if keys is not None else []
        elif prefix := self._prefix(rows):
            return shared([row[0] for row in rows], prefix)
        else:
            length = self.rows.row_length
            batch = with_targets(packed(rows, length, self.pad_id) if length else padded(rows, self.pad_id))
            width = batch["input_ids"].shape[1]
            where = [slice(i * width, i * width + len(one)) for i, one in enumerate(keys or [])]
            flat_keys = keys or []
        if keys is not None:
            import torch

            whole = np.zeros(batch["input_ids"].numel(), np.int32)
            for place, one in zip(where, flat_keys, strict=True):
                whole[place] = one
            batch["token_keys"] = torch.from_numpy(whole)
        return batch

    def _prefix(self, rows: list[list[Document]]) -> int:
        return self.sharing.prefix([row[0][0] for row in rows]) if self.sharing is not None else 0

    def _keys(self, step: int, place: int, tokens: int) -> np.ndarray:
        """Return a number for each token of a row, from seed, step, the row's place and the token's place in it."""
        at = np.arange(tokens, dtype=np.uint64) + np.uint64(place << 32)
        return (mixed(at ^ mixed(np.array([(self.seed << 32) ^ step], np.uint64))) >> np.uint64(32)).astype(np.int32)


def mixed(values: np.ndarray) -> np.ndarray:
    """Mix 64-bit numbers so that neighbours have nothing in common (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def flat(rows: list[list[Document]], tokens: int, entries: int, longest: int, pad_id: int) -> dict[str, Any]:
    """Return documents end to end, padded to `tokens` by documents of padding that nothing learns from.

    Returns:
        input_ids and position_ids [1, tokens]; cu_seq_lens_q and _k [entries], where documents begin, the rest of it
        `tokens`; max_length_q and _k, the longest; loss_index and targets [learned], the positions that predict a
        learned token, and that token.
    """
    import torch

    ids, positions = np.full(tokens, pad_id, np.int64), np.zeros(tokens, np.int64)
    begins, index, targets = [0], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    at = 0
    for document, labels in (one for row in rows for one in row):
        end = at + len(document)
        ids[at:end], positions[at:end] = document, np.arange(len(document))
        learned = np.flatnonzero(labels[1:] != IGNORED)
        index.append(learned + at)
        targets.append(labels[1:][learned].astype(np.int64))
        begins.append(end)
        at = end
    while at < tokens:
        end = min(at + longest, tokens)
        positions[at:end] = np.arange(end - at)
        begins.append(end)
        at = end
    borders = torch.from_numpy(np.array(begins + [tokens] * (entries - len(begins)), np.int32))
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "loss_index": torch.from_numpy(np.concatenate(index)),
        "targets": torch.from_numpy(np.concatenate(targets)),
    }


def with_targets(batch: dict[str, Any]) -> dict[str, Any]:
    """Replace a grid's labels by the positions, in its flattened form, that predict a learned token, and that token."""
    import torch

    labels = batch.pop("labels")
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    index = (shifted.flatten() != IGNORED).nonzero()[:, 0]
    return {**batch, "loss_index": index, "targets": shifted.flatten()[index]}


class Collator:
    """TokenRows to padded or packed grids with labels, as trl's own trainer wants them. Validation rows are never packed."""

    def __init__(self, train: TokenRows, validation: TokenRows | None, pad_id: int):
        self.train, self.validation, self.pad_id = train, validation, pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids and labels of shape [rows, tokens], with attention_mask or, packed, position_ids."""
        source = self.validation if examples[0].get("validation") else self.train
        assert source is not None
        rows = [source[int(example["row"])] for example in examples]
        return packed(rows, source.row_length, self.pad_id) if source.row_length else padded(rows, self.pad_id)


def padded(rows: list[list[Document]], pad_id: int) -> dict[str, Any]:
    """Return one document a row, padded on the right to the longest."""
    import torch

    longest = max(len(ids) for ((ids, _),) in rows)
    shape = (len(rows), longest)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    attention = np.zeros(shape, np.int64)
    for i, ((ids, learned),) in enumerate(rows):
        input_ids[i, : len(ids)], labels[i, 1 : len(ids)], attention[i, : len(ids)] = ids, learned[1:], 1
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(attention),
    }


EVA_BATCH = 16  # documents at a time: EVA needs more learned tokens than ranks in each batch


def batches_of(rows: Iterable[list[Document]], pad_id: int) -> Iterator[dict[str, Any]]:
    """Yield batches of training rows' documents, each document padded to a row of its own, as a model's inputs."""
    documents = [[document] for row in rows for document in row]
    for first in range(0, max(1, len(documents) - EVA_BATCH + 1), EVA_BATCH):
        yield padded(documents[first : first + EVA_BATCH], pad_id)


def packed(rows: list[list[Document]], row_length: int, pad_id: int) -> dict[str, Any]:
    """Return several documents a row, all rows of one length; position ids start anew at each document.

    Attention stays inside a document: transformers reads the borders from the position ids where there is no mask.
    The first token of a document has no label, since what stands before it is another document.
    """
    import torch

    shape = (len(rows), row_length)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for i, documents in enumerate(rows):
        at = 0
        for ids, learned in documents:
            end = at + len(ids)
            input_ids[i, at:end], labels[i, at + 1 : end] = ids, learned[1:]
            positions[i, at:end] = np.arange(len(ids))
            at = end
        positions[i, at:] = np.arange(row_length - at)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }
