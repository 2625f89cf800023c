"""Triton kernels of the training on a GPU: the loss with its gradient, two products of a LoRA layer's backward pass, and
dropout.

With torch's operations, the loss and its gradient pass over fp32 copies of the logits about ten times; with a vocabulary of
128,256 that was a tenth of a step. The kernel reads the logits twice and writes the gradient over them.

The two products both read the output's gradient. The kernel reads it once, torch twice; for a wide layer that
is most of their time (`benchmarks/lora_products.py`).

Dropout's mask is a hash. By torch's operations, it is about 19 passes over arrays of the input's size; the kernel makes one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOSS_BLOCK, LOSS_WARPS = 4096, 8
COLUMNS, STEP, WARPS, STAGES = 512, 64, 8, 3  # measured on an H100 with rank 16 and 16,384 tokens
LEAST_COLUMNS = 4096  # a narrower layer gains nothing
LARGEST_RANK = 16  # with 64, torch's products are faster
LEAST_PROGRAMS = 2 * 132  # two for each multiprocessor of an H100
DROP_BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _softmax_slope(  # type: ignore[no-untyped-def]
    logits, targets, weights, sums, stride, vocabulary, weighted: tl.constexpr, block: tl.constexpr
):
    """Write log-sum-exp of one row to `sums`, and (softmax - one-hot) * weight over the row."""
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    lanes = tl.arange(0, block)
    high = tl.full([block], -3e38, tl.float32)  # finite, so that a logit of -inf is not subtracted from itself
    total = tl.zeros([block], tl.float32)
    for at in range(0, vocabulary, block):
        inside = at + lanes < vocabulary
        x = tl.load(start + at + lanes, mask=inside, other=-3e38).to(tl.float32)
        higher = tl.maximum(high, x)
        total = total * tl.exp(high - higher) + tl.where(inside, tl.exp(x - higher), 0.0)
        high = higher
    highest = tl.max(high, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(high - highest), 0))
    tl.store(sums + row, log_sum)
    target = tl.load(targets + row)
    factor = tl.load(weights + row) if weighted else 1.0
    for at in range(0, vocabulary, block):
        inside = at + lanes < vocabulary
        x = tl.load(start + at + lanes, mask=inside, other=-3e38).to(tl.float32)
        slope = tl.exp(x - log_sum) - tl.where(at + lanes == target, 1.0, 0.0)
        tl.store(start + at + lanes, (slope * factor).to(logits.dtype.element_ty), mask=inside)


def nll_and_slope_in_place(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return -log p of each target [n] in fp32, and its derivative with respect to its logits, written over them.

    Args:
        logits: [n, vocabulary] on a GPU, rows contiguous.
        targets: [n], int64.
        weights: the weight of each target [n], fp32; None is 1.
    """
    chosen = logits.gather(1, targets[:, None]).float().squeeze(1)  # before the kernel overwrites them
    sums = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device(logits.device):
        _softmax_slope[(len(logits),)](
            logits, targets, sums if weights is None else weights, sums, logits.stride(0), logits.shape[1],
            weighted=weights is not None, block=LOSS_BLOCK, num_warps=LOSS_WARPS,
        )  # fmt: skip
    losses = sums - chosen
    return losses if weights is None else losses * weights, logits


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


@triton.jit  # type: ignore[untyped-decorator]
def _drop(  # type: ignore[no-untyped-def]
    x, keys, module, below, scale, out, features, stride, tokens_each, of_each: tl.constexpr, block: tl.constexpr
):
    """Write a block of a token's features with dropout: the hash of `lora_kernels.hash_features`."""
    token = tl.program_id(0)
    lanes = tl.program_id(1) * block + tl.arange(0, block)
    adapter = token // tokens_each
    limit = tl.load(below + adapter) if of_each else below
    factor = tl.load(scale + adapter) if of_each else scale
    z = (tl.load(keys + token) ^ tl.load(module)) + lanes * -1640531527
    z = (z ^ ((z >> 16) & 0xFFFF)) * -2048144789
    z = (z ^ ((z >> 13) & 0x7FFFF)) * -1028477387
    z = z ^ ((z >> 16) & 0xFFFF)
    inside, at = lanes < features, token.to(tl.int64)
    kept = tl.load(x + at * stride + lanes, mask=inside & ((z & 0xFFFF) >= limit), other=0.0).to(tl.float32)
    tl.store(out + at * features + lanes, (kept * factor).to(out.dtype.element_ty), mask=inside)


def drop(x: Tensor, token_keys: Tensor, module_key: Tensor, below: int | Tensor, scale: float | Tensor) -> Tensor:
    """Return x [..., features] with dropout; see `lora_kernels.drop`. Equal bits."""
    features = x.shape[-1]
    rows = x.reshape(-1, features)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    adapters = len(below) if isinstance(below, Tensor) else 1
    with torch.cuda.device(x.device):
        _drop[(len(rows), triton.cdiv(features, DROP_BLOCK))](
            rows, token_keys, module_key, below, scale, out, features, rows.stride(0),
            len(rows) // adapters, of_each=isinstance(below, Tensor), block=DROP_BLOCK,
        )  # fmt: skip
    return out
