"""What memory the stages of a run will need, by part, before they run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from loraflow.execution.cache import look_up
from loraflow.execution.look_rows import checked_rows
from loraflow.execution.plan import base_config
from loraflow.execution.workspace import Workspace
from loraflow.stages import RESOLVE_BASE, TOKENIZE
from loraflow.training import memory
from loraflow.training.adapter_rank import adapter_rank
from loraflow.training.memory import Recompute
from loraflow.training.memory_parts import MemoryParts, MicroBatch, generation_parts, training_parts

if TYPE_CHECKING:
    from loraflow.config import Recipe


@dataclass(frozen=True)
class PlannedMemory:
    """The memory of training and evaluation, in bytes."""

    device: Literal["cpu", "cuda"]
    least: float  # memory of a training that recomputes all activations
    training: MemoryParts  # at full speed
    evaluation: MemoryParts


def planned_memory(workspace: Workspace) -> PlannedMemory | None:
    """Return the memory of a recipe's stages on this machine's device; None if the base's config is not on this machine.

    Rows are taken as long as training_config.max_length allows, until they are tokenized.
    """
    recipe, config = workspace.recipe, base_config(workspace)
    shape = memory.shape_of(json.loads(config.read_text(encoding="utf-8"))) if config else None
    if shape is None:
        return None
    training, rank = recipe.training_config, adapter_rank(shape, [recipe.peft_config])
    width = 2 if training.bf16 or training.fp16 else {"float32": 4}.get(recipe.base.dtype, 2)
    weights = recipe.base.quantization or recipe.base.dtype
    device, (longest, learned) = _device(recipe), _rows(workspace)
    batch = MicroBatch(_tokens(recipe, device, longest), learned, _recompute(recipe, device))
    least, _ = memory.needed(shape, weights, rank, longest, width)
    scored = recipe.evaluation
    return PlannedMemory(
        device,
        least,
        training_parts(shape, device, weights, rank, batch, width=width),
        generation_parts(
            shape,
            device,
            scored.dtype,
            recipe.runtime.eval_batch_size,
            longest,
            scored.max_new_tokens,
            width=4 if scored.dtype == "float32" else 2,
        ),
    )


def _tokens(recipe: Recipe, device: str, longest: int) -> int:
    """Return the tokens that are computed at a time: padded rows on a CPU, concatenated ones on a GPU."""
    runtime, training = recipe.runtime, recipe.training_config
    if device == "cpu":
        return (runtime.micro_batch or training.per_device_train_batch_size) * longest
    return runtime.micro_tokens or max(longest, memory.ENOUGH_TOKENS)


def _recompute(recipe: Recipe, device: str) -> Recompute:
    """Return what the recipe or the runtime asks to be recomputed; what `auto` chooses is not known before the training."""
    asked = recipe.runtime.checkpointing
    if asked == "elementwise" and (device == "cpu" or recipe.runtime.compile == "off"):
        return "none"  # only compiled layers do so
    if asked != "auto":
        return asked
    return "full" if recipe.training_config.gradient_checkpointing else "none"


def _device(recipe: Recipe) -> Literal["cpu", "cuda"]:
    if recipe.runtime.device != "auto":
        return recipe.runtime.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(workspace: Workspace) -> tuple[int, float]:
    """Return the tokens of the longest row, and the share of the tokens that is learned."""
    store = workspace.store
    rows = checked_rows(workspace)
    base = look_up(store, workspace.job(RESOLVE_BASE, {})).ref
    tokens = look_up(store, workspace.job(TOKENIZE, {"rows": rows, "base": base})).ref if rows and base else None
    figures = store.manifest(tokens).figures if tokens else {}
    longest, learned = figures.get("longest"), figures.get("supervised_share")
    if workspace.recipe.training_config.packing or not isinstance(longest, int):
        longest = workspace.recipe.training_config.max_length
    return longest, learned if isinstance(learned, float) else 1.0
