"""Write tokenized rows in the layout of `datasets.save_to_disk`, and the packing plan as Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

SHARD = "data-00000-of-00001.arrow"
_FEATURES: dict[str, JsonValue] = {
    "input_ids": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "labels": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "length": {"dtype": "int32", "_type": "Value"},
}
_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("length", pa.int32())],
    metadata={b"huggingface": json.dumps({"info": {"features": _FEATURES}}).encode()},
)


@dataclass(frozen=True)
class TokenBatch:
    """Tokenized rows as flat int32 arrays: the ids and labels of all rows, one row after another, and their lengths."""

    ids: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray


@contextmanager
def open_shard(folder: Path) -> Iterator[Callable[[TokenBatch], None]]:
    """Make a folder that `datasets.load_from_disk` opens, and yield the function that appends a batch to its shard."""
    folder.mkdir()
    with pa.OSFile(str(folder / SHARD), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as writer:

        def append(batch: TokenBatch) -> None:
            if len(batch.lengths):
                writer.write_batch(_record_batch(batch))

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
        "features": _FEATURES,
        "homepage": "",
        "license": "",
    }
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1))


def write_packing(file: Path, row_of: np.ndarray) -> None:
    """Write the packed row of each document, int32, as the column `row` of a Parquet file."""
    pq.write_table(pa.table({"row": _arrow(row_of)}), file)


def _record_batch(batch: TokenBatch) -> pa.RecordBatch:
    offsets = np.zeros(len(batch.lengths) + 1, np.int32)
    np.cumsum(batch.lengths, out=offsets[1:])
    return pa.record_batch(
        [
            pa.ListArray.from_arrays(_arrow(offsets), _arrow(batch.ids)),
            pa.ListArray.from_arrays(_arrow(offsets), _arrow(batch.labels)),
            _arrow(batch.lengths),
        ],
        schema=_SCHEMA,
    )


def _arrow(values: np.ndarray) -> pa.Array:
    """Return int32 values as an Arrow array. `pa.array` would import pandas first."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
