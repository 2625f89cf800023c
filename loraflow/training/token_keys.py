"""Keys of tokens, from which dropout and NEFTune's noise are computed, so that neither depends on the micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loraflow.data.token_rows import Document


def token_keys(seed: int, step: int, index: int, tokens: int) -> NDArray[np.int32]:
    """Return a hash of seed, step, row (its index in the step) and token, for each token of a row."""
    token = np.arange(tokens, dtype=np.uint64) + np.uint64(index << 32)
    return (mix(token ^ mix(np.array([(seed << 32) ^ step], np.uint64))) >> np.uint64(32)).astype(np.int32)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit numbers (the finalizer of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return mixed


def spread(rows: Sequence[NDArray[np.int32]], row_width: int, size: int) -> torch.Tensor:
    """Return the values of all rows in a flat array in which row i begins at i * row_width; zero elsewhere."""
    flat = np.zeros(size, np.int32)
    for i, values in enumerate(rows):
        flat[i * row_width : i * row_width + len(values)] = values
    return torch.from_numpy(flat)


def document_lengths(rows: Sequence[Sequence[Document]], row_width: int, size: int) -> torch.Tensor:
    """Return the number of tokens of each token's document, in the layout of `spread`; 0 for padding."""
    lengths = [[len(ids) for ids, _ in row] for row in rows]
    return spread([np.repeat(n, n).astype(np.int32) for n in lengths], row_width, size)
