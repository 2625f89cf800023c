"""What a recipe will train in a base, before anything is loaded: from the base's config and its model without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraflow.adapters import variants
from loraflow.adapters.lora_config import check_targets, check_trainable
from loraflow.adapters.targets import find_targets
from loraflow.base.architecture import obstacle_to_packing, obstacle_to_quantization
from loraflow.base.meta import model_without_weights
from loraflow.base.support import Support
from loraflow.config.lora import PeftConfig
from loraflow.config.recipe import Recipe
from loraflow.data.positions import Positions
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def preview(base: Path, recipe: Recipe) -> list[str]:
    """Return what a recipe will train in a base, a line each.

    Args:
        base: folder with the base's config.json.
        recipe: says what to adapt, and how.

    Raises:
        BadConfig: peft_config names modules that the base does not have or that cannot be adapted; or the architecture
            does not allow packed rows or the quantization.
        BadModel: the base's model cannot be built from its config.
    """
    model = model_without_weights(base)
    _refuse(recipe, model.config)
    check_targets(model, recipe.peft_config)
    check_trainable(model, recipe.peft_config)
    variants.check(model, recipe.peft_config)
    return [*_lines(base, model.config), f"  {find_targets(model, recipe.peft_config).summary()}"]


def describe(base: Path) -> list[str]:
    """Return what an architecture is trained with, and what all-linear adapts in it, a line each.

    Raises:
        BadModel: the base's model cannot be built from its config.
    """
    model = model_without_weights(base)
    targets = find_targets(model, PeftConfig())
    return [*_lines(base, model.config), f"  all-linear: {targets.summary()}"]


def _lines(base: Path, config: PreTrainedConfig) -> list[str]:
    lines, positions = Support.of(config).lines(), Positions.of_folder(base)
    if positions.limit is not None:
        lines.append(f"  tokens of a row: at most {positions.limit:,}")
    if positions.switch is not None:
        lines.append(
            f"  LongRoPE: rows of more than {positions.switch:,} tokens have other angles, and each document its own"
        )
    return lines


def _refuse(recipe: Recipe, config: PreTrainedConfig) -> None:
    quantization = recipe.base.quantization
    for where, asked, obstacle in (
        ("training_config.packing", recipe.training_config.packing, obstacle_to_packing(config)),
        ("base.quantization", quantization, obstacle_to_quantization(config, quantization) if quantization else ""),
    ):
        if asked and obstacle:
            raise BadConfig(
                f"The base's architecture {config.model_type} does not allow {where}: {str(asked).lower()}.",
                where=where,
                got=obstacle,
                next_step=f"set {where} to {'false' if asked is True else 'null'}",
            )
