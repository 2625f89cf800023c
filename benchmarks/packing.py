"""Plan the packing of a million documents: loraflow, and trl's best-fit-decreasing.

python benchmarks/packing.py
"""

import statistics
import time

import numpy as np
import pyarrow as pa
from trl.data_utils import _pack_bfd

from loraflow.data.tokens.packing import best_fit_decreasing

if __name__ == "__main__":
    lengths = np.clip(np.random.default_rng(1).lognormal(np.log(350), 0.75, 1_000_000), 20, 2048).astype(np.int32)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        rows = best_fit_decreasing(lengths, 2048)
        seconds.append(time.perf_counter() - started)
    own_seconds = statistics.median(seconds)
    print(f"loraflow: {own_seconds:.3f} s, {rows.max() + 1:,} rows, {lengths.sum() / (rows.max() + 1) / 2048:.2%} full")
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))})
    started = time.perf_counter()
    packed = _pack_bfd(table, 2048)
    trl_seconds = time.perf_counter() - started
    print(
        f"trl: {trl_seconds:.1f} s with moving the rows, {len(packed):,} rows; {trl_seconds / own_seconds:.0f} × loraflow"
    )
