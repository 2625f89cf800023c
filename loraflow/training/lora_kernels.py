"""The forward and backward pass of a LoRA linear, for peft's own modules: less memory traffic, the same function.

LoRA is one percent of a step's arithmetic and was a quarter of its time: casts of the fp32 adapter, a pass over the
output to add the update, another over the input for dropout. Here the update is written first and the frozen
product accumulates onto it; x, the rank-r product and nothing else is kept for the backward pass; the adapter stays
fp32 and is used in the base's dtype.

Dropout masks are a function of (seed, step, token, module, feature), so that neither the micro-batch nor the number of
devices changes them. Only peft's plain LoRA is replaced: the modules keep their class's parameters, names and files.
"""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor

from loraflow.training.frozen_linear import Frozen, dense, fp8, nf4


class FastForward:
    """The forward pass of this module, put before the class of one of peft's LoRA linears by `accelerate_loras`."""

    disable_adapters: bool  # peft's own, down to `training`
    merged: bool
    base_layer: Any
    lora_A: Any
    lora_B: Any
    scaling: dict[str, float]
    training: bool
    parameters: Any
    frozen: Frozen
    adapter: str
    keep_from: int  # dropout: 16-bit numbers below this are dropped
    token_keys: Tensor
    module_key: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + s B A dropout(x) [..., out]."""
        if args or kwargs or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        dtype = self.frozen.dtype
        down = self.lora_A[self.adapter].weight.to(dtype)
        up = (self.lora_B[self.adapter].weight * self.scaling[self.adapter]).to(dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        keys = (self.token_keys, self.module_key) if self.keep_from and self.training else (None, None)
        tensors = (self.base_layer.weight,) if self.frozen.kind == "dense" else self.frozen.tensors
        y = LoraProduct.apply(rows, down, up, *keys, self.keep_from, self.frozen.kind, *tensors)
        if self.frozen.bias is not None:
            y = y + self.frozen.bias
        return y.view(*x.shape[:-1], y.shape[-1])


class LoraProduct(torch.autograd.Function):
    """W x + B A dropout(x), with the scale folded into B. x [tokens, in], A [r, in], B [out, r], in one dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, up: Tensor, token_keys: Tensor | None, module_key: Tensor | None,
        keep_from: int, kind: str, *frozen: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the product [tokens, out]."""
        dropped = x
        if token_keys is not None:
            dropped = dropout(x, keep_mask(token_keys, module_key, x.shape[1], keep_from), keep_from)
        h = dropped @ down.t()
        ctx.save_for_backward(x, h, down, up, token_keys, module_key, *frozen)
        ctx.keep_from, ctx.kind = keep_from, kind
        return Frozen.forward_onto(kind, frozen, x, h, up.t())

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, h, down, up, token_keys, module_key, *frozen = ctx.saved_tensors
        dh, dx = dy @ up, None
        if token_keys is None:
            dropped = x
            if ctx.needs_input_grad[0]:
                dx = Frozen.backward_onto(ctx.kind, frozen, dy, dh, down)
        else:
            keep = keep_mask(token_keys, module_key, x.shape[1], ctx.keep_from)
            dropped = dropout(x, keep, ctx.keep_from)
            if ctx.needs_input_grad[0]:
                dx = Frozen.backward_added(ctx.kind, frozen, dy, dropout(dh @ down, keep, ctx.keep_from))
        return (dx, dh.t() @ dropped, dy.t() @ h, None, None, None, None, *[None] * len(frozen))


def keep_mask(token_keys: Tensor, module_key: Tensor | None, features: int, keep_from: int) -> Tensor:
    """Return which elements dropout keeps, bool [tokens, features]: a hash of token, module and feature.

    The hash is the finalizer of MurmurHash3 (Appleby 2011) over 32 bits, of which 16 decide.
    """
    assert module_key is not None
    feature = torch.arange(features, dtype=torch.int32, device=token_keys.device) * -1640531527
    z = (token_keys[:, None] ^ module_key) + feature
    z = (z ^ ((z >> 16) & 0xFFFF)) * -2048144789
    z = (z ^ ((z >> 13) & 0x7FFFF)) * -1028477387
    z = z ^ ((z >> 16) & 0xFFFF)
    return (z & 0xFFFF) >= keep_from


def dropout(x: Tensor, keep: Tensor, keep_from: int) -> Tensor:
    """Return x where kept, scaled so that its mean stays, and zero elsewhere."""
    return torch.where(keep, x * (65536 / (65536 - keep_from)), 0).to(x.dtype)


def accelerate_loras(model: Any, dtype: torch.dtype) -> list[FastForward]:
    """Give peft's plain LoRA linears of a model the fast passes; the rest stays as it is.

    Args:
        model: peft's model.
        dtype: in which the base computes. A base in another dtype is autocast's matter, and left alone.
    """
    changed: list[FastForward] = []
    for name, module in model.named_modules():
        frozen = _plain(module, dtype)
        if frozen is None:
            continue
        adapter = module.active_adapters[0]
        rate = getattr(module.lora_dropout[adapter], "p", 0.0)
        module.__class__ = _fast_class(cast(Any, type(module)))
        module.frozen, module.adapter, module.keep_from = frozen, adapter, round(rate * 65536)
        device = next(module.lora_A.parameters()).device
        # A tensor, not a number: compiled code is shared by all layers.
        key = torch.tensor(zlib.crc32(name.encode()) - 2**31, dtype=torch.int32, device=device)
        module.register_buffer("module_key", key, persistent=False)
        module.register_buffer("token_keys", None, persistent=False)
        changed.append(module)
    return changed


@cache
def _fast_class(cls: Any) -> type:
    return type(f"Fast{cls.__name__}", (FastForward, cls), {})


def to_fp8(loras: list[Any]) -> None:
    """Put the frozen weights of dense modules into e4m3, and let go of the originals one by one."""
    for module in loras:
        if module.frozen.kind == "dense":
            module.frozen = fp8(module.base_layer)
            shape = module.base_layer.weight.shape
            module.base_layer.weight = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def _plain(module: Any, dtype: torch.dtype) -> Frozen | None:
    """Return a module's frozen weight if it is peft's plain LoRA over it, and None if it is anything else."""
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(module, LoraLayer) or len(getattr(module, "active_adapters", [])) != 1:
        return None
    adapter = module.active_adapters[0]
    if adapter not in module.lora_A or adapter in module.lora_variant or module.lora_bias.get(adapter):
        return None
    if type(module) is PeftLinear and not module.fan_in_fan_out:
        base = module.base_layer
        if type(base) is torch.nn.Linear and not base.weight.requires_grad and base.weight.dtype == dtype:
            return dense(base)
        return None
    return nf4(module.base_layer, dtype) if type(module).__name__ == "Linear4bit" else None


def set_token_keys(loras: list[FastForward], keys: Tensor | None) -> None:
    """Tell every module which tokens come next."""
    for module in loras:
        module.token_keys = keys  # type: ignore[assignment]
