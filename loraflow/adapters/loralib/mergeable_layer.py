"""The base class of loralib's layers: exact unmerging, and the use of a pretrained module's weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import nn


class MergeableLayer(nn.Module):
    """Merging on `eval()` and exact unmerging on `train()`, for a layer with a `weight`, a `delta()` and A and B."""

    weight: torch.Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    scaling: float
    merged: bool
    merge_weights: bool
    original: torch.Tensor  # the weight before merging; only while `merged`

    def delta(self) -> torch.Tensor:
        """Return ΔW without the scale, in the shape of the weight."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Self:
        """Set training mode. With `merge_weights`, ΔW is part of the weight in evaluation mode."""
        nn.Module.train(self, mode)
        if self.merge_weights and mode:
            self.unmerge()
        elif self.merge_weights:
            self.merge()
        return self

    @torch.no_grad()
    def merge(self) -> None:
        """Add ΔW to the weight, rounded once, and store the original weight."""
        if self.merged:
            return
        self.original = self.weight.data
        wide = torch.promote_types(self.weight.dtype, self.lora_A.dtype)
        self.weight.data = (self.weight.data.to(wide) + self.delta() * self.scaling).to(self.weight.dtype)
        self.merged = True

    def unmerge(self) -> None:
        """Restore the original weight, bit for bit."""
        if self.merged:
            self.weight.data = self.original
            del self.original
            self.merged = False

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        if self.merged:  # a layer that moves to another device takes its original weight along
            self.original = fn(self.original)
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        """Save the original weight: a merged one, loaded as the base, would get ΔW twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.original

    def wrap(self, module: nn.Module) -> None:
        """Use a pretrained module's weight, bias and mode, and initialise A and B beside them."""
        self.weight = module.get_parameter("weight")
        if "bias" in module._parameters:
            self.register_parameter("bias", module._parameters["bias"])
        self.weight.requires_grad_(False)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for name in ("lora_A", "lora_B"):
            shape = self.get_parameter(name).shape
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.weight.device)))
        self.reset_lora_parameters()
        self.train(module.training)

    def reset_lora_parameters(self) -> None:
        """Initialise A at random. B stays zero, so that the model starts as the pretrained one."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def in_lora_dtype(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in the dtype of A and B; under autocast, torch casts all three itself."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)
