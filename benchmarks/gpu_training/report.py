"""The table of the GPU training benchmark, with the measured speed limit of the card."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from gpu_training.cases import CASES, PHI3, TINY, Case, Shape
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
    """Print speed, memory and losses of each case, and the speed limit of the card for each shape."""
    limits = {case.shape.name: speed_limit(case.shape, work, peak_flops) for case in CASES if case.name in results}
    for name, limit in limits.items():
        print(f"\n{name}: ceiling {limit:,.0f} tokens/s, {peak_flops / 1e12:.0f} TFLOP/s")
    print(f"{'case':20s} {'tok/s':>8s} {'ms/step':>8s} {'GiB':>6s} {'% ceil':>6s} {'x trl':>6s} {'x card':>6s} "
          f"{'x unsloth':>9s} {'GiB/unsloth':>11s} {'1st s':>6s}")  # fmt: skip
    for case in CASES:
        if (result := results.get(case.name)) is None:
            continue
        speed, memory = result["tokens_per_second"], result["peak_gib"] or 0
        unsloth, best = (results.get(peer_case(case, peer) or "", {}) for peer in ("unsloth", "trl"))
        card = results.get("card", {}) if case.shape is PHI3 else {}
        print(f"{case.name:20s} {speed:8,.0f} {result['step_ms']:8.1f} {memory:6.1f} "
              f"{100 * speed / limits[case.shape.name]:6.1f} {ratio(speed, best.get('tokens_per_second')):>6s} "
              f"{ratio(speed, card.get('tokens_per_second')):>6s} "
              f"{ratio(speed, unsloth.get('tokens_per_second')):>9s} {ratio(memory, unsloth.get('peak_gib')):>11s} "
              f"{result.get('first_step_s', 0):6.1f}  "
              f"{case.description}")  # fmt: skip
        if line := result.get("memory"):
            print(f"{'':20s} {line}")
        print(f"{'':20s} losses {[round(x, 3) for x in result['losses'][::2]]}")
    print("1st s: from the start of the process to the end of the first step, compiling included")


def peer_case(case: Case, peer: str) -> str | None:
    """Return the name of a peer's first case with the same shape and, with unsloth, the same frozen weights."""
    for other in CASES:
        if other.peer == peer and other.shape is case.shape and (peer == "trl" or is_nf4(other) == is_nf4(case)):
            return other.name
    return None


def is_nf4(case: Case) -> bool:
    """Return whether a case's frozen weights are packed in NF4."""
    return case.settings.get("base.quantization") == "nf4" or bool((case.baseline or {}).get("load_in_4bit"))


def ratio(value: float, reference: float | None) -> str:
    """Return value over reference as text, or a dash where there is no reference."""
    return f"{value / reference:.2f}" if reference else "-"


def speed_limit(shape: Shape, work: Path, peak_flops: float) -> float:
    """Return the tokens per second that the card's measured rate allows."""
    from loraflow.data.tokens.token_files import TokenRows

    rows = TokenRows(work / "tokens" / "train")
    target_share = sum(int((rows.document(i)[1][1:] != -100).sum()) for i in range(len(rows))) / rows.lengths.sum()
    return peak_flops / flops_per_token(shape, rows.lengths.astype(float), float(target_share))
