"""What a recipe will train in a base, before anything is loaded: from the base's config and its model without weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from loraflow.adapters import variants
from loraflow.adapters.lora_config import check_targets, check_trainable
from loraflow.adapters.targets import Targets, counted, find_targets
from loraflow.base.architecture import (
    is_tested,
    obstacle_to_fast_engine,
    obstacle_to_packing,
    obstacle_to_quantization,
    stateful_layers,
)
from loraflow.base.stored_weights import model_without_weights
from loraflow.config.lora import PeftConfig
from loraflow.config.recipe import Recipe
from loraflow.data.tokens.positions import Positions
from loraflow.hardware.attention import attention_with_mask
from loraflow.training.choices import refuse_unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)
_TOKENS = 512  # of a row; modules of DeepSeek-V4 compress 128
_STEPS = 16  # the same, where each token is a step (Mamba)


def preview(base: Path, recipe: Recipe) -> list[str]:
    """Return what a recipe will train in a base, a line each.

    Raises:
        BadConfig: peft_config names modules that the base does not have or that cannot be adapted; or the architecture
            does not allow packed rows or the quantization.
        BadModel: the base's model cannot be built from its config.
    """
    model = model_without_weights(base)
    packs, quantization = recipe.training_config.packing, recipe.base.quantization
    refuse_unsupported(model.config, is_packed=packs, quantization=quantization)
    check_targets(model, recipe.peft_config)
    check_trainable(model, recipe.peft_config)
    variants.check(model, recipe.peft_config)
    return [*_lines(base, model.config), f"  {_summary(base, model, find_targets(model, recipe.peft_config))}"]


def describe(base: Path) -> list[str]:
    """Return what an architecture is trained with, and what all-linear adapts in it, a line each.

    Raises:
        BadModel: the base's model cannot be built from its config.
    """
    model = model_without_weights(base)
    return [*_lines(base, model.config), f"  all-linear: {_summary(base, model, find_targets(model, PeftConfig()))}"]


def _summary(base: Path, model: PreTrainedModel, targets: Targets) -> str:
    tokens = _STEPS if "linear_attention" in stateful_layers(model.config) else _TOKENS
    tokens = min(tokens, Positions.of_folder(base).limit or tokens)
    untrained = [] if is_tested(model.config) else without_gradient(model, targets.modules, tokens)
    return targets.summary() + (
        f"; no gradient reaches {counted(untrained)}: their adapters change nothing" if untrained else ""
    )


def without_gradient(model: PreTrainedModel, modules: list[str], tokens: int) -> list[str]:
    """Return those of the modules that training does not call or reach with a gradient, so that their adapters stay 0.

    Args:
        model: on the meta device, with eager attention; its dtype is changed. No module is returned if its code needs
            values (many recurrent layers).
    """
    import torch

    called: set[str] = set()
    for name in modules:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    ids = torch.ones(1, tokens, dtype=torch.long, device="meta")
    try:
        computed = model.eval().to(torch.bfloat16)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        computed.logits.sum().backward()
    except Exception as error:  # code of an architecture may fail in any way
        log.info("Which modules a gradient reaches is known only after the training: %s", error)
        return []
    return [name for name in modules if name not in called or model.get_submodule(name).weight.grad is None]


def _lines(base: Path, config: PreTrainedConfig) -> list[str]:
    lines, positions = Support.of(config).lines(), Positions.of_folder(base)
    if positions.limit is not None:
        lines.append(f"  tokens of a row: at most {positions.limit:,}")
    if positions.switch is not None:
        lines.append(
            f"  LongRoPE: rows of more than {positions.switch:,} tokens have different angles, computed for each document"
        )
    return lines


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
