"""loralib's layers around a pretrained module: its own weight kept, merging that is undone to the bit.

What differs from loralib 0.1.2, whose classes these are:

- a layer takes over the module's parameters, where loralib's constructors draw new ones;
- `eval()` merges in fp32 and keeps the original weight, `train()` puts it back: adding and subtracting in 16 bits drifts;
- A and B are fp32 beside 16-bit weights, as peft has them: an optimizer's small steps vanish in 16 bits;
- `MergedLinear` takes blocks of any sizes (grouped-query attention has a wider q than k and v), and computes through A
  and B: loralib makes the whole ΔW in every forward pass.
"""

from __future__ import annotations

import math
from typing import Any

import loralib
import torch
from torch import nn
from torch.nn import functional as F

from loraflow.failures import BadConfig


class Reversible(nn.Module):
    """Merging on `eval()` and back on `train()`, for a layer with `weight`, `delta()` and loralib's attributes."""

    weight: nn.Parameter
    r: int
    merged: bool
    merge_weights: bool
    scaling: float

    def delta(self) -> torch.Tensor:
        """Return ΔW without the scale, in the shape of the weight."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """Set training mode; where `merge_weights` says so, evaluation has ΔW inside of the weight."""
        nn.Module.train(self, mode)
        if self.merge_weights and mode:
            self.unmerge()
        elif self.merge_weights:
            self.merge()
        return self

    @torch.no_grad()
    def merge(self) -> None:
        """Put ΔW into the weight, rounded once, and keep the weight as it was."""
        if self.merged:
            return
        self.original = self.weight.data
        wide = torch.promote_types(self.weight.dtype, self.lora_A.dtype)
        self.weight.data = (self.weight.data.to(wide) + self.delta() * self.scaling).to(self.weight.dtype)
        self.merged = True

    def unmerge(self) -> None:
        """Put the weight back that was there before: the same bits."""
        if self.merged:
            self.weight.data = self.original
            del self.original
            self.merged = False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if self.merged:  # what moves to another device moves with its original
            self.original = fn(self.original)
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the weight as it was before merging: a merged one, loaded as the base, would get ΔW twice."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + "weight"] = self.original

    def take(self, module: nn.Module) -> None:
        """Take over a module's weight and bias, and draw A and B beside them as loralib does."""
        self.weight = module.weight
        if "bias" in module._parameters:
            self.bias = module.bias
        self.weight.requires_grad_(False)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        for name in ("lora_A", "lora_B"):
            shape = getattr(self, name).shape
            setattr(self, name, nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.weight.device)))
        self.draw()
        self.train(module.training)

    def widened(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in the dtype of A and B; autocast narrows all three, and needs no copy."""
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)

    def draw(self) -> None:
        """Draw A, and leave B zero, so that the model begins as the pretrained one."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


class Linear(Reversible, loralib.Linear):
    """`nn.Linear`, or transformers' Conv1D with `fan_in_fan_out`, plus B·A."""

    def delta(self) -> torch.Tensor:
        """See `Reversible`."""
        product = self.lora_B @ self.lora_A
        return product.T if self.fan_in_fan_out else product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ + b + dropout(x)·Aᵀ·Bᵀ·scale."""
        result = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if self.merged:
            return result
        down = F.linear(self.widened(self.lora_dropout(x)), self.lora_A)
        return (result + F.linear(down, self.lora_B) * self.scaling).to(result.dtype)


class MergedLinear(Reversible, loralib.MergedLinear):
    """A fused projection, with an update of rank r of its own for each enabled block of outputs.

    Args:
        sizes: rows of each block; loralib's are equal.
        enable_lora: which blocks are adapted.
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
        **options: Any,
    ):
        assert sum(sizes) == out_features and len(sizes) == len(enable_lora), (sizes, enable_lora, out_features)
        assert r > 0 and any(enable_lora), (r, enable_lora)
        nn.Linear.__init__(self, in_features, out_features, **options)
        loralib.layers.LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)  # type: ignore[arg-type]
        self.sizes, self.enable_lora, self.fan_in_fan_out = sizes, enable_lora, fan_in_fan_out
        self.scaling = lora_alpha / r
        adapted = sum(size for size, on in zip(sizes, enable_lora, strict=True) if on)
        self.lora_A = nn.Parameter(self.weight.new_zeros((r * sum(enable_lora), in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((adapted, r)))

    def blocks(self) -> list[tuple[slice, slice, slice]]:
        """Return for each enabled block its rows of the output, its rows of A, and its rows of B."""
        found: list[tuple[slice, slice, slice]] = []
        at = taken = 0
        for size, on in zip(self.sizes, self.enable_lora, strict=True):
            if on:
                rank = slice(len(found) * self.r, (len(found) + 1) * self.r)
                found.append((slice(at, at + size), rank, slice(taken, taken + size)))
                taken += size
            at += size
        return found

    def delta(self) -> torch.Tensor:
        """See `Reversible`."""
        product = self.lora_A.new_zeros(self.out_features, self.in_features)
        for rows, a, b in self.blocks():
            product[rows] = self.lora_B[b] @ self.lora_A[a]
        return product.T if self.fan_in_fan_out else product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x·Wᵀ + b, and dropout(x)·A_gᵀ·B_gᵀ·scale on top of each enabled block g."""
        result = F.linear(x, self.weight.T if self.fan_in_fan_out else self.weight, self.bias)
        if self.merged:
            return result
        # The scale goes where the tensor is thin, and one product for all blocks writes the wide one once.
        down = F.linear(self.widened(self.lora_dropout(x)), self.lora_A) * self.scaling
        return (result + F.linear(down, self.up())).to(result.dtype)

    def up(self) -> torch.Tensor:
        """Return B with each block in its own rows and columns, [outputs, r·blocks]; ΔW is a hundred times that."""
        parts, done = [], 0
        for rows, a, b in self.blocks():
            parts += [self.lora_B.new_zeros(rows.start - done, len(self.lora_A)),
                      F.pad(self.lora_B[b], (a.start, len(self.lora_A) - a.stop))]  # fmt: skip
            done = rows.stop
        return torch.cat([*parts, self.lora_B.new_zeros(self.out_features - done, len(self.lora_A))])


class Embedding(Reversible, loralib.Embedding):
    """`nn.Embedding` plus (B·A)ᵀ; A begins at zero and B is drawn, as in loralib and peft."""

    def draw(self) -> None:
        """See `Reversible`."""
        nn.init.normal_(self.lora_B)

    def delta(self) -> torch.Tensor:
        """See `Reversible`."""
        return (self.lora_B @ self.lora_A).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens' rows of the weight, and of ΔW."""
        result = nn.Embedding.forward(self, x)
        if self.merged:
            return result
        picked = F.embedding(x, self.lora_A.T, self.padding_idx)
        return (result + F.linear(picked, self.lora_B) * self.scaling).to(result.dtype)


class Conv2d(Reversible, loralib.Conv2d):
    """`nn.Conv2d` with a square kernel plus ΔW. Its weight and bias are the layer's own, `x.weight` and `x.bias`.

    loralib 0.1.2 has them at `x.conv`, where its own functions miss the bias and a pretrained state finds no weight.
    """

    def take(self, module: nn.Module) -> None:
        """See `Reversible`."""
        del self.conv
        self.pretrained = (module,)  # in a tuple, so that its parameters do not count twice
        super().take(module)

    def delta(self) -> torch.Tensor:
        """See `Reversible`."""
        return (self.lora_B @ self.lora_A).view(self.weight.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the convolution with W, plus that of dropout(x) with ΔW; loralib forgets the dropout."""
        convolve = self.pretrained[0]._conv_forward
        result = convolve(x, self.weight, self.bias)
        if self.merged:
            return result
        # ΔW is of the kernel's size, small beside what the convolution makes of it.
        update = convolve(self.lora_dropout(x).to(self.lora_A.dtype), self.delta() * self.scaling, None)
        return (result + update).to(result.dtype)


def around(
    module: nn.Module,
    *,
    r: int,
    lora_alpha: float,
    lora_dropout: float,
    merge_weights: bool,
    sizes: list[int] | None = None,
    enable_lora: list[bool] | None = None,
) -> Reversible:
    """Return loralib's layer in the place of a pretrained one, with that one's parameters.

    Raises:
        BadConfig: loralib has no layer for it.
    """
    from transformers.pytorch_utils import Conv1D

    common: dict[str, Any] = {"r": r, "lora_alpha": lora_alpha, "merge_weights": merge_weights}
    meta = {"device": "meta"}  # the pretrained parameters take their places: nothing is drawn, nothing is allocated
    layer: Reversible
    if type(module) is nn.Embedding:
        own = {key: getattr(module, key) for key in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")}
        layer = Embedding(module.num_embeddings, module.embedding_dim, **own, **common, **meta)
    elif type(module) is nn.Conv2d and len(set(module.kernel_size)) == 1:
        layer = Conv2d(
            module.in_channels, module.out_channels, module.kernel_size[0], groups=module.groups,
            lora_dropout=lora_dropout, **common, **meta,
        )  # fmt: skip
    elif type(module) is nn.Linear or isinstance(module, Conv1D):
        transposed = isinstance(module, Conv1D)  # GPT-2's: the weight is (in, out)
        wide, tall = module.weight.shape if transposed else module.weight.shape[::-1]
        options = {**common, **meta, "lora_dropout": lora_dropout, "fan_in_fan_out": transposed}
        options["bias"] = module.bias is not None
        if sizes is None or enable_lora is None:
            layer = Linear(wide, tall, **options)
        else:
            layer = MergedLinear(wide, tall, sizes=sizes, enable_lora=enable_lora, **options)
    else:
        raise BadConfig(
            f"loralib has no layer for a {type(module).__name__}.",
            expected="Linear, Conv1D (GPT-2's), Embedding, or Conv2d with a square kernel",
            got=str(module)[:200],
            next_step="leave it out of peft_config.target_modules",
        )
    layer.take(module)
    return layer
