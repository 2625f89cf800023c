"""A model with loralib's layers as a PEFT adapter that gives the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import loralib

from loraflow.adapters.lora_updates import Adapter, Update, block_diagonal, convolution, write_peft
from loraflow.adapters.loralib import layers
from loraflow.adapters.loralib.model import save


def to_adapter(model: Any, bias: str = "none") -> Adapter:
    """Return the updates of all loralib layers, and the biases that `bias` trained.

    Raises:
        BadModel: a convolution in groups, which PEFT cannot express.
    """
    updates = {}
    transposed = False
    for name, layer in model.named_modules():
        if not isinstance(layer, layers.Reversible):
            continue
        down, up = layer.lora_A.detach(), layer.lora_B.detach()
        if isinstance(layer, layers.MergedLinear):
            updates[name] = Update(*block_diagonal(down, up, layer.sizes, layer.enable_lora), layer.scaling)
        elif isinstance(layer, layers.Conv2d):
            updates[name] = Update(*convolution(down, up, tuple(layer.weight.shape)), layer.scaling, "conv")
        else:
            kind = "embedding" if isinstance(layer, layers.Embedding) else "linear"
            updates[name] = Update(down, up, layer.scaling, kind)
        transposed |= getattr(layer, "fan_in_fan_out", False)
    state = loralib.lora_state_dict(model, bias=bias)
    biases = {name: tensor.detach() for name, tensor in state.items() if "lora_" not in name}
    return Adapter(updates, biases, bias, transposed)


def save_run(model: Any, out: Path) -> None:
    """Save a trained model of `loralib.model.prepare` twice: as a PEFT adapter, and for who goes on with loralib."""
    write_peft(to_adapter(model, model.settings.bias), out / "adapter")
    save(model, out / "loralib" / "lora.safetensors")
