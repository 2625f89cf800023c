"""Put loralib's layers into a pretrained model, by the names that a recipe gives.

model = AutoModelForCausalLM.from_pretrained(...)              # first step of loralib's two: the pretrained weights
swap(model, Settings(r=8, targets=["qkv_proj"], enable_lora={"qkv_proj": ["q", "v"]}))
load(model, safetensors.torch.load_file("lora.safetensors"))   # second step: A and B
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import loralib
import torch
from torch import nn

from loraflow.adapters.fused_projections import NAMES, block_sizes
from loraflow.adapters.loralib.layers import Reversible, around
from loraflow.config.recipe import LoralibConfig, PeftConfig
from loraflow.failures import BadConfig, BadModel


@dataclass(frozen=True)
class Settings:
    """What loralib needs to know."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    targets: list[str] | str = "all-linear"
    exclude: list[str] = field(default_factory=list)
    layers: list[int] | None = None
    bias: str = "none"
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


def swap(model: nn.Module, settings: Settings) -> dict[str, Reversible]:
    """Replace the modules that the settings name, keep their weights, and leave only LoRA trainable.

    Returns:
        The new layers by name, in the model's order.

    Raises:
        BadConfig: a name matches nothing, loralib has no layer for a module, or it has no such blocks.
    """
    chosen = _chosen(model, settings)
    enabled = {name: _enabled(model, name, module, settings) for name, module in chosen.items()}
    unused = [key for key in settings.enable_lora if not any(_ends(name, key) for name in chosen)]
    if unused:
        raise BadConfig(
            f"enable_lora names {unused[0]}, which is no target.",
            where="loralib_config.enable_lora",
            expected=f"among {', '.join(sorted({name.rsplit('.', 1)[-1] for name in chosen}))}",
            got=unused[0],
        )
    layers = {}
    for name, module in chosen.items():
        sizes, flags = enabled[name]
        layers[name] = around(
            module, r=settings.r, lora_alpha=settings.lora_alpha, lora_dropout=settings.lora_dropout,
            merge_weights=settings.merge_weights, sizes=sizes, enable_lora=flags,
        )  # fmt: skip
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
    loralib.mark_only_lora_as_trainable(model, bias=settings.bias)
    return layers


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _chosen(model: nn.Module, settings: Settings) -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if any(_ends(name, one) for one in settings.exclude):
            continue
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if settings.layers is not None and number not in settings.layers:
            continue
        if isinstance(settings.targets, str):
            if isinstance(module, nn.Linear | Conv1D) and module is not head:
                found[name] = module
        elif any(_ends(name, one) for one in settings.targets):
            found[name] = module
    wanted = [] if isinstance(settings.targets, str) else settings.targets
    for one in [one for one in wanted if not any(_ends(name, one) for name in found)] or (
        [] if found else ["all-linear"]
    ):
        raise BadConfig(
            f"No module of the base is called {one}.",
            where="peft_config.target_modules",
            got=one,
            next_step="name modules that the base has, outside of exclude_modules and inside of layers_to_transform",
        )
    return found


def _enabled(
    model: nn.Module, name: str, module: nn.Module, settings: Settings
) -> tuple[list[int] | None, list[bool] | None]:
    """Return the sizes of a fused module's blocks and which are adapted; None, None for a module taken whole."""
    asked = next((value for key, value in settings.enable_lora.items() if _ends(name, key)), None)
    if asked is None:
        return None, None
    own = name.rsplit(".", 1)[-1]
    blocks = NAMES.get(own)
    rows = module.weight.shape[1 if type(module).__name__ == "Conv1D" else 0]
    where = f"loralib_config.enable_lora.{own}"
    if all(isinstance(one, bool) for one in asked):
        flags = [bool(one) for one in asked]
    else:
        if blocks is None or not set(asked) <= set(blocks):
            raise BadConfig(
                f"{own} has no such blocks.",
                where=where,
                expected=f"among {', '.join(blocks)}" if blocks else "true or false for each of its equal blocks",
                got=str(asked),
            )
        flags = [block in asked for block in blocks]
    sizes = block_sizes(getattr(model, "config", None), own, rows) if blocks and len(flags) == len(blocks) else None
    if sizes is None and flags and rows % len(flags) == 0:
        sizes = [rows // len(flags)] * len(flags)
    if sizes is None or not any(flags):
        raise BadConfig(
            f"{name} cannot be cut like this.",
            where=where,
            expected=f"at least one block enabled, and blocks that make up {rows} rows",
            got=str(asked),
        )
    return sizes, flags


def state_of(model: nn.Module, bias: str = "none") -> dict[str, torch.Tensor]:
    """Return loralib's checkpoint: A and B, and the biases that `bias` trains (none, all, lora_only)."""
    return loralib.lora_state_dict(model, bias=bias)


def load(model: nn.Module, state: Mapping[str, torch.Tensor], bias: str = "none") -> None:
    """Load a checkpoint of `state_of` or of loralib's own `lora_state_dict`, as `strict=False`, but with its keys checked.

    Nothing is loaded unless everything fits.

    Raises:
        BadModel: a layer is merged; an unexpected key; a `lora_` key or a trained bias is missing; a shape differs; NaN.
    """
    own = model.state_dict(keep_vars=True)
    merged = [name for name, layer in model.named_modules() if isinstance(layer, loralib.LoRALayer) and layer.merged]
    if merged:
        raise BadModel(
            "LoRA weights cannot be loaded into merged layers: undoing the merge would then subtract another ΔW.",
            where=merged[0],
            next_step="call model.train() first",
        )
    expected = state_of(model, bias).keys()
    unexpected, missing = sorted(state.keys() - own.keys()), sorted(expected - state.keys())
    if unexpected or missing:
        raise BadModel(
            "The checkpoint is not of this model's LoRA layers.",
            where=(unexpected or missing)[0],
            expected=f"the {len(expected)} tensors of lora_state_dict(bias={bias})",
            got=f"{len(unexpected)} unexpected, {len(missing)} missing",
            next_step="give the rank, targets, enable_lora and bias with which it was trained",
        )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape or not tensor.isfinite().all():
            raise BadModel(
                "A tensor of the checkpoint does not fit.",
                where=name,
                expected=f"{list(own[name].shape)}, finite",
                got=f"{list(tensor.shape)}, {int((~tensor.isfinite()).sum())} not finite",
            )
    nn.Module.load_state_dict(model, dict(state), strict=False)


def load_pretrained(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load pretrained weights into a model whose layers are loralib's already: everything but `lora_` must be there.

    Raises:
        BadModel: an unexpected key, or a missing one without `lora_`; nothing was loaded.
    """
    own = model.state_dict(keep_vars=True)
    unexpected = sorted(state.keys() - own.keys())
    missing = sorted(name for name in own.keys() - state.keys() if "lora_" not in name)
    if unexpected or missing:
        raise BadModel(
            "The weights are not of this model.",
            where=(unexpected or missing)[0],
            got=f"{len(unexpected)} unexpected, {len(missing)} missing",
        )
    nn.Module.load_state_dict(model, dict(state), strict=False)
