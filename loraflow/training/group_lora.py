"""Several adapters over one frozen base, in one pass.

The rows of all K adapters go through the model together: those of adapter k are the k-th part of each activation
[K · tokens, width]. The frozen product is computed once for all of them, and the LoRA products as batched products over
[K, tokens, width]. Smaller ranks are padded with zeros up to the largest. Rank rows of zeros have zero gradients, and
no optimizer of a group moves them.

All weights of adapter k are one vector. So its gradient's norm, its clipping and its optimizer step are a few kernels,
however many modules are adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from torch.autograd.function import FunctionCtx

from loraflow.training.frozen_linear import mm_onto
from loraflow.training.lora_kernels import FastLora, add_key_buffers, drop, frozen_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapters:
    """The weights of K adapters: one row each of `values` and `gradients`, whose parts are the parameters of modules."""

    names: tuple[str, ...]  # peft's
    values: Tensor  # [K, weights of an adapter with the largest rank], fp32
    gradients: Tensor  # as values
    parameters: tuple[torch.nn.Parameter, ...]  # parts of `values`; their gradients are in `gradients`
    modules: tuple[GroupLora, ...]


class GroupLora(FastLora):
    """The forward pass that `stack_adapters` puts before the class of one of peft's LoRA linear layers."""

    downs: torch.nn.Parameter  # [K, r, in]: A of all adapters
    ups: torch.nn.Parameter  # [K, r, out]: B of all adapters, transposed
    scales: Tensor  # [K, 1, 1]
    dropped_below: Tensor  # [K, 1, 1] int32, dropout: 16-bit numbers below this are dropped
    kept_scale: Tensor  # [K, 1, 1], what dropout multiplies the others by
    has_dropout: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + s_k B_k A_k dropout_k(x) [..., out] for the rows of each adapter k."""
        dtype, count = self.frozen.dtype, len(self.downs)
        rows = x.reshape(count, -1, x.shape[-1]).to(dtype)
        down, up = self.downs.to(dtype), (self.ups * self.scales).to(dtype)
        drops = self.has_dropout and self.training
        keys = (self.token_keys, self.module_key, self.dropped_below, self.kept_scale) if drops else (None,) * 4
        y: Tensor = GroupProduct.apply(rows, down, up, *keys, self.base_layer.weight)  # type: ignore[no-untyped-call]
        if self.frozen.bias is not None:
            y = y + self.frozen.bias
        return y.view(*x.shape[:-1], y.shape[-1])


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class GroupProduct(torch.autograd.Function):
    """W x + B_k A_k dropout_k(x). x [K, tokens, in], A [K, r, in], B [K, r, out] with its scale, in one dtype."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        token_keys: Tensor | None,
        module_key: Tensor | None,
        dropped_below: Tensor | None,
        kept_scale: Tensor | None,
        weight: Tensor,
    ) -> Tensor:
        """Return the products [K, tokens, out]."""
        dropped = x
        if token_keys is not None and dropped_below is not None and kept_scale is not None:
            (dropped,) = drop([x], token_keys, module_key, dropped_below, kept_scale)
        h = torch.bmm(dropped, down.transpose(1, 2))
        ctx.save_for_backward(x, h, down, up, token_keys, module_key, dropped_below, kept_scale, weight)  # type: ignore[arg-type]
        y = torch.bmm(h, up)
        mm_onto(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), weight.t())
        return y

    @staticmethod
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, h, down, up, token_keys, module_key, dropped_below, kept_scale, weight = ctx.saved_tensors
        dy = dy.contiguous()
        dh = torch.bmm(dy, up.transpose(1, 2))
        dx = torch.bmm(dh, down) if ctx.needs_input_grad[0] else None
        dropped = x
        if token_keys is not None:
            dropped, *updates = drop([x] if dx is None else [x, dx], token_keys, module_key, dropped_below, kept_scale)
            dx = updates[0] if updates else None
        if dx is not None:
            mm_onto(dx.view(-1, dx.shape[-1]), dy.view(-1, dy.shape[-1]), weight)
        return dx, torch.bmm(dh.transpose(1, 2), dropped), torch.bmm(h.transpose(1, 2), dy), *[None] * 5


def stack_adapters(model: PreTrainedModel, names: Sequence[str], dtype: torch.dtype) -> Adapters | None:
    """Put the weights of a model's adapters into one tensor, and replace the passes of its LoRA layers.

    Args:
        model: peft's model, with all adapters on the same linear layers.

    Returns:
        the adapters; None if a trained parameter is not one of plain LoRA on a linear layer in this dtype.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    frozen = {name: frozen_weight(module, dtype) for name, module in found.items()}
    adapter_ids = {
        id(p) for module in found.values() for p in [*module.lora_A.parameters(), *module.lora_B.parameters()]
    }
    if any(id(p) not in adapter_ids for p in model.parameters() if p.requires_grad):
        return None
    if any(weight is None or weight.format != "dense" for weight in frozen.values()) or not all(
        name in module.lora_A for module in found.values() for name in names
    ):
        return None
    ranks = [max(module.lora_A[name].weight.shape[0] for name in names) for module in found.values()]
    shapes = [
        (rank, module.in_features, module.out_features) for rank, module in zip(ranks, found.values(), strict=True)
    ]
    device = next(iter(found.values())).lora_A[names[0]].weight.device
    total = sum(rank * (into + out) for rank, into, out in shapes)
    values = torch.zeros(len(names), total, device=device)
    gradients, parameters, modules, start = torch.zeros_like(values), [], [], 0
    for (path, module), (rank, into, out) in zip(found.items(), shapes, strict=True):
        parts = []
        for width in (into, out):
            end = start + rank * width
            part = torch.nn.Parameter(values[:, start:end].view(len(names), rank, width))
            part.grad = gradients[:, start:end].view(len(names), rank, width)
            parts.append(part)
            start = end
        modules.append(_replace(module, path, names, parts[0], parts[1], frozen[path]))
        parameters += parts
    return Adapters(tuple(names), values, gradients, tuple(parameters), tuple(modules))


def _replace(
    module: LoraLayer,
    path: str,
    names: Sequence[str],
    downs: torch.nn.Parameter,
    ups: torch.nn.Parameter,
    frozen: object,
) -> GroupLora:
    """Copy a layer's adapters into the stacked parameters, and give the layer the pass that uses them."""
    with torch.no_grad():
        for k, name in enumerate(names):
            rank = module.lora_A[name].weight.shape[0]
            downs[k, :rank] = module.lora_A[name].weight.float()
            ups[k, :rank] = module.lora_B[name].weight.float().t()
    device = downs.device
    below = [round(getattr(module.lora_dropout[name], "p", 0.0) * 65536) for name in names]
    scales = torch.tensor([module.scaling[name] for name in names], device=device)
    for parameter in [*module.lora_A.parameters(), *module.lora_B.parameters()]:
        parameter.requires_grad_(False)
    cls = type(module)
    module.__class__ = type(f"Group{cls.__name__}", (GroupLora, cls), {})  # type: ignore[assignment]
    assert isinstance(module, GroupLora)
    module.frozen, module.adapter, module.keep_from = frozen, names[0], max(below)  # type: ignore[assignment]
    module.downs, module.ups, module.has_dropout = downs, ups, any(below)
    add_key_buffers(module, path, device)
    module.register_buffer("scales", scales.view(-1, 1, 1), persistent=False)
    kept = torch.tensor([65536 / (65536 - limit) for limit in below], device=device)
    module.register_buffer("kept_scale", kept.view(-1, 1, 1), persistent=False)
    limits = torch.tensor(below, dtype=torch.int32, device=device)
    module.register_buffer("dropped_below", limits.view(-1, 1, 1), persistent=False)
    return module
