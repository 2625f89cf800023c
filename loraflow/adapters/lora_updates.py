"""An adapter as a list of updates ΔW = scale·B·A, independent of its file format; and the blocks of fused projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


PREFIX = "base_model.model."  # before a module's name in PEFT's files
Bias = Literal["none", "all", "lora_only"]
Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class LoraUpdate:
    """The update of one module: A [r, in] and B [out, r]."""

    down: torch.Tensor  # A
    up: torch.Tensor  # B
    scale: float
    kind: Kind = "linear"
    magnitude: torch.Tensor | None = None  # DoRA's, [out]

    @property
    def rank(self) -> int:
        """Rank r."""
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Adapter:
    """Updates by module name, biases by parameter name, and the settings that PEFT needs for them."""

    updates: dict[str, LoraUpdate]
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    bias: Bias = "none"
    fan_in_fan_out: bool = False


def block_diagonal(up: torch.Tensor, sizes: Sequence[int], enabled: Sequence[bool]) -> torch.Tensor:
    """Return B of one update over a whole fused matrix that is the same as an update of each enabled block.

    loralib's A [n·r, in], for n enabled blocks, stays as it is.

    Args:
        up: loralib's B, [rows of the enabled blocks, r].
        sizes: rows of each block.
        enabled: which blocks have an update.

    Returns:
        B [sum of sizes, n·r]: the part of each block in the block's rows and the columns of its part of A, else zeros.
    """
    rank = up.shape[1]
    whole = up.new_zeros(sum(sizes), rank * sum(enabled))
    row = source_row = column = 0
    for size, on in zip(sizes, enabled, strict=True):
        if on:
            whole[row : row + size, column : column + rank] = up[source_row : source_row + size]
            source_row, column = source_row + size, column + rank
        row += size
    return whole


# Name of the fused module → the names of its blocks, and of the modules that hold them in a split checkpoint.
FUSED_NAMES = {"qkv_proj": ("q", "k", "v"), "c_attn": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}
SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
FUSED = {part: whole for whole, parts in SPLIT.items() for part in parts}  # q_proj → qkv_proj


@dataclass(frozen=True)
class AttentionHeads:
    """How many attention heads a model has; None where its config has no such field."""

    query: int | None = None
    key_value: int | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig | None) -> Self:
        """Read them from transformers' config."""
        return cls(getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None))


def block_sizes(heads: AttentionHeads, module: str, rows: int) -> list[int] | None:
    """Return the rows of each block of a fused module, or None if the heads do not divide its rows.

    Args:
        module: the module's own name, such as qkv_proj.
    """
    count = len(FUSED_NAMES[module])
    key_value = heads.key_value or heads.query
    if count == 2 or not heads.query or not key_value or key_value == heads.query:
        return [rows // count] * count if rows % count == 0 else None
    head_dim, rest = divmod(rows, heads.query + 2 * key_value)
    return None if rest else [heads.query * head_dim, key_value * head_dim, key_value * head_dim]
