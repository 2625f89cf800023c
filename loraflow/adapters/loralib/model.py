"""A model with loralib's layers as transformers' trainer uses it: only what is trained is saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import loralib
import torch
from pydantic import JsonValue
from torch import nn

from loraflow.adapters.lora_updates import Adapter, Bias, LoraUpdate, block_diagonal
from loraflow.adapters.loralib import layers
from loraflow.adapters.loralib.layers import MergeableLayer
from loraflow.adapters.loralib.swap import Settings, swap
from loraflow.adapters.peft_folder import write_peft
from loraflow.failures import BadModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FILE = "model.safetensors"  # the name under which transformers' trainer looks for it


class LoralibModel(nn.Module):
    """A mixin that `prepare` adds to a model's class: saving and loading handle only the trained parameters."""

    settings: Settings

    def get_base_model(self) -> Self:
        """Return the model itself: loralib changes a model in place, while peft wraps it."""
        return self

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **_: JsonValue,
    ) -> None:
        """Write loralib's checkpoint, `lora_state_dict`, as safetensors. The trainer's other options do not apply."""
        if is_main_process:
            save(self, Path(save_directory) / FILE, self.settings.bias)

    def load_state_dict(
        self, state_dict: Mapping[str, torch.Tensor], strict: bool = False, assign: bool = False
    ) -> torch.nn.modules.module._IncompatibleKeys:
        """Load such a checkpoint, even if layers are merged: a trainer loads its best one right after an evaluation."""
        training = self.training
        for layer in [module for module in self.modules() if isinstance(module, MergeableLayer)]:
            layer.unmerge()
        load(self, state_dict, self.settings.bias)
        self.train(training)
        return torch.nn.modules.module._IncompatibleKeys([], [])


def prepare(model: PreTrainedModel, settings: Settings, seed: int, *, checkpointing: bool = False) -> PreTrainedModel:
    """Swap the layers of a pretrained model and make it ready for a trainer.

    Args:
        model: transformers'; it is changed in place and returned.
        checkpointing: activations are recomputed; then the input needs gradients, if nothing before it is trained.
    """
    torch.manual_seed(seed)
    swap(model, settings)
    own = type(model)
    model.__class__ = type(own.__name__, (LoralibModel, own), {"__module__": own.__module__})
    if checkpointing:
        model.enable_input_require_grads()
    swapped: nn.Module = model
    assert isinstance(swapped, LoralibModel)
    swapped.settings = settings
    return model


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
            "LoRA weights cannot be loaded into merged layers: unmerging would then subtract a different ΔW.",
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
                next_step="give the rank, targets and enable_lora with which it was trained",
            )
    nn.Module.load_state_dict(model, dict(state), strict=False)


def to_adapter(model: nn.Module, bias: Bias = "none") -> Adapter:
    """Return the updates of all loralib layers, and the biases that `bias` trained."""
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
    return LoraUpdate(down, up, layer.scaling, "embedding" if isinstance(layer, layers.Embedding) else "linear")


def save_run(model: nn.Module, out: Path) -> None:
    """Save a trained model of `prepare` twice: as a PEFT adapter, and as a checkpoint for further work with loralib."""
    assert isinstance(model, LoralibModel)
    write_peft(to_adapter(model, model.settings.bias), out / "adapter")
    save(model, out / "loralib" / "lora.safetensors", model.settings.bias)
