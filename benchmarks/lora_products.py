"""Time ways to compute a LoRA linear's products on a GPU, one by one, on Phi-3 mini's four linears, rank 16, bf16.

python benchmarks/lora_products.py [TOKENS]        default 16,384

current        the update first, then the frozen product accumulated onto it, as in loraflow/training/lora_kernels.py
concatenated   the update as additional columns of one product: [x h] [W B]ᵀ, and [dy dh] [W A] for the input's gradient
fused_triton   one Triton kernel that reads dy once for dh and B's gradient, against two products
Each is printed with its error against the plain products. Clocks follow the card's power limit: differences of a few
percent are noise.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from measure import print_row

RANK, PAD = 16, 64
SHAPES = {"qkv": (3072, 9216), "o": (3072, 3072), "gate_up": (3072, 16384), "down": (8192, 3072)}
BLOCK_TOKENS, CHUNK, BLOCK = 256, 1024, 64


@triton.jit
def _both_products(
    dy, up, h, dh, grad, tokens, out, block_tokens: tl.constexpr, chunk: tl.constexpr, block: tl.constexpr,
    rank: tl.constexpr,
):  # fmt: skip
    """Add up dh over a chunk of columns, and B's gradient over a block of tokens: the caller adds up the partial sums."""
    i, j = tl.program_id(0), tl.program_id(1)
    token, r = i * block_tokens + tl.arange(0, block_tokens), tl.arange(0, rank)
    small = tl.load(h + token[:, None] * rank + r[None, :])
    total = tl.zeros((block_tokens, rank), tl.float32)
    for k in range(0, chunk, block):
        n = j * chunk + k + tl.arange(0, block)
        valid = n < out
        slope = tl.load(dy + token[:, None].to(tl.int64) * out + n[None, :], mask=valid[None, :], other=0.0)
        total += tl.dot(slope, tl.load(up + n[:, None] * rank + r[None, :], mask=valid[:, None], other=0.0))
        part = tl.dot(tl.trans(slope), small)
        tl.store(grad + (i * out + n[:, None]) * rank + r[None, :], part, mask=valid[:, None])
    tl.store(dh + (j * tokens + token[:, None]) * rank + r[None, :], total)


def fused_triton(dy: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dy B [tokens, rank] and dyᵀ h [out, rank]."""
    tokens, out = dy.shape
    grid = tokens // BLOCK_TOKENS, triton.cdiv(out, CHUNK)
    dh = torch.empty(grid[1], tokens, RANK, device=dy.device)
    grad = torch.empty(grid[0], out, RANK, device=dy.device)
    _both_products[grid](dy, up, h, dh, grad, tokens, out, BLOCK_TOKENS, CHUNK, BLOCK, RANK, num_warps=4, num_stages=3)
    return dh.sum(0).to(dy.dtype), grad.sum(0).to(dy.dtype)


def microseconds(call: Callable[[], object], times: int = 20) -> float:
    """Return the median of three timings."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for _ in range(3):
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / times * 1e3)
    return statistics.median(found)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.float() - exact.float()).norm() / exact.float().norm())


def cases_of_linear(tokens: int, into: int, out: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Return {way: (its call, its error)} for one linear."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    # With additional columns for B, additional rows for A, and room in x and dy for h and dh.
    wide = torch.randn(out + PAD, into + PAD, **options) * 0.02
    down, up = torch.randn(RANK, into, **options) * 0.02, torch.randn(out, RANK, **options) * 0.02
    wide[:out, into : into + RANK], wide[out : out + RANK, :into] = up, down
    weight = wide[:out, :into].contiguous()
    x_wide, dy_wide = torch.randn(tokens, into + PAD, **options), torch.randn(tokens, out + PAD, **options)
    x, dy = x_wide[:, :into].contiguous(), dy_wide[:, :out].contiguous()
    h, dh = x @ down.t(), dy @ up
    x_wide[:, into : into + RANK], dy_wide[:, out : out + RANK] = h, dh
    y, dx = (h @ up.t()).addmm_(x, weight.t()), (dh @ down).addmm_(dy, weight)

    def concatenated() -> torch.Tensor:
        return x_wide[:, : into + RANK] @ wide[:out, : into + RANK].t()

    def concatenated_backward() -> torch.Tensor:
        return dy_wide[:, : out + RANK] @ wide[: out + RANK, :into]

    fused = fused_triton(dy, up, h)
    return {
        "forward, no LoRA": (lambda: x @ weight.t(), 0.0),
        "forward, current": (lambda: (h @ up.t()).addmm_(x, weight.t()), 0.0),
        "forward, concatenated": (concatenated, error(concatenated(), y)),
        "copying x into place": (lambda: x_wide[:, :into].copy_(x), 0.0),
        "backward, no LoRA": (lambda: dy @ weight, 0.0),
        "backward, current": (lambda: (dh @ down).addmm_(dy, weight), 0.0),
        "backward, concatenated": (concatenated_backward, error(concatenated_backward(), dx)),
        "copying dy into place": (lambda: dy_wide[:, :out].copy_(dy), 0.0),
        "dh and B's gradient, current": (lambda: (dy @ up, dy.t() @ h), 0.0),
        "dh and B's gradient, fused_triton": (
            lambda: fused_triton(dy, up, h),
            max(error(fused[0], dh), error(fused[1], dy.t() @ h)),
        ),
    }


def main() -> None:
    """Print the table, in microseconds."""
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 16384
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {tokens} tokens")
    print_row("way", *SHAPES, "together", "largest error")
    found = {name: cases_of_linear(tokens, *shape) for name, shape in SHAPES.items()}
    for way in found["o"]:
        times = [microseconds(each[way][0]) for each in found.values()]
        print_row(way, *times, sum(times), f"{max(each[way][1] for each in found.values()):.0e}")


if __name__ == "__main__":
    main()
