"""What loraflow does with an architecture: engine, layout of rows, attention, quantizations. `docs/models.md` shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loraflow.base.architecture import (
    is_tested,
    obstacle_to_fast_engine,
    obstacle_to_packing,
    obstacle_to_quantization,
)
from loraflow.hardware.attention import attention_with_mask

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Support:
    """What a base of an architecture is trained with. Reasons are empty where there is nothing to explain."""

    architecture: str
    engine: Literal["fast", "stock"]
    engine_why: str
    rows: Literal["packed or padded", "padded"]
    rows_why: str
    attention: str  # of padded rows
    quantizations: tuple[str, ...]
    refused: tuple[str, ...]  # what is refused, and why

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Support:
        """Decide from a model's configuration; nothing is loaded."""
        slow, unpacked = obstacle_to_fast_engine(config), obstacle_to_packing(config)
        refusals = {kind: obstacle_to_quantization(config, kind) for kind in ("nf4", "fp8")}
        reasons: dict[str, list[str]] = {}
        for kind, why in {**refusals, "packed rows": unpacked}.items():
            if why:
                reasons.setdefault(why, []).append(kind)
        refused = [f"{', '.join(kinds)}: {why}" for why, kinds in reasons.items()]
        if config.get_text_config() is not config:
            refused.append("rows with images or sound: loraflow trains on text")
        return cls(
            config.model_type,
            "stock" if slow else "fast",
            slow,
            "padded" if unpacked else "packed or padded",
            "" if unpacked or is_tested(config) else "packed rows are checked with the weights before the first step",
            attention_with_mask(config),
            tuple(kind for kind, why in refusals.items() if not why),
            tuple(refused),
        )

    def lines(self) -> list[str]:
        """Return the facts for a person, a line each."""
        because = f" (trl and peft), because {self.engine_why}" if self.engine_why else ""
        rows = f" ({self.rows_why})" if self.rows_why else ""
        lines = [
            f"base {self.architecture}: {self.engine} engine{because}",
            f"  rows: {self.rows}{rows}; attention of padded rows: {self.attention}",
            f"  base.quantization: {' or '.join(self.quantizations) + ', on a GPU' if self.quantizations else 'none'}",
        ]
        return lines + [f"  refused: {what}" for what in self.refused]
