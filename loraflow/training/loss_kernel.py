"""The loss and its gradient with respect to the logits in one Triton kernel, for logits on a GPU.

Written with torch's operations, they pass over fp32 copies of the logits about ten times. With a vocabulary of 128,256
that was a tenth of a step. The kernel reads the logits twice and writes the gradient over them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8


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
            weighted=weights is not None, block=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    losses = sums - chosen
    return losses if weights is None else losses * weights, logits
