"""The forward and backward pass of a LoRA linear layer, for peft's own modules: the same function with less memory traffic.

LoRA is one percent of a step's arithmetic and was a quarter of its time: casts of the fp32 adapter, a pass over the
output to add the update, another over the input for dropout. Here the update is written first and the frozen product
accumulates onto it. Only x and the rank-r product are kept for the backward pass. The adapter stays fp32 and is used in
the base's dtype.

Dropout masks are a function of (seed, step, token, module, feature), so that neither the micro-batch nor the number of
devices changes them. Only peft's plain LoRA is replaced. The modules keep their class's parameters, names and files.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor
from torch.autograd.function import FunctionCtx

from loraflow.failures import first_line
from loraflow.training import frozen_linear
from loraflow.training.frozen_linear import FrozenWeight

log = logging.getLogger(__name__)

# The mixin comes before one of peft's LoRA layers, whose attributes it uses.
if TYPE_CHECKING:
    _Layer = torch.nn.Module
else:
    _Layer = object


class FastLora(_Layer):
    """The forward pass that `accelerate_loras` puts before the class of one of peft's LoRA linear layers."""

    disable_adapters: bool  # peft's own, down to `scaling`
    merged: bool
    base_layer: torch.nn.Linear
    lora_A: Mapping[str, torch.nn.Linear]
    lora_B: Mapping[str, torch.nn.Linear]
    lora_dropout: Mapping[str, torch.nn.Module]
    active_adapters: list[str]
    scaling: dict[str, float]
    frozen: FrozenWeight
    adapter: str
    keep_from: int  # dropout: 16-bit numbers below this are dropped
    token_keys: Tensor | None
    module_key: Tensor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return W x + s B A dropout(x) [..., out]."""
        if args or kwargs or self.disable_adapters or self.merged:
            plain: Tensor = super().forward(x, *args, **kwargs)
            return plain
        dtype = self.frozen.dtype
        down = self.lora_A[self.adapter].weight.to(dtype)
        up = (self.lora_B[self.adapter].weight * self.scaling[self.adapter]).to(dtype)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        keys = (self.token_keys, self.module_key) if self.keep_from and self.training else (None, None)
        tensors = (self.base_layer.weight,) if self.frozen.format == "dense" else self.frozen.tensors
        y: Tensor = LoraProduct.apply(  # type: ignore[no-untyped-call]
            rows, down, up, *keys, self.keep_from, self.frozen.format, *tensors
        )
        if self.frozen.bias is not None:
            y = y + self.frozen.bias
        return y.view(*x.shape[:-1], y.shape[-1])


class _Context(FunctionCtx):
    keep_from: int
    weight_format: str
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class LoraProduct(torch.autograd.Function):
    """W x + B A dropout(x), with the scale folded into B. x [tokens, in], A [r, in], B [out, r], in one dtype."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        token_keys: Tensor | None,
        module_key: Tensor | None,
        keep_from: int,
        weight_format: str,
        *frozen: Tensor,
    ) -> Tensor:
        """Return the product [tokens, out]."""
        dropped = x
        if token_keys is not None:
            (dropped,) = drop([x], token_keys, module_key, keep_from, _kept_scale(keep_from))
        h = dropped @ down.t()
        ctx.save_for_backward(x, h, down, up, token_keys, module_key, *frozen)  # type: ignore[arg-type]
        ctx.keep_from, ctx.weight_format = keep_from, weight_format
        return frozen_linear.forward_product(weight_format, frozen, x, h, up.t())

    @staticmethod
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B."""
        x, h, down, up, token_keys, module_key, *frozen = ctx.saved_tensors
        (dh, d_up), dx = slope_products(dy, up, h) if dy.is_cuda else (dy @ up, dy.t() @ h), None
        if token_keys is None:
            dropped = x
            if ctx.needs_input_grad[0]:
                dx = frozen_linear.backward_product(ctx.weight_format, frozen, dy, dh, down)
        else:
            inputs = [x, dh @ down] if ctx.needs_input_grad[0] else [x]
            dropped, *updates = drop(inputs, token_keys, module_key, ctx.keep_from, _kept_scale(ctx.keep_from))
            for update in updates:
                dx = frozen_linear.backward_product_onto(update, ctx.weight_format, frozen, dy)
        return (dx, dh.t() @ dropped, d_up, None, None, None, None, *[None] * len(frozen))


@torch.library.custom_op("loraflow::slope_products", mutates_args=())
def slope_products(dy: Tensor, up: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return dy @ up [tokens, r] and dyᵀ @ h [out, r] of a gradient on a GPU, which is read once where that is faster."""
    kernel = slope_kernel_or_none()
    block_tokens = kernel.tokens_of_a_program(dy, up.shape[1]) if kernel is not None else 0
    return kernel.products(dy, up, h, block_tokens) if kernel is not None and block_tokens else (dy @ up, dy.t() @ h)


@cache
def slope_kernel_or_none() -> ModuleType | None:
    """Return the module of the Triton kernel for `slope_products`; None where it does not run.

    It was measured on Hopper, and needs more shared memory than older GPUs have. Triton needs a C compiler.
    """
    if torch.cuda.get_device_capability() != (9, 0):
        return None

    def run(kernels: ModuleType) -> None:
        ones = torch.ones(64, 64, dtype=torch.bfloat16, device="cuda")
        kernels.products(ones, ones[:, :16].contiguous(), ones[:, :16].contiguous(), 64)

    return _kernels_if("the adapter's gradients", run)


def _kernels_if(what: str, run: Callable[[ModuleType], object]) -> ModuleType | None:
    """Return the module of the Triton kernels; None if one of them fails here."""
    try:
        from loraflow.training import triton_kernels

        run(triton_kernels)
    except Exception as error:
        log.warning("%s: computed without a Triton kernel, which takes longer: %s", what, first_line(error))
        return None
    return triton_kernels


@slope_products.register_fake
def _(dy: Tensor, up: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], up.shape[1]), dy.new_empty(dy.shape[1], h.shape[1])


def keep_mask(token_keys: Tensor, module_key: Tensor | None, features: int, keep_from: int | Tensor) -> Tensor:
    """Return which elements dropout keeps, bool [tokens, features]: a hash of token, module and feature.

    `keep_from` may differ from token to token [tokens, 1]. 16 bits of the hash decide.
    """
    assert module_key is not None
    return (hash_features(token_keys, module_key, features) & 0xFFFF) >= keep_from


def hash_features(token_keys: Tensor, module_key: Tensor, features: int) -> Tensor:
    """Return a hash of token, module and feature, int32 [tokens, features]: the finalizer of MurmurHash3 (Appleby 2011)."""
    feature = torch.arange(features, dtype=torch.int32, device=token_keys.device) * -1640531527
    z = (token_keys[:, None] ^ module_key) + feature
    z = (z ^ ((z >> 16) & 0xFFFF)) * -2048144789
    z = (z ^ ((z >> 13) & 0x7FFFF)) * -1028477387
    return z ^ ((z >> 16) & 0xFFFF)


def drop(
    tensors: Sequence[Tensor], token_keys: Tensor, module_key: Tensor | None, below: int | Tensor, scale: float | Tensor
) -> list[Tensor]:
    """Return tensors [..., features] with the same dropout: see `keep_mask`. What is kept is multiplied by `scale`.

    Args:
        below: 16-bit numbers below this are dropped. With several adapters, tensors [adapters, tokens, features] have a
            limit and a scale for each, [adapters, 1, 1].
    """
    first = tensors[0]
    if first.is_cuda and not torch.compiler.is_compiling() and (kernels := dropout_kernel_or_none()) is not None:
        return [kernels.drop(x, token_keys, module_key, below, scale) for x in tensors]
    return drop_by_torch(tensors, token_keys, module_key, below, scale)


def drop_by_torch(
    tensors: Sequence[Tensor], token_keys: Tensor, module_key: Tensor | None, below: int | Tensor, scale: float | Tensor
) -> list[Tensor]:
    """Return what `drop` returns, by about 19 operations, which compiled code does at once."""
    shape = tensors[0].shape
    limits = below.expand(*shape[:-1], 1).reshape(-1, 1) if isinstance(below, Tensor) else below
    keep = keep_mask(token_keys, module_key, shape[-1], limits).view(shape)
    return [torch.where(keep, x * scale, 0).to(x.dtype) for x in tensors]


@cache
def dropout_kernel_or_none() -> ModuleType | None:
    """Return the module of the Triton kernel for `drop`; None where it does not run, or drops other elements."""

    def compare(kernels: ModuleType) -> None:
        x, keys = torch.ones(64, 80, device="cuda"), torch.arange(64, dtype=torch.int32, device="cuda")
        (expected,) = drop_by_torch([x], keys, keys[1], 20_000, 1.5)
        if not torch.equal(kernels.drop(x, keys, keys[1], 20_000, 1.5), expected):
            raise ValueError("it drops other elements than torch's operations")

    return _kernels_if("dropout", compare)


def _kept_scale(keep_from: int) -> float:
    """Return what dropout multiplies the kept elements by, so that their mean stays."""
    return 65536 / (65536 - keep_from)


def accelerate_loras(model: torch.nn.Module, dtype: torch.dtype) -> list[FastLora]:
    """Replace the passes of a model's plain LoRA linear layers of peft, and leave all other modules unchanged.

    Args:
        dtype: the dtype in which the base computes. A base in another dtype needs autocast, and is left alone.

    Returns:
        the layers that were changed.
    """
    changed: list[FastLora] = []
    for name, module in model.named_modules():
        frozen = frozen_weight(module, dtype)
        if frozen is None:
            continue
        peft_class: type[torch.nn.Module] = type(module)
        module.__class__ = _fast_class(peft_class)  # type: ignore[arg-type]
        assert isinstance(module, FastLora)
        module.adapter, module.frozen = module.active_adapters[0], frozen
        module.keep_from = round(getattr(module.lora_dropout[module.adapter], "p", 0.0) * 65536)
        add_key_buffers(module, name, module.lora_A[module.adapter].weight.device)
        changed.append(module)
    return changed


def add_key_buffers(module: FastLora, name: str, device: torch.device) -> None:
    """Give a layer the key of its dropout masks, which its name decides, and a place for those of the next tokens."""
    # A tensor, not a number, because all layers share the compiled code.
    key = torch.tensor(zlib.crc32(name.encode()) - 2**31, dtype=torch.int32, device=device)
    module.register_buffer("module_key", key, persistent=False)
    module.register_buffer("token_keys", None, persistent=False)


@cache
def _fast_class(cls: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(f"Fast{cls.__name__}", (FastLora, cls), {})


def to_fp8(loras: Sequence[FastLora]) -> None:
    """Put the frozen weights of dense layers into e4m3, and free the originals one by one."""
    for module in loras:
        if module.frozen.format == "dense":
            module.frozen = frozen_linear.fp8(module.base_layer)
            shape = module.base_layer.weight.shape
            module.base_layer.weight = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def frozen_weight(module: torch.nn.Module, dtype: torch.dtype) -> FrozenWeight | None:
    """Return a module's frozen weight if it is peft's plain LoRA layer, and None if it is anything else."""
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(module, LoraLayer) or len(getattr(module, "active_adapters", [])) != 1:
        return None
    adapter = module.active_adapters[0]
    if adapter not in module.lora_A or adapter in module.lora_variant or module.lora_bias.get(adapter):
        return None
    if type(module) is PeftLinear and not module.fan_in_fan_out:
        base = module.base_layer
        if type(base) is torch.nn.Linear and not base.weight.requires_grad and base.weight.dtype == dtype:
            return frozen_linear.dense(base)
        return None
    return frozen_linear.nf4(module.base_layer, dtype) if type(module).__name__ == "Linear4bit" else None


def set_token_keys(loras: Sequence[FastLora], keys: Tensor | None) -> None:
    """Give every layer the keys of the next tokens, for its dropout masks."""
    for module in loras:
        module.token_keys = keys


# NEFTune: noise on the embeddings of the training tokens. Jain et al. 2023, https://arxiv.org/abs/2310.05914
#
# Each number of a token's embedding gets noise that is uniform in ±alpha / sqrt(L · d), for a document of L tokens and
# embeddings of width d. transformers takes L from the batch: there, noise becomes weaker where rows are padded or several
# documents are in one row, and another size of the micro-batch gets other noise. Here, with both engines, L is the
# document's own length, as in the paper, and the noise is a function of (seed, step, token, feature), as dropout's
# masks are.

_KEY = zlib.crc32(b"neftune") - 2**31  # as a module's name gives dropout a key
_STEPS = 2**24  # different values of the noise: what a float32 can tell apart


def add_noise(embedded: Tensor, token_keys: Tensor, document_lengths: Tensor, alpha: float) -> Tensor:
    """Return embeddings with noise.

    Args:
        embedded: of the tokens [rows, tokens, width].
        token_keys: of each token [rows · tokens], int32; see `token_keys`.
        document_lengths: the number of tokens of each token's document [rows · tokens]; 0 for padding, which has no noise.
    """
    width = embedded.shape[-1]
    key = torch.tensor(_KEY, dtype=torch.int32, device=embedded.device)
    values = (hash_features(token_keys, key, width) & (_STEPS - 1)).float()
    uniform = (values + 0.5) * (2 / _STEPS) - 1
    largest = torch.where(document_lengths > 0, alpha * (document_lengths.clamp(min=1) * width).float().rsqrt(), 0.0)
    return embedded + (uniform * largest[:, None]).view_as(embedded).to(embedded.dtype)
