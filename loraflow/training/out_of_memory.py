"""Report that the GPU's memory is not enough, with the settings that the next attempt should use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loraflow.config.job_runtime import RetryWith
from loraflow.failures import OutOfMemory
from loraflow.training.memory import Recompute


@dataclass(frozen=True)
class MicroBatchSize:
    """The size of a micro-batch."""

    longest_row: int  # tokens; a micro-batch cannot have fewer
    rows: int | None = None  # None: a micro-batch is measured in tokens
    tokens: int | None = None  # None: a micro-batch is measured in rows
    recompute: Recompute | None = None  # None: the engine does not choose it

    def retry_with(self) -> RetryWith:
        """Return the runtime settings of the next attempt, with the same result; no changes if nothing can be reduced."""
        if self.rows is not None and self.rows > 1:
            return RetryWith(micro_batch=self.rows // 2)
        if self.rows is None and self.tokens is not None and self.tokens > self.longest_row:
            return RetryWith(micro_tokens=max(self.longest_row, self.tokens // 2))
        if self.recompute not in (None, "full"):
            return RetryWith(checkpointing="full")
        return RetryWith()


@contextmanager
def explain_out_of_memory(where: str, retry_with: RetryWith) -> Iterator[None]:
    """Turn torch's out-of-memory error into a failure.

    Args:
        where: what the process did, with which choices.
        retry_with: runtime settings of the next attempt; without changes if there should be none.

    Raises:
        OutOfMemory: torch ran out of memory.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            "The GPU's memory is not enough.",
            where=f"train, {where}"[:600],
            got=str(error)[:300],
            next_step="lower training_config.max_length, or quantize the base (base.quantization: nf4)",
            retry_with=dict(retry_with.changes()),
        ) from error
