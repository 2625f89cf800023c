"""Fused projections: which blocks a fused matrix has, in which order, and how many rows each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Name of the fused module → the names of its blocks, and of the modules that hold them in a split checkpoint.
NAMES = {"qkv_proj": ("q", "k", "v"), "c_attn": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}
SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


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
        heads: the numbers of the model's heads.
        module: the module's own name, such as qkv_proj.
        rows: the number of rows of the fused matrix.
    """
    count = len(NAMES[module])
    key_value = heads.key_value or heads.query
    if count == 2 or not heads.query or not key_value or key_value == heads.query:
        return [rows // count] * count if rows % count == 0 else None
    head_dim, rest = divmod(rows, heads.query + 2 * key_value)
    return None if rest else [heads.query * head_dim, key_value * head_dim, key_value * head_dim]
