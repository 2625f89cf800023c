"""Fused projections: which blocks a fused matrix has, in which order, and how many rows each."""

from __future__ import annotations

from typing import Any

# Name of the fused module → its blocks, and what split checkpoints call them.
NAMES = {"qkv_proj": ("q", "k", "v"), "c_attn": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}
SPLIT = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def block_sizes(config: Any, module: str, rows: int) -> list[int] | None:
    """Return the rows of each block of a fused module, or None where `rows` does not fit the configuration.

    Args:
        config: of the model, transformers' or the dictionary of its config.json.
        module: its own name, such as qkv_proj.
        rows: of the fused matrix.
    """

    def of(key: str) -> Any:
        return config.get(key) if isinstance(config, dict) else getattr(config, key, None)

    heads, count = of("num_attention_heads"), len(NAMES[module])
    grouped = of("num_key_value_heads") or heads
    if count == 2 or not heads or grouped == heads:
        return [rows // count] * count if rows % count == 0 else None
    head_dim, rest = divmod(rows, heads + 2 * grouped)
    return None if rest else [heads * head_dim, grouped * head_dim, grouped * head_dim]
