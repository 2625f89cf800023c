"""The two products of a LoRA layer's backward pass that read the output's gradient, in one Triton kernel that reads it once.

For a wide layer these products take as long as reading `dy` does. torch's two products read it twice.
`benchmarks/lora_products.py` compares both ways.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, STEP, WARPS, STAGES = 512, 64, 8, 3  # measured on an H100 with rank 16 and 16,384 tokens
LEAST_COLUMNS = 4096  # a narrower layer gains nothing
LARGEST_RANK = 16  # with 64, torch's products are faster
LEAST_PROGRAMS = 2 * 132  # two for each multiprocessor of an H100


def tokens_of_a_program(dy: Tensor, rank: int) -> int:
    """Return how many tokens each program of the kernel adds up; 0 if torch's products are to be used."""
    tokens, columns = dy.shape
    if dy.dtype not in (torch.bfloat16, torch.float16) or columns < LEAST_COLUMNS or rank > LARGEST_RANK:
        return 0
    if triton.cdiv(columns, COLUMNS) * tokens * rank >= 2**31:
        return 0  # the kernel counts in 32 bits
    for each in (1024, 512, 256):
        if triton.cdiv(columns, COLUMNS) * triton.cdiv(tokens, each) >= LEAST_PROGRAMS:
            return each
    return 0


@triton.jit  # type: ignore[untyped-decorator]
def _products(  # type: ignore[no-untyped-def]
    dy, up, h, dh, d_up, tokens, out, rank, stride,
    block_tokens: tl.constexpr, columns: tl.constexpr, step: tl.constexpr, lanes: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Write dy @ up over a block of columns, and dyᵀ @ h over a block of tokens. The caller adds up the blocks."""
    j, i = tl.program_id(0), tl.program_id(1)
    n = j * columns + tl.arange(0, columns)
    r = tl.arange(0, lanes)
    in_columns, in_rank = n < out, r < rank
    matrix = tl.load(up + n[:, None] * rank + r[None, :], mask=in_columns[:, None] & in_rank[None, :], other=0.0)
    total = tl.zeros((columns, lanes), tl.float32)
    for k in tl.range(0, block_tokens, step, num_stages=stages):
        t = i * block_tokens + k + tl.arange(0, step)
        in_tokens = t < tokens
        slope = tl.load(
            dy + t[:, None].to(tl.int64) * stride + n[None, :], mask=in_tokens[:, None] & in_columns[None, :], other=0.0
        )
        small = tl.load(h + t[:, None] * rank + r[None, :], mask=in_tokens[:, None] & in_rank[None, :], other=0.0)
        part = tl.dot(slope, matrix)
        tl.store(dh + (j * tokens + t[:, None]) * rank + r[None, :], part, mask=in_tokens[:, None] & in_rank[None, :])
        total = tl.dot(tl.trans(slope), small, total)
    tl.store(d_up + (i * out + n[:, None]) * rank + r[None, :], total, mask=in_columns[:, None] & in_rank[None, :])


def products(dy: Tensor, up: Tensor, h: Tensor, block_tokens: int) -> tuple[Tensor, Tensor]:
    """Return dy @ up [tokens, r] and dyᵀ @ h [out, r], each summed in fp32 in a fixed order.

    Args:
        dy: the output's gradient [tokens, out] on a GPU, in 16 bits.
        up: the adapter's B [out, r].
        h: the rank-r product of the forward pass [tokens, r].
    """
    (tokens, out), rank = dy.shape, up.shape[1]
    dy, up, h = (dy if dy.stride(1) == 1 else dy.contiguous()), up.contiguous(), h.contiguous()
    blocks = triton.cdiv(out, COLUMNS), triton.cdiv(tokens, block_tokens)
    dh = torch.empty(blocks[0], tokens, rank, device=dy.device)
    d_up = torch.empty(blocks[1], out, rank, device=dy.device)
    with torch.cuda.device(dy.device):
        _products[blocks](
            dy, up, h, dh, d_up, tokens, out, rank, dy.stride(0), block_tokens=block_tokens, columns=COLUMNS, step=STEP,
            lanes=max(16, triton.next_power_of_2(rank)), stages=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return dh.sum(0).to(dy.dtype), d_up.sum(0).to(dy.dtype)
