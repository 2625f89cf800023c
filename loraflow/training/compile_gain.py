"""Estimate what compiling a model's layers saves in a training on a GPU.

Compiling costs once and saves in each pass (forward and backward of a micro-batch). The figures were measured by
`benchmarks/compile_gain.py` on one H100 with torch 2.11, November 2026. Other cards were not measured: with slower
kernels, fewer launches save less, and fewer reads and writes save more.
"""

from __future__ import annotations

from typing import NamedTuple

COMPILE_SECONDS = 30.0  # in a new process without a cache of compiled code; 5 to 12 s were measured in a warm process
LENGTH_SECONDS = 10.0  # to compile for one more length of micro-batches
MEASURED_TOKENS = 8192


class Saved(NamedTuple):
    """Milliseconds that a pass takes less for each compiled layer."""

    width: int
    without_dropout: float
    with_dropout: float


TABLE = (Saved(576, 5.0, 9.7), Saved(2048, 3.6, 17.7), Saved(3072, 3.6, 24.3))
# A pass of 1,024 tokens saved as much as one of 8,192 at width 576: there, launching the kernels takes the time.
LAUNCHES_WITH_DROPOUT = TABLE[0].with_dropout
# Milliseconds for each layer, token and unit of width, where the passes are recorded as CUDA graphs: nothing but reads and
# writes is saved then. Measured 1.6e-7 to 5.9e-7 without dropout and 8.9e-7 to 14.6e-7 with it.
GRAPHED, GRAPHED_WITH_DROPOUT = 1.6e-7, 8.9e-7


def seconds_saved(width: int, layers: int, dropout: float, passes: int, tokens: int, *, graphed: bool = False) -> float:
    """Return the seconds that compiled layers save in a training, without the time to compile them.

    Args:
        width: the model's hidden size. Between and beyond the measured widths, the next narrower one counts.
        layers: the number of the model's layers.
        dropout: LoRA's dropout. Its masks are most of what an uncompiled layer computes in addition.
        passes: micro-batches of the whole training, on one device.
        tokens: the tokens of a pass.
        graphed: whether the passes are recorded as CUDA graphs.
    """
    if graphed:
        return passes * layers * tokens * width * (GRAPHED_WITH_DROPOUT if dropout > 0 else GRAPHED) / 1e3
    row = max((row for row in TABLE if row.width <= width), default=TABLE[0])
    milliseconds = row.without_dropout
    if dropout > 0:
        share = min(1.0, tokens / MEASURED_TOKENS)
        milliseconds = LAUNCHES_WITH_DROPOUT + (row.with_dropout - LAUNCHES_WITH_DROPOUT) * share
    return passes * layers * milliseconds / 1e3
