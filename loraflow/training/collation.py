"""Turn rows of token ids into a model's inputs, in one of two layouts (see `batches`).

- concatenated: one row of tokens with all documents, and where each begins.
- grid: one row of tokens for each row of the dataset, padded to the longest.

A token's key is a hash of (seed, step, row, token), from which the masks of dropout and NEFTune's noise are computed. So
these do not depend on the micro-batch, the device or the engine.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraflow.data.tokens.token_files import Document, TokenRows
from loraflow.data.tokens.token_labels import IGNORED


def token_keys(seed: int, step: int, index: int, tokens: int) -> NDArray[np.int32]:
    """Return the key of each token of a row.

    Args:
        seed: the training's seed.
        step: the optimizer step, from 0.
        index: the row's index in the step.
    """
    token = np.arange(tokens, dtype=np.uint64) + np.uint64(index << 32)
    return (mix(token ^ mix(np.array([(seed << 32) ^ step], np.uint64))) >> np.uint64(32)).astype(np.int32)


def lengths_of_documents(rows: Sequence[list[Document]]) -> list[NDArray[np.int32]]:
    """Return, for each token of each row, the number of tokens of its document."""
    lengths = [[len(ids) for ids, _ in row] for row in rows]
    return [np.repeat(of_row, of_row).astype(np.int32) for of_row in lengths]


def spread(rows: Sequence[NDArray[np.int32]], row_width: int, size: int) -> torch.Tensor:
    """Return the values of all rows in a flat array in which row i begins at i * row_width; zero elsewhere."""
    flat = np.zeros(size, np.int32)
    for i, values in enumerate(rows):
        flat[i * row_width : i * row_width + len(values)] = values
    return torch.from_numpy(flat)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return mixed


class Grid(TypedDict):
    """Inputs of a model and labels, [rows, tokens] each. Padded rows have a mask, packed rows have position ids."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    loss_weights: NotRequired[Tensor]  # float32, of the labels; absent: 1 for all
    token_keys: NotRequired[Tensor]  # see MicroBatch
    document_lengths: NotRequired[Tensor]


# For each row, the weights of its documents' tokens; None: all are 1.
Weights = Sequence[list[NDArray[np.float32]] | None]


class MicroBatch(TypedDict):
    """Inputs of a model, the flattened positions that predict a supervised token, and these tokens."""

    input_ids: Tensor  # [rows, tokens]
    loss_index: Tensor  # [supervised tokens]
    targets: Tensor  # [supervised tokens]
    loss_weights: NotRequired[Tensor]  # [supervised tokens] float32; absent: 1 for all
    token_keys: NotRequired[Tensor]  # [rows · tokens] int32, for dropout and noise
    # [rows · tokens] int32, tokens of each token's document, for noise; 0: padding
    document_lengths: NotRequired[Tensor]
    attention_mask: NotRequired[Tensor]
    position_ids: NotRequired[Tensor]
    cu_seq_lens_q: NotRequired[Tensor]  # where documents begin, [entries] int32
    cu_seq_lens_k: NotRequired[Tensor]
    max_length_q: NotRequired[int]
    max_length_k: NotRequired[int]


def move_inputs(micro: MicroBatch, device: torch.device | str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Return a micro-batch's tensors, moved to the device, and its numbers."""
    tensors = {key: value.to(device, non_blocking=True) for key, value in micro.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in micro.items() if isinstance(value, int)}


class RowNumber(TypedDict):
    """An item of the stock trainer's dataset: the number of a training or validation row."""

    row: int
    position: NotRequired[int]  # in the order of training
    validation: NotRequired[bool]


def padded(
    rows: Sequence[list[Document]], pad_id: int, weights: Weights | None = None, *, with_positions: bool = False
) -> Grid:
    """Return one document a row, padded on the right to the longest.

    Args:
        with_positions: add position ids that show where a document ends: the padding repeats its last one.
    """
    longest = max(len(ids) for ((ids, _),) in rows)
    shape = (len(rows), longest)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    attention = np.zeros(shape, np.int64)
    for i, ((ids, learned),) in enumerate(rows):
        input_ids[i, : len(ids)], labels[i, 1 : len(ids)], attention[i, : len(ids)] = ids, learned[1:], 1
    grid: Grid = {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "attention_mask": torch.from_numpy(attention),
    }
    if with_positions:
        last = attention.sum(1, keepdims=True) - 1
        grid["position_ids"] = torch.from_numpy(np.minimum(np.arange(longest)[None], last))
    if has_weights(weights):
        grid["loss_weights"] = _weights_grid(rows, weights, longest)
    return grid


def has_weights(weights: Weights | None) -> TypeGuard[Weights]:
    """Tell whether a row has weights of its tokens."""
    return weights is not None and any(of_row is not None for of_row in weights)


def _weights_grid(rows: Sequence[list[Document]], weights: Weights, row_length: int) -> Tensor:
    """Return the weights of a grid's labels. A row without weights has 1, and padding 0."""
    grid = np.zeros((len(rows), row_length), np.float32)
    for i, (documents, of_row) in enumerate(zip(rows, weights, strict=True)):
        start = 0
        for number, (ids, _) in enumerate(documents):
            grid[i, start : start + len(ids)] = 1.0 if of_row is None else of_row[number]
            start += len(ids)
    return torch.from_numpy(grid)


def label_weights(grid: Grid) -> Tensor:
    """Return the weight in the loss of each label of a grid but the first, which is never predicted."""
    return torch.where(grid["labels"][:, 1:] == IGNORED, 0.0, grid["loss_weights"][:, 1:])


def packed(rows: Sequence[list[Document]], row_length: int, pad_id: int, weights: Weights | None = None) -> Grid:
    """Return several documents a row, all rows of one length. Position ids start at 0 in each document.

    Attention stays inside a document: without a mask, transformers reads the borders from the position ids. The first
    token of a document has no label, because the token before it belongs to another document.
    """
    shape = (len(rows), row_length)
    input_ids, labels = np.full(shape, pad_id, np.int64), np.full(shape, IGNORED, np.int64)
    positions = np.zeros(shape, np.int64)
    for i, documents in enumerate(rows):
        start = 0
        for ids, learned in documents:
            end = start + len(ids)
            input_ids[i, start:end], labels[i, start + 1 : end] = ids, learned[1:]
            positions[i, start:end] = np.arange(len(ids))
            start = end
        positions[i, start:] = np.arange(row_length - start)
    grid: Grid = {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
    }
    if has_weights(weights):
        grid["loss_weights"] = _weights_grid(rows, weights, row_length)
    return grid


def with_targets(grid: Grid) -> MicroBatch:
    """Return a grid with the positions that predict a supervised token, and these tokens, instead of labels."""
    labels = grid["labels"]
    shifted = torch.full_like(labels, IGNORED)
    shifted[:, :-1] = labels[:, 1:]
    index = (shifted.flatten() != IGNORED).nonzero()[:, 0]
    batch: MicroBatch = {
        "input_ids": grid["input_ids"],
        "loss_index": index,
        "targets": shifted.flatten()[index],
    }
    if "loss_weights" in grid:
        ahead = torch.zeros_like(grid["loss_weights"])
        ahead[:, :-1] = grid["loss_weights"][:, 1:]
        batch["loss_weights"] = ahead.flatten()[index]
    if "attention_mask" in grid:
        batch["attention_mask"] = grid["attention_mask"]
    if "position_ids" in grid:
        batch["position_ids"] = grid["position_ids"]
    return batch


def concatenated(
    rows: Sequence[list[Document]],
    tokens: int,
    entries: int,
    longest: int,
    pad_id: int,
    weights: Weights | None = None,
) -> MicroBatch:
    """Return concatenated documents, padded to `tokens` with documents of padding that have no loss.

    Args:
        entries: length of `cu_seq_lens_q`; unused entries are `tokens`.
    """
    ids, positions = np.full(tokens, pad_id, np.int64), np.zeros(tokens, np.int64)
    begins, index, targets = [0], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    start = 0
    for document, labels in (document for row in rows for document in row):
        end = start + len(document)
        ids[start:end], positions[start:end] = document, np.arange(len(document))
        learned = np.flatnonzero(labels[1:] != IGNORED)
        index.append(learned + start)
        targets.append(labels[1:][learned].astype(np.int64))
        begins.append(end)
        start = end
    while start < tokens:
        end = min(start + longest, tokens)
        positions[start:end] = np.arange(end - start)
        begins.append(end)
        start = end
    borders = torch.from_numpy(np.array(begins + [tokens] * (entries - len(begins)), np.int32))
    batch: MicroBatch = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "loss_index": torch.from_numpy(np.concatenate(index)),
        "targets": torch.from_numpy(np.concatenate(targets)),
    }
    if has_weights(weights):
        batch["loss_weights"] = learned_weights(rows, weights)
    return batch


def learned_weights(rows: Sequence[list[Document]], weights: Weights) -> Tensor:
    """Return the weights of the supervised tokens of all documents, in order. The first token of each is never predicted."""
    found = [np.empty(0, np.float32)]
    for documents, of_row in zip(rows, weights, strict=True):
        for number, (_, labels) in enumerate(documents):
            learned = labels[1:] != IGNORED
            found.append(np.ones(int(learned.sum()), np.float32) if of_row is None else of_row[number][1:][learned])
    return torch.from_numpy(np.concatenate(found))


@dataclass(frozen=True)
class NoiseKeys:
    """What the keys of the training tokens are computed from, for NEFTune's noise."""

    seed: int
    global_batch: int  # rows of an optimizer step


class RowCollator:
    """Data collator of the stock trainer: turns row numbers into padded or packed grids. Validation rows are not packed.

    Args:
        noise: add to training rows what NEFTune's noise is computed from; None adds nothing.
    """

    def __init__(
        self,
        train: TokenRows,
        validation: TokenRows | None,
        pad_id: int,
        *,
        with_positions: bool = False,
        noise: NoiseKeys | None = None,
    ):
        self.train, self.validation, self.pad_id, self.with_positions = train, validation, pad_id, with_positions
        self.noise = noise

    def __call__(self, examples: list[RowNumber]) -> Grid:
        """Return the grid of the rows."""
        source = self.validation if examples[0].get("validation") else self.train
        assert source is not None
        rows = [source[int(example["row"])] for example in examples]
        weights = [source.weights(int(example["row"])) for example in examples]
        if source.row_length:
            grid = packed(rows, source.row_length, self.pad_id, weights)
        else:
            grid = padded(rows, self.pad_id, weights, with_positions=self.with_positions)
        if self.noise is not None and source is self.train:
            width, size = grid["input_ids"].shape[1], grid["input_ids"].numel()
            lengths = lengths_of_documents(rows)
            keys = [self._keys(example, len(of_row)) for example, of_row in zip(examples, lengths, strict=True)]
            grid["token_keys"], grid["document_lengths"] = spread(keys, width, size), spread(lengths, width, size)
        return grid

    def _keys(self, example: RowNumber, tokens: int) -> NDArray[np.int32]:
        assert self.noise is not None
        step, index = divmod(int(example["position"]), self.noise.global_batch)
        return token_keys(self.noise.seed, step, index, tokens)


EVA_BATCH = 16  # documents per batch: EVA needs more supervised tokens than ranks in each batch


def padded_documents(
    rows: Iterable[list[Document]], pad_id: int, *, with_positions: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Yield inputs of a model, by name, with the rows' documents, one document a row; see `padded`."""
    documents = [[document] for row in rows for document in row]
    for first in range(0, max(1, len(documents) - EVA_BATCH + 1), EVA_BATCH):
        grid = padded(documents[first : first + EVA_BATCH], pad_id, with_positions=with_positions)
        yield {name: value for name, value in grid.items() if isinstance(value, Tensor)}
