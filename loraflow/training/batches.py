"""From token shards to batches: which rows, in which order, in which shape.

A row is one document, or, packed, several. The order is one permutation of all rows for each epoch, drawn from seed
and epoch alone; every optimizer step takes the next `global_batch` rows of it. So a resumed run, another micro-batch
or another number of devices sees the same rows in the same steps.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from loraflow.data.mask import IGNORED
from loraflow.data.packing import documents_of_rows


class Rows:
    """The rows of a tokenized set."""

    def __init__(self, folder: Path, packing: Path | None = None):
        from datasets import load_from_disk

        self.data = load_from_disk(str(folder)).with_format("numpy")
        self.row_length: int | None = None  # packed rows are all padded to the longest, so that shapes never change
        if packing is not None:
            import pyarrow.parquet as pq

            plan = pq.read_table(packing)["row"].to_numpy()
            self.documents, self.offsets = documents_of_rows(plan)
            self.row_length = int(np.bincount(plan, weights=self.data["length"][:]).max())
        else:
            self.documents, self.offsets = np.arange(len(self.data)), np.arange(len(self.data) + 1)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return a row's documents as (ids, labels)."""
        documents = self.documents[self.offsets[row] : self.offsets[row + 1]]
        found = self.data[documents.tolist()]
        return [
            (np.asarray(ids), np.asarray(labels))
            for ids, labels in zip(found["input_ids"], found["labels"], strict=True)
        ]


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


class Collator:
    """Rows to tensors. Validation rows are marked, and never packed."""

    def __init__(self, train: Rows, validation: Rows | None, pad_id: int):
        self.train, self.validation, self.pad_id = train, validation, pad_id

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids and labels of shape [rows, tokens], with attention_mask or, packed, position_ids."""
        source = self.validation if examples[0].get("validation") else self.train
        assert source is not None
        rows = [source[int(example["row"])] for example in examples]
        return packed(rows, source.row_length, self.pad_id) if source.row_length else padded(rows, self.pad_id)


def padded(rows: list[list[tuple[np.ndarray, np.ndarray]]], pad_id: int) -> dict[str, Any]:
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


def packed(rows: list[list[tuple[np.ndarray, np.ndarray]]], row_length: int, pad_id: int) -> dict[str, Any]:
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
