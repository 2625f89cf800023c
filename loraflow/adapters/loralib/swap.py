"""Put loralib's layers into a pretrained model, by the names that a recipe gives.

model = AutoModelForCausalLM.from_pretrained(...)              # first load the pretrained weights
swap(model, Settings(r=8, targets=["qkv_proj"], enable_lora={"qkv_proj": ["q", "v"]}))
load(model, safetensors.torch.load_file("lora.safetensors"))   # then A and B (`loralib.checkpoint`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import loralib
from torch import nn

from loraflow.adapters.lora_updates import FUSED_NAMES, AttentionHeads, Bias, block_sizes
from loraflow.adapters.loralib.layers import MergeableLayer, wrap_module
from loraflow.adapters.targets import ALL_LINEAR, in_layers, matches, not_adapted_by_all_linear, selects
from loraflow.config.lora import LoralibConfig, PeftConfig
from loraflow.failures import BadConfig


@dataclass(frozen=True)
class Settings:
    """Which modules become loralib's layers, and how."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    targets: list[str] | str = "all-linear"
    exclude: list[str] | str = field(default_factory=list)
    layers: list[int] | None = None
    bias: Bias = "none"
    enable_lora: Mapping[str, Sequence[str | bool]] = field(default_factory=dict)
    merge_weights: bool = False

    @classmethod
    def of(cls, peft_config: PeftConfig, loralib_config: LoralibConfig) -> Settings:
        """Return the settings of a recipe's two sections."""
        return cls(
            r=peft_config.r,
            lora_alpha=peft_config.lora_alpha,
            lora_dropout=peft_config.lora_dropout,
            targets=peft_config.target_modules,
            exclude=peft_config.exclude_modules,
            layers=peft_config.layers_to_transform,
            bias=peft_config.bias,
            enable_lora=loralib_config.enable_lora,
            merge_weights=loralib_config.merge_weights,
        )

    def blocks_of(self, module: str) -> Sequence[str | bool] | None:
        """Return the enabled blocks of a module, or None if `enable_lora` does not name it."""
        return next((blocks for key, blocks in self.enable_lora.items() if matches(module, key)), None)


def swap(model: nn.Module, settings: Settings) -> dict[str, MergeableLayer]:
    """Replace the modules that the settings name, keep their weights, and leave only LoRA trainable.

    Returns:
        The new layers by name, in the model's order.

    Raises:
        BadConfig: a name matches nothing, loralib has no layer for a module, or it has no such blocks.
    """
    modules = _select(model, settings)
    enabled = {name: _enabled_blocks(model, name, module, settings) for name, module in modules.items()}
    unused = [key for key in settings.enable_lora if not any(matches(name, key) for name in modules)]
    if unused:
        raise BadConfig(
            f"enable_lora names {unused[0]}, which is not a target module.",
            where="loralib_config.enable_lora",
            expected=f"among {', '.join(sorted({name.rsplit('.', 1)[-1] for name in modules}))}",
            got=unused[0],
            next_step="correct the name, or add the module to peft_config.target_modules",
        )
    layers: dict[str, MergeableLayer] = {}
    for name, module in modules.items():
        sizes, flags = enabled[name]
        layers[name] = wrap_module(
            module,
            r=settings.r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            merge_weights=settings.merge_weights,
            sizes=sizes,
            enable_lora=flags,
        )
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    loralib.mark_only_lora_as_trainable(model, bias=settings.bias)
    return layers


def _select(model: nn.Module, settings: Settings) -> dict[str, nn.Module]:
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    left_out = not_adapted_by_all_linear(model) if isinstance(model, PreTrainedModel) else {}
    selected: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if selects(settings.exclude, name) or not in_layers(name, settings.layers):
            continue
        if settings.targets == ALL_LINEAR:
            if isinstance(module, nn.Linear | Conv1D) and module is not head and name not in left_out:
                selected[name] = module
        elif selects(settings.targets, name):
            selected[name] = module
    targets = [] if isinstance(settings.targets, str) else settings.targets
    unmatched = [target for target in targets if not any(matches(name, target) for name in selected)]
    if unmatched or not selected:
        target = unmatched[0] if unmatched else str(settings.targets)
        raise BadConfig(
            f"No module of the base is called {target}.",
            where="peft_config.target_modules",
            got=target,
            next_step="name modules of the base that exclude_modules and layers_to_transform do not leave out",
        )
    return selected


def _enabled_blocks(
    model: nn.Module, name: str, module: nn.Module, settings: Settings
) -> tuple[list[int] | None, list[bool] | None]:
    """Return the sizes of a fused module's blocks and which are adapted; None, None for a module with one update."""
    asked = settings.blocks_of(name)
    if asked is None:
        return None, None
    own = name.rsplit(".", 1)[-1]
    blocks = FUSED_NAMES.get(own)
    rows = module.get_parameter("weight").shape[1 if type(module).__name__ == "Conv1D" else 0]
    where = f"loralib_config.enable_lora.{own}"
    if all(isinstance(block, bool) for block in asked):
        flags = [bool(block) for block in asked]
    else:
        if blocks is None or not set(asked) <= set(blocks):
            raise BadConfig(
                f"{own} has no such blocks.",
                where=where,
                expected=f"among {', '.join(blocks)}" if blocks else "true or false for each of its equal blocks",
                got=str(asked),
                next_step="correct the names of the blocks",
            )
        flags = [block in asked for block in blocks]
    sizes: list[int] | None = None
    if blocks and len(flags) == len(blocks):
        sizes = block_sizes(AttentionHeads.of(getattr(model, "config", None)), own, rows)
    if sizes is None and flags and rows % len(flags) == 0:
        sizes = [rows // len(flags)] * len(flags)
    if sizes is None or not any(flags):
        raise BadConfig(
            f"{name} cannot be divided into these blocks.",
            where=where,
            expected=f"at least one enabled block, and blocks whose rows add up to {rows}",
            got=str(asked),
            next_step="list true or false for equal blocks, or leave the module out of enable_lora",
        )
    return sizes, flags
