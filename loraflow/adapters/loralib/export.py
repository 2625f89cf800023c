"""Export a model with loralib's layers as a PEFT adapter that gives the same logits."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from loraflow.adapters.lora_updates import Adapter, Bias, LoraUpdate, block_diagonal, convolution
from loraflow.adapters.loralib import layers
from loraflow.adapters.loralib.checkpoint import save, state_of
from loraflow.adapters.loralib.mergeable_layer import MergeableLayer
from loraflow.adapters.loralib.model import LoralibModel
from loraflow.adapters.peft_folder import write_peft


def to_adapter(model: nn.Module, bias: Bias = "none") -> Adapter:
    """Return the updates of all loralib layers, and the biases that `bias` trained.

    Raises:
        BadModel: a convolution in groups, which PEFT cannot express.
    """
    updates: dict[str, LoraUpdate] = {}
    transposed = False
    for name, layer in model.named_modules():
        if isinstance(layer, MergeableLayer):
            updates[name] = _update_of(layer)
            transposed |= isinstance(layer, layers.Linear | layers.MergedLinear) and layer.fan_in_fan_out
    state = state_of(model, bias)
    biases = {name: tensor.detach() for name, tensor in state.items() if "lora_" not in name}
    return Adapter(updates, biases, bias, transposed)


def _update_of(layer: MergeableLayer) -> LoraUpdate:
    down, up = layer.lora_A.detach(), layer.lora_B.detach()
    if isinstance(layer, layers.MergedLinear):
        return LoraUpdate(down, block_diagonal(up, layer.sizes, layer.enable_lora), layer.scaling)
    if isinstance(layer, layers.Conv2d):
        return LoraUpdate(*convolution(down, up, tuple(layer.weight.shape)), layer.scaling, "conv")
    return LoraUpdate(down, up, layer.scaling, "embedding" if isinstance(layer, layers.Embedding) else "linear")


def save_run(model: nn.Module, out: Path) -> None:
    """Save a trained model of `prepare` twice: as a PEFT adapter, and as a checkpoint for further work with loralib."""
    assert isinstance(model, LoralibModel)
    write_peft(to_adapter(model, model.settings.bias), out / "adapter")
    save(model, out / "loralib" / "lora.safetensors", model.settings.bias)
