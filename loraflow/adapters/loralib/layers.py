"""loralib's layers around a pretrained module, which keeps its weight; undoing a merge restores the same bits.

What differs from loralib 0.1.2, whose classes these are:

- A layer uses the parameters of the pretrained module. loralib's constructors initialise new ones.
- `eval()` merges in fp32 and stores the original weight, `train()` restores it. Adding and subtracting in 16 bits drifts.
- A and B are fp32 even if the weights have 16 bits, as in peft: an optimizer's small steps are lost in 16 bits.
- `MergedLinear` has blocks of any sizes, since grouped-query attention has a wider q than k and v. It computes through A
  and B, while loralib computes the whole ΔW in every forward pass.
"""

import math
from collections.abc import Callable
from typing import Self, TypedDict

import loralib
import torch
from torch import nn
from torch.nn import functional as F

from loraflow.failures import BadConfig


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


class Linear(MergeableLayer, loralib.Linear):
    """`nn.Linear`, or transformers' Conv1D with `fan_in_fan_out`, plus B·A."""

    def delta(self) -> torch.Tensor:
        """See `MergeableLayer`."""
        product = self.lora_B @ self.lora_A
        return product.T if self.fan_in_fan_out else product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ + b + dropout(x)·Aᵀ·Bᵀ·scale."""
        result = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if self.merged:
            return result
        down = F.linear(self.in_lora_dtype(self.lora_dropout(x)), self.lora_A)
        return (result + F.linear(down, self.lora_B) * self.scaling).to(result.dtype)


class MergedLinear(MergeableLayer, loralib.MergedLinear):
    """A fused projection, with an update of rank r for each enabled block of outputs.

    Args:
        sizes: rows of each block; loralib's are equal.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sizes: list[int],
        enable_lora: list[bool],
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        bias: bool = True,
        device: str | None = None,
    ):
        assert sum(sizes) == out_features and len(sizes) == len(enable_lora), (sizes, enable_lora, out_features)
        assert r > 0 and any(enable_lora), (r, enable_lora)
        nn.Linear.__init__(self, in_features, out_features, bias=bias, device=device)
        loralib.layers.LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)  # type: ignore[arg-type]
        self.sizes, self.enable_lora, self.fan_in_fan_out = sizes, enable_lora, fan_in_fan_out
        self.scaling = lora_alpha / r
        adapted = sum(size for size, on in zip(sizes, enable_lora, strict=True) if on)
        self.lora_A = nn.Parameter(self.weight.new_zeros((r * sum(enable_lora), in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((adapted, r)))

    def blocks(self) -> list[tuple[slice, slice, slice]]:
        """Return for each enabled block its rows of the output, its rows of A, and its rows of B."""
        blocks: list[tuple[slice, slice, slice]] = []
        row = b_row = 0
        for size, on in zip(self.sizes, self.enable_lora, strict=True):
            if on:
                a_rows = slice(len(blocks) * self.r, (len(blocks) + 1) * self.r)
                blocks.append((slice(row, row + size), a_rows, slice(b_row, b_row + size)))
                b_row += size
            row += size
        return blocks

    def delta(self) -> torch.Tensor:
        """See `MergeableLayer`."""
        product = self.lora_A.new_zeros(self.out_features, self.in_features)
        for rows, a_rows, b_rows in self.blocks():
            product[rows] = self.lora_B[b_rows] @ self.lora_A[a_rows]
        return product.T if self.fan_in_fan_out else product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ + b, and dropout(x)·A_gᵀ·B_gᵀ·scale on top of each enabled block g."""
        result = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if self.merged:
            return result
        # Scaling the narrow tensor is cheaper, and one product for all blocks writes the wide tensor once.
        down = F.linear(self.in_lora_dtype(self.lora_dropout(x)), self.lora_A) * self.scaling
        return (result + F.linear(down, self.block_diagonal_b())).to(result.dtype)

    def block_diagonal_b(self) -> torch.Tensor:
        """Return B with each block in its own rows and columns, [outputs, r·blocks]: a hundredth of ΔW."""
        rank = len(self.lora_A)
        parts: list[torch.Tensor] = []
        row = 0
        for rows, a_rows, b_rows in self.blocks():
            parts.append(self.lora_B.new_zeros(rows.start - row, rank))
            parts.append(F.pad(self.lora_B[b_rows], (a_rows.start, rank - a_rows.stop)))
            row = rows.stop
        parts.append(self.lora_B.new_zeros(self.out_features - row, rank))
        return torch.cat(parts)


class Embedding(MergeableLayer, loralib.Embedding):
    """`nn.Embedding` plus (B·A)ᵀ. A starts at zero and B at random, as in loralib and peft."""

    def reset_lora_parameters(self) -> None:
        """See `MergeableLayer`."""
        nn.init.normal_(self.lora_B)

    def delta(self) -> torch.Tensor:
        """See `MergeableLayer`."""
        return (self.lora_B @ self.lora_A).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens' rows of the weight plus those of ΔW."""
        result = nn.Embedding.forward(self, x)
        if self.merged:
            return result
        rows = F.embedding(x, self.lora_A.T, self.padding_idx)
        return (result + F.linear(rows, self.lora_B) * self.scaling).to(result.dtype)


class _CommonOptions(TypedDict):
    r: int
    lora_alpha: int  # loralib's annotation; any number works
    merge_weights: bool
    device: str


def wrap_module(
    module: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    merge_weights: bool,
    sizes: list[int] | None = None,
    enable_lora: list[bool] | None = None,
) -> MergeableLayer:
    """Return loralib's layer for a pretrained module, with that module's parameters.

    With `sizes` and `enable_lora`, each enabled block of a fused projection has an update of its own.

    Raises:
        BadConfig: loralib has no layer for it.
    """
    from transformers.pytorch_utils import Conv1D

    # On the meta device nothing is allocated or initialised; `wrap` inserts the pretrained parameters.
    common: _CommonOptions = {
        "r": r,
        "lora_alpha": lora_alpha,  # type: ignore[typeddict-item]
        "merge_weights": merge_weights,
        "device": "meta",
    }
    layer: MergeableLayer
    if type(module) is nn.Embedding:
        layer = Embedding(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            max_norm=module.max_norm,
            norm_type=module.norm_type,
            scale_grad_by_freq=module.scale_grad_by_freq,
            **common,
        )
    elif type(module) is nn.Linear or isinstance(module, Conv1D):
        layer = _linear_layer(module, lora_dropout, sizes, enable_lora, common)
    else:
        raise BadConfig(
            f"loralib has no layer for a {type(module).__name__}.",
            expected="Linear, Conv1D (GPT-2's) or Embedding",
            got=str(module)[:200],
            next_step="leave it out of peft_config.target_modules",
        )
    layer.wrap(module)
    return layer


def _linear_layer(
    module: nn.Module,
    lora_dropout: float,
    sizes: list[int] | None,
    enable_lora: list[bool] | None,
    common: _CommonOptions,
) -> Linear | MergedLinear:
    transposed = not isinstance(module, nn.Linear)  # GPT-2's Conv1D: the weight is (in, out)
    shape = module.get_parameter("weight").shape
    inputs, outputs = shape if transposed else shape[::-1]
    bias = module._parameters["bias"] is not None
    if sizes is None or enable_lora is None:
        return Linear(inputs, outputs, bias=bias, lora_dropout=lora_dropout, fan_in_fan_out=transposed, **common)
    return MergedLinear(
        inputs,
        outputs,
        sizes=sizes,
        enable_lora=enable_lora,
        bias=bias,
        lora_dropout=lora_dropout,
        fan_in_fan_out=transposed,
        **common,
    )
