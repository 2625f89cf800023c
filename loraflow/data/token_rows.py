"""Read tokenized rows from the Arrow files of the tokenize stage."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loraflow.data.packing import documents_of_rows

Document = tuple[np.ndarray, np.ndarray]  # ids and labels, int32


class TokenRows:
    """Rows as memory maps of the files. A row is one document, or several if they are packed.

    Args:
        folder: the folder of the Arrow files.
        packing: the packing plan; None if rows are not packed.
    """

    def __init__(self, folder: Path, packing: Path | None = None):
        import pyarrow as pa

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
            import pyarrow.parquet as pq

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
        """Return a row's documents as (ids, labels)."""
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
