"""Load and save the state of a model with loralib's layers, with its keys checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import loralib
import torch
from torch import nn

from loraflow.adapters.lora_updates import Bias
from loraflow.failures import BadModel


def state_of(model: nn.Module, bias: Bias = "none") -> dict[str, torch.Tensor]:
    """Return loralib's checkpoint: A and B, and the biases that `bias` trains."""
    state: dict[str, torch.Tensor] = loralib.lora_state_dict(model, bias=bias)
    return state


def save(model: nn.Module, file: Path, bias: Bias) -> None:
    """Write loralib's checkpoint as safetensors."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    state = state_of(model, bias)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})


def load(model: nn.Module, state: Mapping[str, torch.Tensor], bias: Bias = "none") -> None:
    """Load a checkpoint of `state_of`, or of loralib's own `lora_state_dict`.

    Nothing is loaded unless everything fits.

    Raises:
        BadModel: a layer is merged; an unexpected key; a missing `lora_` key or trained bias; a wrong shape; NaN.
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
    _check_keys(
        "The checkpoint is not of this model's LoRA layers.",
        state.keys() - own.keys(),
        expected - state.keys(),
        expected=f"the {len(expected)} tensors of lora_state_dict(bias={bias})",
        next_step="give the rank, targets, enable_lora and bias with which it was trained",
    )
    for name, tensor in state.items():
        if tensor.shape != own[name].shape or not tensor.isfinite().all():
            raise BadModel(
                "A tensor of the checkpoint does not fit.",
                where=name,
                expected=f"{list(own[name].shape)}, finite",
                got=f"{list(tensor.shape)}, {int((~tensor.isfinite()).sum())} not finite",
                next_step="give the rank, targets and enable_lora with which it was trained",
            )
    nn.Module.load_state_dict(model, dict(state), strict=False)


def load_pretrained(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load pretrained weights into a model that has loralib's layers already.

    Raises:
        BadModel: an unexpected key, or a missing one that is not LoRA's; nothing was loaded.
    """
    own = model.state_dict(keep_vars=True)
    missing = {name for name in own.keys() - state.keys() if "lora_" not in name}
    _check_keys("The weights are not of this model.", state.keys() - own.keys(), missing)
    nn.Module.load_state_dict(model, dict(state), strict=False)


def _check_keys(
    message: str, unexpected: Iterable[str], missing: Iterable[str], *, expected: str = "", next_step: str = ""
) -> None:
    unexpected, missing = sorted(unexpected), sorted(missing)
    if unexpected or missing:
        raise BadModel(
            message,
            where=(unexpected or missing)[0],
            expected=expected,
            got=f"{len(unexpected)} unexpected, {len(missing)} missing",
            next_step=next_step,
        )
