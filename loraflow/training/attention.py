"""Attention over concatenated documents: the function that transformers calls, and the kernels that compute it.

`choose` takes the fastest kernel of this machine. No package is needed: torch has FlashAttention 2 for documents, and
memory-efficient attention for those in float32. If flash-attn 3 or 4 is installed, it is used after a check that it gives
the results of torch's own kernel on this GPU.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from loraflow.config import Runtime
from loraflow.failures import BadModel
from loraflow.hardware.attention import DOCUMENTS, Attention, DocumentKernelName, choose_for_training
from loraflow.hardware.device import Device

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
TRIAL_TOKENS = 384  # of the check of a kernel
# q, k, v [tokens, heads, head_dim]; where documents begin; tokens of the longest; scaling; window (before, after).
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, tuple[int, int]], Tensor]


def choose(runtime: Runtime, device: Device, dtype: str, config: PreTrainedConfig) -> Attention:
    """Choose the attention of a training, and register its kernel with transformers.

    Raises:
        MissingExtra: see `choose_for_training`.
        BadConfig: see `choose_for_training`.
    """
    attention, kernel = choose_for_training(runtime, device, dtype, config, lambda name: load_kernel(name, config))
    if kernel is not None:
        register(kernel)
    return attention


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of a model, for the check of a kernel.

    Attributes:
        heads: the heads of q.
        kv_heads: the heads of k and v.
        width: of a head.
        windows: the windows of its layers, as kernels take them: (-1, 0) is a whole document.
    """

    heads: int
    kv_heads: int
    width: int
    windows: tuple[tuple[int, int], ...] = ((-1, 0),)

    @classmethod
    def of(cls, config: PreTrainedConfig) -> HeadShape:
        """Return the shape of a model's heads. At most 32 heads of q are tried out, in the model's ratio to those of k."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        ratio = heads // (getattr(text, "num_key_value_heads", None) or heads)
        kv_heads = max(1, min(heads, 32) // ratio)
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        windows: tuple[tuple[int, int], ...] = ((-1, 0),)
        types = getattr(text, "layer_types", None) or ["sliding_attention"]
        has_windows = getattr(text, "use_sliding_window", True) and "sliding_attention" in types
        if has_windows and getattr(text, "sliding_window", None):
            windows += ((min(text.sliding_window, TRIAL_TOKENS // 4) - 1, 0),)
        return cls(kv_heads * ratio, kv_heads, width, windows)


def load_kernel(name: DocumentKernelName, config: PreTrainedConfig) -> Kernel:
    """Return a kernel, after a check that its output and gradients are those of torch's own kernel for the model's heads.

    In float32, they are compared with those of each document alone.

    Raises:
        ValueError: the results differ.
    """
    if name == "varlen":
        return varlen
    heads = HeadShape.of(config)
    if name == "efficient":
        exact = {"dtype": torch.float32}
        _compare(_try_out(efficient, heads, **exact), _try_out(by_document, heads, **exact), 1e-4)
        return efficient
    expected = _try_out(varlen, heads)
    if name == "fa3":
        from torch.nn.attention import activate_flash_attention_impl

        activate_flash_attention_impl("FA3")  # from here on, torch forwards its own kernel's calls to it
        _compare(_try_out(varlen, heads), expected)
        return varlen
    from loraflow.training import flash4

    try:
        _compare(_try_out(flash4.attend, heads), expected)
        return flash4.attend
    except Exception as error:  # some versions of the package take contiguous tensors only; the second try decides
        log.info("flash-attn 4 needs contiguous tensors here: %s: %s", type(error).__name__, str(error)[:200])
        _compare(_try_out(flash4.attend_contiguous, heads), expected)
        return flash4.attend_contiguous


def _try_out(kernel: Kernel, heads: HeadShape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Run a kernel on small documents, in the memory layout of a model; return its outputs and gradients by name."""
    found = {}
    for window in heads.windows:
        generator = torch.Generator("cuda").manual_seed(0)
        options: dict[str, Any] = {"device": "cuda", "dtype": dtype, "generator": generator}
        q, k, v = (
            torch.randn(number, TRIAL_TOKENS, heads.width, **options).requires_grad_()
            for number in (heads.heads, heads.kv_heads, heads.kv_heads)
        )
        begins = torch.tensor([0, 100, 101, 300, TRIAL_TOKENS, TRIAL_TOKENS], dtype=torch.int32, device="cuda")
        by_token = [tensor.transpose(0, 1) for tensor in (q, k, v)]
        out = kernel(by_token[0], by_token[1], by_token[2], begins, 256, heads.width**-0.5, window)
        out.backward(torch.randn(out.shape, **options))  # type: ignore[no-untyped-call]
        for name, tensor in (("output", out.detach()), ("dq", q.grad), ("dk", k.grad), ("dv", v.grad)):
            assert tensor is not None
            found[name if window == (-1, 0) else f"{name} with a window"] = tensor
    return found


def _compare(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.02) -> None:
    """Raise ValueError if results differ. Two kernels in bfloat16 differ by 0.001 to 0.003, as a share of the norm."""
    for name, reference in expected.items():
        error = float((results[name].float() - reference.float()).norm() / reference.float().norm())
        if not error < tolerance:
            raise ValueError(f"{name} differs from torch's own by {error:.3g}")


_kernel: Kernel | None = None
# Arguments of transformers' attention functions that change the result, and that flash attention does not have:
# attention sinks, caps on logits, dropout of attention weights, biases.
_UNSUPPORTED = ("s_aux", "sinks", "softcap", "dropout", "position_bias", "attn_bias", "head_mask")


def register(kernel: Kernel | None = None) -> None:
    """Register `attend` with transformers. It will call the kernel, or torch's own if none is given."""
    global _kernel
    from transformers import AttentionInterface

    _kernel = kernel
    # No mask function is registered under this name, so that transformers builds no mask.
    AttentionInterface.register(DOCUMENTS, attend)


def attend(
    module: torch.nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **other: Any,  # transformers passes further arguments to an attention function
) -> tuple[Tensor, None]:
    """Attend within each document, causally.

    Args:
        query: [1, heads, tokens, head_dim].
        attention_mask: unused; the borders of the documents say which tokens a token attends to.
        scaling: the factor of the products q kᵀ; default 1/√head_dim.
        sliding_window: how many tokens a token attends to, itself included; None is all earlier ones.
        cu_seq_lens_q: where documents begin, [entries] int32; the last entries are the number of tokens.
        max_length_q: tokens of the longest document, a constant.
        other: further arguments; those that change the result must be unset.

    Returns:
        [1, tokens, heads, head_dim], and no attention weights.

    Raises:
        BadModel: the model's attention needs an argument that the kernels do not have.
    """
    if unsupported := [name for name in _UNSUPPORTED if _is_set(other.get(name))]:
        raise BadModel(
            "The attention kernel does not support this model's attention.",
            where="runtime.attn_implementation",
            got=f"attention with {', '.join(unsupported)}",
            next_step="set runtime.engine to stock",
        )
    assert cu_seq_lens_q is not None and max_length_q is not None, "concatenated documents need their borders"
    # Under autocast, rotary embeddings leave q and k in float32. The kernels need the dtype of the projections.
    q, k, v = (tensor.squeeze(0).transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    if v.stride(0) > v.shape[1] * v.shape[2]:
        # It is a part of a fused projection, all of which would be kept for the backward pass.
        v = v.contiguous()
    # A window that no document reaches masks nothing. It is passed as none, because kernels are faster without.
    window = (-1, 0) if sliding_window is None or sliding_window >= max_length_q else (sliding_window - 1, 0)
    kernel = (_kernel or varlen) if query.is_cuda else by_document
    return kernel(q, k, v, cu_seq_lens_q, max_length_q, scaling, window).unsqueeze(0), None


def _is_set(argument: Tensor | float | None) -> bool:
    return isinstance(argument, Tensor) or bool(argument)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scaling: float | None, window: tuple[int, int]
) -> Tensor:
    """Attend by torch's own variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    grouped = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            grouped = {"enable_gqa": True}
        else:
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    out: Tensor = varlen_attn(  # type: ignore[assignment]
        q,
        k,
        v,
        begins,
        begins,
        longest,
        longest,
        scale=scaling,
        window_size=window,
        **grouped,  # type: ignore[arg-type]
    )
    return out


class _Context(FunctionCtx):
    options: dict[str, Any]
    longest: int
    saved_tensors: tuple[Tensor, ...]


class _Efficient(torch.autograd.Function):
    """Memory-efficient attention (xformers') over documents. torch uses the operator for nested tensors.

    torch's own derivative leaves out the window, and adds up the gradient of q in any order.
    """

    @staticmethod
    def forward(
        ctx: _Context, q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, options: dict[str, Any]
    ) -> Tensor:
        out, lse, *random, _, _ = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, begins, begins, longest, longest, 0.0, 1, True, **options
        )
        ctx.options, ctx.longest = options, longest
        ctx.save_for_backward(q, k, v, begins, out, lse, *random)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: _Context, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, begins, out, lse, *random = ctx.saved_tensors
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            slope, q, k, v, None, out, begins, begins, ctx.longest, ctx.longest, lse, 0.0, *random, 1, False,
            num_splits_key=1, **ctx.options,
        )  # fmt: skip
        return dq, dk, dv, None, None, None


def efficient(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scaling: float | None, window: tuple[int, int]
) -> Tensor:
    """Attend by torch's memory-efficient attention, which has float32."""
    if q.shape[1] != k.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    options = {"scale": scaling, "window_size": window[0] + 1 if window[0] >= 0 else None}
    out: Tensor = _Efficient.apply(q[None], k[None], v[None], begins, longest, options)  # type: ignore[no-untyped-call]
    return out[0]


def by_document(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, longest: int, scaling: float | None, window: tuple[int, int]
) -> Tensor:
    """Attend to one document after another: slow, for tests, and for the check of a kernel."""
    parts = []
    for start, end in pairwise(begins.tolist()):
        if start == end:
            continue
        position = torch.arange(end - start, device=q.device)
        distance = position[:, None] - position
        visible = (distance >= 0) & ((distance <= window[0]) if window[0] >= 0 else True)
        q_part, k_part, v_part = (tensor[start:end].transpose(0, 1) for tensor in (q, k, v))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q_part, k_part, v_part, attn_mask=visible, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            ).transpose(0, 1)
        )
    return torch.cat(parts)
