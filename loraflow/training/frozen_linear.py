"""The frozen weight of a LoRA linear, and its two products: in the base's dtype, in 8 bits, or in 4.

- dense: W [out, in], unchanged.
- fp8: W in e4m3 with a scale for each row, and transposed once more, with a scale for each row of that: the backward
  pass multiplies along the other side. Activations and gradients are scaled per token at each product. Both copies
  together are as large as W in bfloat16. The products run at twice its rate.
- nf4: bitsandbytes' packed weight, unpacked for each product and then dropped.

The LoRA update is written first, and every product accumulates onto it. Adding the update afterwards would take another
pass over the output. The products are custom operators, because Inductor would copy the tensor that they accumulate onto.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


@dataclass(frozen=True)
class FrozenWeight:
    """A frozen weight of a linear layer.

    A dense weight has no tensors here. It is looked up in its module for each product, because a sharded base puts it
    there only while the layer computes.
    """

    format: str  # dense, fp8, or nf4 with its packing
    tensors: tuple[Tensor, ...]
    dtype: torch.dtype  # the dtype of its products
    bias: Tensor | None = None


def forward_product(weight_format: str, tensors: Sequence[Tensor], x: Tensor, h: Tensor, up: Tensor) -> Tensor:
    """Return h @ up + x Wᵀ [tokens, out]."""
    if weight_format == "fp8":
        codes, scales = rowwise(x)
        y: Tensor = fp8_mm_add(codes, tensors[0].t(), scales, tensors[1], h, up)
    elif weight_format.startswith("nf4"):
        y = nf4_mm_add(x, list(tensors), weight_format, True, h, up)
    else:
        y = mm_add(x, tensors[0].t(), h, up)
    return y


def backward_product(weight_format: str, tensors: Sequence[Tensor], dy: Tensor, dh: Tensor, down: Tensor) -> Tensor:
    """Return dh @ down + dy W [tokens, in]."""
    if weight_format == "fp8":
        codes, scales = rowwise(dy)
        dx: Tensor = fp8_mm_add(codes, tensors[2].t(), scales, tensors[3], dh, down)
    elif weight_format.startswith("nf4"):
        dx = nf4_mm_add(dy, list(tensors), weight_format, False, dh, down)
    else:
        dx = mm_add(dy, tensors[0], dh, down)
    return dx


def backward_product_onto(update: Tensor, weight_format: str, tensors: Sequence[Tensor], dy: Tensor) -> Tensor:
    """Return update + dy W [tokens, in]. `update` is overwritten."""
    if weight_format == "fp8":
        codes, scales = rowwise(dy)
        product: Tensor = fp8_mm(codes, tensors[2].t(), scales, tensors[3])
        return update + product
    if weight_format.startswith("nf4"):
        mm_onto(update, dy, nf4_weight(list(tensors), weight_format))
    else:
        mm_onto(update, dy, tensors[0])
    return update


def dense(linear: torch.nn.Linear) -> FrozenWeight:
    """Use the linear layer's weight unchanged."""
    return FrozenWeight("dense", (), linear.weight.dtype, linear.bias)


def fp8(linear: torch.nn.Linear) -> FrozenWeight:
    """Return the linear layer's weight in e4m3, as it is and transposed."""
    weight = linear.weight.detach()
    (codes, scales), (codes_t, scales_t) = rowwise(weight), rowwise(weight.t().contiguous())
    tensors = (codes, scales.t().contiguous(), codes_t, scales_t.t().contiguous())
    return FrozenWeight("fp8", tensors, weight.dtype, linear.bias)


def nf4(linear: torch.nn.Linear, dtype: torch.dtype) -> FrozenWeight | None:
    """Return the weight that bitsandbytes packed in NF4; None if it is packed in another way."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None or state.quant_type != "nf4" or state.dtype != dtype:
        return None
    tensors: list[Tensor] = [linear.weight.detach(), state.absmax]
    weight_format = f"nf4:{state.shape[0]}:{state.shape[1]}:{state.blocksize}:{str(dtype).removeprefix('torch.')}"
    if state.nested:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
        weight_format += f":{state.state2.blocksize}"
    return FrozenWeight(weight_format, tuple(tensors), dtype, linear.bias)


def nf4_weight(tensors: list[Tensor], weight_format: str) -> Tensor:
    """Unpack a weight to [out, in]."""
    _, out, into, block, dtype, *nested = weight_format.split(":")
    absmax = tensors[1]
    ops = torch.ops.bitsandbytes
    if nested:
        absmax = ops.dequantize_blockwise(absmax, tensors[2], tensors[3], int(nested[0]), torch.float32) + tensors[4]
    shape = [int(out), int(into)]
    weight: Tensor = ops.dequantize_4bit(tensors[0], absmax.float(), int(block), "nf4", shape, getattr(torch, dtype))
    return weight


def rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in e4m3, and the scales [rows, 1] by which the codes have to be multiplied."""
    scales = (x.abs().amax(-1, keepdim=True).float() / E4M3_MAX).clamp(min=1e-12)
    return (x.float() / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), scales


@torch.library.custom_op("loraflow::mm_add", mutates_args=())
def mm_add(a: Tensor, b: Tensor, h: Tensor, m: Tensor) -> Tensor:
    """Return h @ m + a @ b. The second product accumulates onto the first."""
    return (h @ m).addmm_(a, b)


@mm_add.register_fake
def _(a: Tensor, b: Tensor, h: Tensor, m: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("loraflow::mm_onto", mutates_args=("onto",))
def mm_onto(onto: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to a tensor in place."""
    onto.addmm_(a, b)


@mm_onto.register_fake
def _(onto: Tensor, a: Tensor, b: Tensor) -> None:
    return None


def _scaled_product(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    if a.is_cuda:
        return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=True)
    return ((a.float() * scale_a) @ (b.float() * scale_b)).to(dtype)  # for tests on a CPU: slow, the same values


@torch.library.custom_op("loraflow::fp8_mm_add", mutates_args=())
def fp8_mm_add(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, h: Tensor, m: Tensor) -> Tensor:
    """Return a @ b of e4m3 codes with row-wise scales, plus h @ m."""
    return _scaled_product(a, b, scale_a, scale_b, h.dtype).addmm_(h, m)


@fp8_mm_add.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, h: Tensor, m: Tensor) -> Tensor:
    return h.new_empty(a.shape[0], b.shape[1])


@torch.library.custom_op("loraflow::fp8_mm", mutates_args=())
def fp8_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    """Return a @ b of e4m3 codes with row-wise scales, in bfloat16."""
    return _scaled_product(a, b, scale_a, scale_b, torch.bfloat16)


@fp8_mm.register_fake
def _(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.bfloat16)


@torch.library.custom_op("loraflow::nf4_mm_add", mutates_args=())
def nf4_mm_add(a: Tensor, packed: list[Tensor], weight_format: str, transposed: bool, h: Tensor, m: Tensor) -> Tensor:
    """Return h @ m + a Wᵀ (or a W), with W unpacked for this product only."""
    weight = nf4_weight(packed, weight_format)
    return (h @ m).addmm_(a, weight.t() if transposed else weight)


@nf4_mm_add.register_fake
def _(a: Tensor, packed: list[Tensor], weight_format: str, transposed: bool, h: Tensor, m: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], m.shape[1])
