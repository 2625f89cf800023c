"""How many optimizer steps a training takes, and which row is used when.

The order is one permutation of all rows for each epoch, drawn from seed and epoch alone. Every optimizer step takes the
next `global_batch` rows of it. So a resumed run, another micro-batch or another number of devices sees the same rows in
the same steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class StepCount(NamedTuple):
    """Optimizer steps of a training, and of an epoch."""

    total: int
    per_epoch: int


def count_steps(rows: int, global_batch: int, epochs: float, max_steps: int) -> StepCount:
    """Return the number of optimizer steps. A positive `max_steps` takes precedence over `epochs`."""
    per_epoch = max(1, math.ceil(rows / global_batch))
    return StepCount(max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / global_batch)), per_epoch)


def row_order(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the first `count` rows of the run, epoch after epoch, each a permutation from (seed, epoch)."""
    epochs = math.ceil(count / rows)
    return np.concatenate([np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)])[:count]


def micro_batch_rows(global_batch: int, most: int) -> int:
    """Return the largest number of rows up to `most` that divides the global batch."""
    return max(n for n in range(1, min(most, global_batch) + 1) if global_batch % n == 0)
