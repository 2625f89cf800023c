"""When the GPU's memory is not enough: a failure that says what the next attempt should try."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import JsonValue

from loraflow.failures import OutOfMemory
from loraflow.training.memory import Recompute


@dataclass(frozen=True)
class MicroBatchSize:
    """How much goes through the model at a time."""

    longest_row: int  # tokens; fewer cannot go in
    rows: int | None = None  # None: a micro-batch is measured in tokens
    tokens: int | None = None  # None: a micro-batch is measured in rows
    recompute: Recompute | None = None  # None: the engine does not choose it

    def reduced(self) -> dict[str, JsonValue]:
        """Return the runtime settings that need less memory and give the same result; empty if none is left."""
        if self.rows is not None and self.rows > 1:
            return {"micro_batch": self.rows // 2}
        if self.rows is None and self.tokens is not None and self.tokens > self.longest_row:
            return {"micro_tokens": max(self.longest_row, self.tokens // 2)}
        if self.recompute not in (None, "full"):
            return {"checkpointing": "full"}
        return {}


@contextmanager
def explain_out_of_memory(where: str, instead: Mapping[str, JsonValue]) -> Iterator[None]:
    """Turn torch's out-of-memory error into a failure.

    Args:
        where: what was being done, with which choices.
        instead: runtime settings of the next attempt; empty if another attempt is of no use.

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
            instead=dict(instead),
        ) from error
