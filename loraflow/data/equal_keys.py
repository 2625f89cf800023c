"""Find rows with equal keys: most keys of a large dataset are different, and are not sorted."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio: spreads keys that differ in few bits


def may_be_equal(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the positions whose key may be that of another position, in ascending order.

    All positions with equal keys are among them, and at most a fifth of the others, where keys are random.
    """
    bits = np.uint64(len(keys).bit_length() + 2)
    slots = ((keys * _FACTOR) >> (np.uint64(64) - bits)).astype(np.int64)
    return np.flatnonzero(np.bincount(slots)[slots] > 1)


def first_equal(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return for each position [rows] the first one with the same key: its own number if there is none before it."""
    first = np.arange(len(keys))
    some = may_be_equal(keys)
    _, index, inverse = np.unique(keys[some], return_index=True, return_inverse=True)
    first[some] = some[index[inverse]]
    return first


def is_repeated(keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell for each position [rows] whether another one has its key."""
    first = first_equal(keys)
    found: NDArray[np.bool_] = first != np.arange(len(keys))
    found[first[found]] = True
    return found
