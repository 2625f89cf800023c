"""Time ways to compute a LoRA linear's products on a GPU, one by one, on Phi-3 mini's four linears, rank 16, bf16.

python benchmarks/lora_products.py [TOKENS]        default 16,384

current        the update first, then the frozen product accumulated onto it, as in loraflow/training/lora_kernels.py
concatenated   the update as additional columns of one product: [x h] [W B]ᵀ, and [dy dh] [W A] for the input's gradient
dh and B's gradient: one Triton kernel that reads dy once where that is faster, against two products
Each is printed with its error against the plain products. Clocks follow the card's power limit: differences of a few
percent are noise.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import triton
from measure import print_row

from loraflow.training import triton_kernels

RANK, PAD = 16, 64
SHAPES = {"qkv": (3072, 9216), "o": (3072, 3072), "gate_up": (3072, 16384), "down": (8192, 3072)}


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

    block_tokens = triton_kernels.tokens_of_a_program(dy, RANK)

    def in_one_kernel() -> tuple[torch.Tensor, torch.Tensor]:
        return triton_kernels.products(dy, up, h, block_tokens) if block_tokens else (dy @ up, dy.t() @ h)

    fused = in_one_kernel()
    return {
        "forward, no LoRA": (lambda: x @ weight.t(), 0.0),
        "forward, current": (lambda: (h @ up.t()).addmm_(x, weight.t()), 0.0),
        "forward, concatenated": (concatenated, error(concatenated(), y)),
        "copying x into place": (lambda: x_wide[:, :into].copy_(x), 0.0),
        "backward, no LoRA": (lambda: dy @ weight, 0.0),
        "backward, current": (lambda: (dh @ down).addmm_(dy, weight), 0.0),
        "backward, concatenated": (concatenated_backward, error(concatenated_backward(), dx)),
        "copying dy into place": (lambda: dy_wide[:, :out].copy_(dy), 0.0),
        "dh and B's gradient, two products": (lambda: (dy @ up, dy.t() @ h), 0.0),
        "dh and B's gradient, current": (in_one_kernel, max(error(fused[0], dh), error(fused[1], dy.t() @ h))),
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
