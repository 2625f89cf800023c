"""Write tokenized rows in the layout of `datasets.save_to_disk`, and the packing plan as Parquet; and read them."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from loraflow.data.tokens.packing import documents_of_rows
from loraflow.data.tokens.token_labels import all_weights, joined_weights

SHARD = "data-00000-of-00001.arrow"
_FEATURES: dict[str, JsonValue] = {
    "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "length": {"dtype": "int32", "_type": "Value"},
}
_WEIGHTS: dict[str, JsonValue] = {"loss_weights": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"}}


def _schema(features: dict[str, JsonValue], *, weighted: bool) -> pa.Schema:
    columns = [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32())]
    if weighted:
        columns.append(("loss_weights", pa.list_(pa.float32())))
    return pa.schema(columns, metadata={b"huggingface": json.dumps({"info": {"features": features}}).encode()})


@dataclass(frozen=True)
class TokenBatch:
    """Tokenized rows as flat arrays: the ids and labels of all rows, one row after another, and their lengths."""

    ids: np.ndarray  # int32
    labels: np.ndarray  # int32
    lengths: np.ndarray  # int32
    weights: np.ndarray | None = None  # float32, of each token in the loss; None: 1 for all that have a label


BATCH_ROWS = 500  # rows of the file in an Arrow batch. Another number gives other bytes, and so another digest


def batches_of(parts: Iterable[tuple[TokenBatch, np.ndarray]]) -> Iterator[TokenBatch]:
    """Yield batches of BATCH_ROWS rows of the file.

    Args:
        parts: batches of any size; and, for each row of the file, whether it is in the batch.
    """
    pieces: list[TokenBatch] = []
    filled = 0
    for batch, kept in parts:
        rows = np.concatenate(([0], np.cumsum(kept)))
        tokens = np.concatenate(([0], np.cumsum(batch.lengths, dtype=np.int64)))
        begin = 0
        while begin < len(kept):
            end = min(begin + BATCH_ROWS - filled, len(kept))
            first, last = rows[begin], rows[end]
            part = slice(tokens[first], tokens[last])
            weights = None if batch.weights is None else batch.weights[part]
            pieces.append(TokenBatch(batch.ids[part], batch.labels[part], batch.lengths[first:last], weights))
            filled, begin = filled + end - begin, end
            if filled == BATCH_ROWS:
                yield _joined(pieces)
                pieces, filled = [], 0
    if pieces:
        yield _joined(pieces)


def _joined(pieces: list[TokenBatch]) -> TokenBatch:
    return TokenBatch(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.labels for piece in pieces]),
        np.concatenate([piece.lengths for piece in pieces]),
        joined_weights([(piece.labels, piece.weights) for piece in pieces]),
    )


@contextmanager
def open_shard(folder: Path, *, weighted: bool = False) -> Iterator[Callable[[TokenBatch], None]]:
    """Make a folder that `datasets.load_from_disk` opens, and yield the function that appends a batch to its shard.

    `weighted` adds the column `loss_weights`, with the weight of each token in the loss.
    """
    folder.mkdir()
    features = {**_FEATURES, **_WEIGHTS} if weighted else _FEATURES
    schema = _schema(features, weighted=weighted)
    with pa.OSFile(str(folder / SHARD), "wb") as file, pa.ipc.new_stream(file, schema) as writer:

        def append(batch: TokenBatch) -> None:
            if len(batch.lengths):
                writer.write_batch(_record_batch(batch, schema))

        yield append
    # As datasets.save_to_disk writes it, but with a constant fingerprint: equal rows give equal bytes.
    state: dict[str, JsonValue] = {
        "_data_files": [{"filename": SHARD}],
        "_fingerprint": "loraflow",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    info: dict[str, JsonValue] = {
        "citation": "",
        "description": "",
        "features": features,
        "homepage": "",
        "license": "",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1))


def write_packing(file: Path, row_of: np.ndarray) -> None:
    """Write the packed row of each document, int32, as the column `row` of a Parquet file."""
    pq.write_table(pa.table({"row": _arrow(row_of)}), file)


def _record_batch(batch: TokenBatch, schema: pa.Schema) -> pa.RecordBatch:
    offsets = np.zeros(len(batch.lengths) + 1, np.int32)
    np.cumsum(batch.lengths, out=offsets[1:])
    columns = [
        pa.ListArray.from_arrays(_arrow(offsets), _arrow(batch.ids)),
        pa.ListArray.from_arrays(_arrow(offsets), _arrow(batch.labels)),
        _arrow(batch.lengths),
    ]
    if "loss_weights" in schema.names:
        weights = _arrow(all_weights(batch.labels, batch.weights))
        columns.append(pa.ListArray.from_arrays(_arrow(offsets), weights))
    return pa.record_batch(columns, schema=schema)


def _arrow(values: np.ndarray) -> pa.Array:
    """Return values as an Arrow array. `pa.array` would import pandas first."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


Document = tuple[np.ndarray, np.ndarray]  # ids and labels, int32


class TokenRows:
    """Rows as memory maps of the files. A row is one document, or several if they are packed."""

    def __init__(self, folder: Path, packing: Path | None = None):
        files = sorted(folder.glob("*.arrow"))
        columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._weights: list[np.ndarray] = []  # of each batch; empty if the files have none
        for file in files:
            for batch in pa.ipc.open_stream(pa.memory_map(str(file))):
                ids, labels = batch.column("input_ids"), batch.column("labels")
                columns.append((ids.flatten().to_numpy(), labels.flatten().to_numpy(), np.diff(ids.offsets.to_numpy())))
                if "loss_weights" in batch.schema.names:
                    self._weights.append(batch.column("loss_weights").flatten().to_numpy())
        self._ids, self._labels = [ids for ids, _, _ in columns], [labels for _, labels, _ in columns]
        lengths = [batch_lengths for _, _, batch_lengths in columns]
        self.lengths = np.concatenate(lengths) if lengths else np.empty(0, np.int32)
        counts = [len(batch_lengths) for batch_lengths in lengths]
        self._batch = np.repeat(np.arange(len(counts)), counts)
        self._start = np.concatenate([np.cumsum(n) - n for n in lengths]) if lengths else np.empty(0, int)
        self.row_length: int | None = None  # packed rows are padded to the longest of them, so that shapes never change
        if packing is not None:
            plan = pq.read_table(packing)["row"].to_numpy()
            self.documents, self.offsets = documents_of_rows(plan)
            self.row_length = int(np.bincount(plan, weights=self.lengths).max())
        else:
            self.documents, self.offsets = np.arange(len(self.lengths)), np.arange(len(self.lengths) + 1)
        #: tokens of each row
        self.tokens = np.add.reduceat(self.lengths[self.documents], self.offsets[:-1]) if len(self) else self.lengths

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> list[Document]:
        return [self.document(int(n)) for n in self.documents[self.offsets[row] : self.offsets[row + 1]]]

    def weights(self, row: int) -> list[np.ndarray] | None:
        """Return the weights in the loss of the tokens of each document of a row, float32; None if all are 0 or 1.

        A token whose label is IGNORED has the weight 0.
        """
        if not self._weights:
            return None
        found = []
        for number in self.documents[self.offsets[row] : self.offsets[row + 1]]:
            start = self._start[number]
            found.append(self._weights[self._batch[number]][start : start + self.lengths[number]])
        return found

    def document(self, number: int) -> Document:
        """Return a document as (ids, labels), which are views of the file."""
        start, batch = self._start[number], self._batch[number]
        end = start + self.lengths[number]
        return self._ids[batch][start:end], self._labels[batch][start:end]
