"""Keys of the tokens of a training, from which the masks of dropout and NEFTune's noise are computed.

A key is a hash of (seed, step, row, token). So masks and noise do not depend on the micro-batch, the device or the engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from loraflow.data.token_rows import Document


def token_keys(seed: int, step: int, index: int, tokens: int) -> NDArray[np.int32]:
    """Return the key of each token of a row.

    Args:
        seed: the training's seed.
        step: the optimizer step, from 0.
        index: the row's index in the step.
        tokens: number of tokens of the row.
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
