"""Measure LoRA training on 1, 2, … GPUs of a host, on the same rows: speed, scaling, and losses side by side.

    python benchmarks/train_multi_gpu.py           1, 2, 4, 8, as many as there are
    python benchmarks/train_multi_gpu.py 1 2

Each GPU gets the same tokens in a step: twice the GPUs, twice the global batch. A run with the global batch of one GPU
on all of them shows that the losses are the same; `--sharded` adds a run in which they share one copy of the base.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_training.cases import TINY, WARM_UP, Case, Setting
from gpu_training.model import build_base, build_tokens
from gpu_training.run import run_loraflow

TIMED = 21
PER_GPU = 8  # rows of 2,048 tokens
NOT_COMPILED: dict[str, Setting] = {"runtime.compile": "off"} if TINY else {}


def all_reduce_ms(gpus: int) -> float:
    """Return the milliseconds of one all-reduce of 25 million fp32 numbers, the gradients of an adapter of rank 16."""
    import subprocess

    script = """
import os, time, torch, torch.distributed as dist
dist.init_process_group("nccl"); torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
x = torch.ones(25_165_824, device="cuda")
for _ in range(5): dist.all_reduce(x)
torch.cuda.synchronize(); t = time.perf_counter()
for _ in range(20): dist.all_reduce(x)
torch.cuda.synchronize()
if dist.get_rank() == 0: print("ms", (time.perf_counter() - t) / 20 * 1e3)
dist.destroy_process_group()
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(script)
        file.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("ms")))


def main() -> None:
    """Print the table."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", type=int)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--sharded", action="store_true")
    arguments = parser.parse_args()
    available = torch.cuda.device_count() or (os.cpu_count() or 1)
    counts = arguments.gpus or [n for n in (1, 2, 4, 8) if n <= available]
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base").exists():
        build_base(work / "base")
    rows = (WARM_UP + TIMED) * PER_GPU * max(counts) + 16
    if not (work / f"tokens-{rows}").exists():
        build_tokens(work / f"tokens-{rows}", rows)
    if (work / "tokens").is_symlink() or not (work / "tokens").exists():
        (work / "tokens").unlink(missing_ok=True)
        (work / "tokens").symlink_to(f"tokens-{rows}")
    else:
        (work / "tokens").rename(work / f"tokens-of-{time.time():.0f}")
        (work / "tokens").symlink_to(f"tokens-{rows}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{name} × {available}, torch {torch.__version__}")
    results: dict[str, dict[str, Any]] = {}
    most = max(counts)
    runs = [(str(gpus), gpus, {}) for gpus in counts]
    if arguments.sharded:
        runs.append((f"{most}, base sharded", most, {"runtime.shard_base": "on"}))
    for label, gpus, settings in runs:
        case = Case(f"gpus-{label.replace(', ', '-').replace(' ', '-')}", label, rows=PER_GPU * gpus, timed=TIMED,
                    settings={"runtime.devices": gpus, **settings, **NOT_COMPILED})  # fmt: skip
        results[label] = run_loraflow(case, work) | {"gpus": gpus}
        print(label, json.dumps({k: v for k, v in results[label].items() if k != "losses"}), flush=True)
    fewest = str(min(counts))
    base = results[fewest]["tokens_per_second"] / min(counts)
    print("\nGPUs     tok/s  × one efficiency  ms/step    GiB  all-reduce ms")
    for label, result in results.items():
        gpus = result["gpus"]
        reduce = all_reduce_ms(gpus) if gpus > 1 and torch.cuda.is_available() else 0.0
        ratio = result["tokens_per_second"] / base
        print(f"{label:>4s} {result['tokens_per_second']:9,.0f} {ratio:6.2f} {ratio / gpus:10.1%} {result['step_ms']:8.1f} "
              f"{result['peak_gib'] or 0:6.1f} {reduce:6.2f}")  # fmt: skip
    same = Case("same-batch", "", rows=PER_GPU, timed=TIMED,
                settings={"runtime.devices": most, **NOT_COMPILED})  # fmt: skip
    same_batch = run_loraflow(same, work)
    print(f"losses with the global batch of one GPU, on 1 and on {most}:")
    for label, result in ((fewest, results[fewest]), (str(most), same_batch)):
        print(f"  {label}: {[round(x, 4) for x in result['losses']]}")


if __name__ == "__main__":
    main()
