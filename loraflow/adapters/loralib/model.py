"""A model with loralib's layers as a trainer sees it: checkpoints of what is trained, loaded with their keys checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loraflow.adapters.loralib.layers import Reversible
from loraflow.adapters.loralib.swap import Settings, load, state_of, swap

FILE = "model.safetensors"  # the name under which transformers' trainer looks for it


class LoralibModel:
    """What is put before a model's own class: saving and loading of LoRA alone."""

    settings: Settings

    def get_base_model(self) -> Any:
        """Return the model: loralib changes it in place, where peft wraps it."""
        return self

    def save_pretrained(self, save_directory: str | Path, *_: Any, is_main_process: bool = True, **__: Any) -> None:
        """Write loralib's checkpoint, `lora_state_dict`, as safetensors."""
        if is_main_process:
            save(self, Path(save_directory) / FILE)

    def load_state_dict(self, state: Any, strict: bool = False, assign: bool = False) -> Any:
        """Load such a checkpoint, out of a merged state too: a trainer loads its best one right after an evaluation."""
        training = self.training  # type: ignore[attr-defined]
        layers = [module for module in self.modules() if isinstance(module, Reversible)]  # type: ignore[attr-defined]
        for layer in layers:
            layer.unmerge()
        load(self, state, self.settings.bias)  # type: ignore[arg-type]
        self.train(training)  # type: ignore[attr-defined]
        return torch.nn.modules.module._IncompatibleKeys([], [])


def prepare(model: Any, settings: Settings, seed: int, *, checkpointing: bool = False) -> Any:
    """Swap the layers of a pretrained model and make it ready for a trainer; the same model comes back.

    Args:
        model: transformers'.
        settings: which layers, and how.
        seed: of A.
        checkpointing: activations are computed anew; then the input needs gradients where nothing before it is trained.
    """
    torch.manual_seed(seed)
    swap(model, settings)
    own = type(model)
    model.__class__ = type(own.__name__, (LoralibModel, own), {"__module__": own.__module__})
    model.settings = settings
    if checkpointing:
        model.enable_input_require_grads()
    return model


def save(model: Any, file: Path) -> None:
    """Write the LoRA state, with the biases that are trained, as safetensors."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    state = state_of(model, model.settings.bias)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file, metadata={"format": "pt"})
