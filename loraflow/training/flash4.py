"""FlashAttention 4 (package flash-attn-4) over concatenated documents, as operators that torch.compile can include.

torch can switch to it by itself, but the functions that torch expects in the package changed with the package's version.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

PACKAGE = "flash_attn.cute.interface"


def _kernel(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """Import a function of the package, which is needed at a GPU only."""
    kernel: Callable[..., tuple[Tensor, ...]] = getattr(importlib.import_module(PACKAGE), name)
    return kernel


@torch.library.custom_op("loraflow::flash4", mutates_args=())
def flash4(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """Return attention [tokens, heads, width] and its log-sum-exp [heads, tokens].

    Args:
        q: [tokens, heads, width]; k and v with as many or fewer heads.
        begins: where documents begin, int32; the last entry is the number of tokens.
        window: how many earlier tokens a token attends to; -1 is all of its document.
    """
    out, lse, *_ = _kernel("_flash_attn_fwd")(
        q, k, v, cu_seqlens_q=begins, cu_seqlens_k=begins, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True, window_size_left=None if window < 0 else window, return_lse=True,
    )  # fmt: skip
    return out, lse


@flash4.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scale: float, window: int
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("loraflow::flash4_backward", mutates_args=())
def flash4_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begins: Tensor, longest: int,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v."""
    dq, dk, dv, *_ = _kernel("_flash_attn_bwd")(
        q, k, v, out, d_out.contiguous(), lse, scale, True, cu_seqlens_q=begins, cu_seqlens_k=begins,
        max_seqlen_q=longest, max_seqlen_k=longest, window_size_left=None if window < 0 else window,
    )  # fmt: skip
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@flash4_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, begins: Tensor, longest: int,
    scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _Context(FunctionCtx):
    longest: int
    scale: float
    window: int
    saved_tensors: tuple[Tensor, ...]


def _save(
    ctx: _Context,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, int, float, int],
    output: tuple[Tensor, Tensor],
) -> None:
    q, k, v, begins, ctx.longest, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, begins, *output)


def _backward(ctx: _Context, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, begins, out, lse = ctx.saved_tensors
    grads = flash4_backward(d_out, q, k, v, out, lse, begins, ctx.longest, ctx.scale, ctx.window)
    return (*grads, None, None, None, None)


flash4.register_autograd(_backward, setup_context=_save)


def attend(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scaling: float | None, window: tuple[int, int]
) -> Tensor:
    """Attend within each document; see `loraflow.training.attention.attend`."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out: Tensor = flash4(q, k, v, begins, longest, scale, window[0])[0]
    return out


def attend_contiguous(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scaling: float | None, window: tuple[int, int]
) -> Tensor:
    """Attend with copies of q, k and v, for a version of the package that takes no other strides."""
    return attend(q.contiguous(), k.contiguous(), v.contiguous(), begins, longest, scaling, window)
