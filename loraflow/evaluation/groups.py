"""Which rows of a score table are not independent of each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def group_labels(table: pd.DataFrame) -> np.ndarray:
    """Return a number for each row [rows]: rows with the same `group`, or with the same prompt, have the same number.

    The numbers are in the order of the groups' first rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(table)
    keys: dict[tuple[str, str], int] = {}
    edges = [
        (row, n + keys.setdefault((column, value), len(keys)))
        for column in ("group", "prompt")
        if column in table
        for row, value in enumerate(table[column])
        if isinstance(value, str) and value
    ]
    if len(keys) == len(edges):  # all are different
        return np.arange(n)
    graph = coo_array((np.ones(len(edges)), tuple(zip(*edges, strict=True))), shape=(n + len(keys),) * 2)
    _, labels = connected_components(graph, directed=False)
    _, first, compact = np.unique(labels[:n], return_index=True, return_inverse=True)
    numbers: np.ndarray = np.argsort(np.argsort(first))[compact]
    return numbers
