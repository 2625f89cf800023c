"""The table of the GPU training benchmark, with the measured speed limit of the card."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gpu_training.cases import CASES, TINY
from gpu_training.model import flops_per_token


def measure_peak_flops() -> float:
    """Measure the FLOP/s of an 8192³ bf16 matrix product."""
    import torch

    if TINY:
        return 1e11
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(times[5:])


def print_table(results: dict[str, dict[str, Any]], work: Path, peak_flops: float) -> None:
    """Print speed, memory and losses of each case, and the speed limit of the card."""
    from loraflow.data.token_rows import TokenRows

    rows = TokenRows(work / "tokens" / "train")
    target_share = sum(int((rows.document(i)[1][1:] != -100).sum()) for i in range(len(rows))) / rows.lengths.sum()
    limit = peak_flops / flops_per_token(rows.lengths.astype(float), float(target_share))
    print(f"\nceiling {limit:,.0f} tokens/s: {peak_flops / 1e12:.0f} TFLOP/s over "
          f"{flops_per_token(rows.lengths.astype(float), float(target_share)) / 1e9:.2f} GFLOP a token")  # fmt: skip
    best, card = (results.get(name, {}).get("tokens_per_second") for name in ("trl-best", "card"))
    print(
        f"{'case':14s} {'tok/s':>8s} {'ms/step':>8s} {'GiB':>6s} {'% ceil':>6s} {'x trl':>6s} {'x card':>6s} {'1st s':>6s}"
    )
    for case in CASES:
        if (result := results.get(case.name)) is None:
            continue
        speed = result["tokens_per_second"]
        print(f"{case.name:14s} {speed:8,.0f} {result['step_ms']:8.1f} {result['peak_gib'] or 0:6.1f} "
              f"{100 * speed / limit:6.1f} {speed / best if best else 0:6.2f} {speed / card if card else 0:6.1f} "
              f"{result.get('first_step_s', 0):6.1f}  "
              f"{case.description}")  # fmt: skip
        print(f"{'':14s} losses {[round(x, 3) for x in result['losses'][::2]]}")
    print("1st s: from the start of the process to the end of the first step, compiling included")
