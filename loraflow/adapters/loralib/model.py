"""A model with loralib's layers as transformers' trainer uses it: only what is trained is saved and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from pydantic import JsonValue
from torch import nn

from loraflow.adapters.loralib.checkpoint import load, save
from loraflow.adapters.loralib.mergeable_layer import MergeableLayer
from loraflow.adapters.loralib.swap import Settings, swap

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
        settings: which layers, and how.
        seed: the seed of A's initial values.
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
