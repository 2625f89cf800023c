"""The memory of a process that trains or evaluates, by part: an estimate that can be compared with the measured peak.

On a CPU it is the process's resident memory, with Python and its libraries. On a GPU it is what torch allocates there.
`memory` has the arithmetic. Its constants for the CPU were fitted to the quickstart (benchmarks/memory_estimate.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from loraflow.training import memory
from loraflow.training.memory import ModelShape, Recompute

PROGRAM = 512 * 2**20  # resident bytes of Python with torch, transformers, peft and trl, before a model is loaded
HEAD_ROWS = 1024  # positions whose logits are in memory at a time, as in loss_head.CHUNK
LOGITS = 3  # arrays of their size: logits, log-probabilities, and the gradient


@dataclass(frozen=True)
class MemoryParts:
    """Bytes of each part at the moment when the process needs most."""

    program: float  # CPU: Python and its libraries. GPU: workspaces of kernels, fragmentation
    weights: float  # frozen
    adapters: float = 0.0  # weights and gradients
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    generation: float = 0.0  # keys and values of the prompts and answers of a batch

    @property
    def total(self) -> float:
        """The sum."""
        return float(sum(asdict(self).values()))

    def as_bytes(self) -> dict[str, int]:
        """Return whole bytes by part, without the parts that are not needed."""
        return {field.name: round(size) for field in fields(self) if (size := getattr(self, field.name))}


@dataclass(frozen=True)
class MicroBatch:
    """What a training step has in memory at a time."""

    tokens: int  # tokens, padding included
    learned: float = 1.0  # share of the tokens that count in the loss
    recompute: Recompute = "none"
    recomputed: float | None = None  # share of the layers, if recompute is selective
    elementwise: bool = False  # the other layers recompute their elementwise operations


def training_parts(
    shape: ModelShape,
    device: Literal["cpu", "cuda"],
    weights: str,
    rank: float,
    batch: MicroBatch,
    *,
    width: int,
    devices: int = 1,
) -> MemoryParts:
    """Return the memory of a training process.

    Args:
        shape: the base's sizes.
        device: cpu or cuda.
        weights: dtype of the frozen weights, or fp8, or nf4.
        rank: the adapters' rank; see `memory.lora_weights`.
        batch: what is computed at a time.
        width: bytes of a number of the activations.
        devices: over how many devices the frozen weights are sharded; 1 if each holds all of them.
    """
    trained = memory.lora_weights(shape, rank)
    logits = _logits(shape, min(HEAD_ROWS, batch.tokens * batch.learned))
    return MemoryParts(
        program=_program(device, logits),
        weights=memory.weight_bytes(shape, weights, devices),
        adapters=trained * memory.ADAPTER_BYTES,
        optimizer=trained * memory.OPTIMIZER_BYTES,
        activations=batch.tokens
        * memory.token_bytes(shape, batch.recompute, width, batch.recomputed, elementwise=batch.elementwise),
        logits=logits,
    )


def generation_parts(
    shape: ModelShape,
    device: Literal["cpu", "cuda"],
    weights: str,
    rows: int,
    prompt: int,
    answer: int,
    *,
    width: int,
    shared: int = 0,
) -> MemoryParts:
    """Return the memory of a process that generates answers.

    Args:
        shape: the model's sizes.
        device: cpu or cuda.
        weights: the dtype.
        rows: answers at a time.
        prompt: tokens of the longest prompt.
        answer: tokens of the longest answer.
        width: bytes of a number of keys and values.
        shared: tokens that all prompts begin with, and that are computed once.
    """
    logits = 2 * rows * shape.vocabulary * 4
    return MemoryParts(
        program=_program(device, logits),
        weights=memory.weight_bytes(shape, weights),
        # The layer that computes keeps nothing for a backward pass: residual, its norm, gate, up and their product.
        activations=rows * (prompt - shared) * (2 * shape.hidden + 3 * shape.intermediate) * width,
        logits=logits,
        generation=rows * (prompt + answer) * shape.layers * 2 * shape.kv_heads * shape.head_dim * width,
    )


def describe(parts: Mapping[str, int]) -> str:
    """Return a line of the parts, the largest first."""
    return ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))


def _logits(shape: ModelShape, positions: float) -> float:
    return LOGITS * positions * shape.vocabulary * 4


def _program(device: str, logits: float) -> float:
    """Return what is taken beside the model. The reserve of a GPU was measured with the logits in it."""
    return PROGRAM if device == "cpu" else max(0.0, memory.RESERVE - logits)
