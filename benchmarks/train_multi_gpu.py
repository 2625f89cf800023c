"""LoRA training on 1, 2, … GPUs of a host, on the same rows, through the worker: speed, scaling, losses side by side.

    python benchmarks/train_multi_gpu.py           as many as there are, by doubling
    python benchmarks/train_multi_gpu.py 1 2

Each GPU gets the same tokens in a step: twice the GPUs, twice the global batch. A run with the global batch of one GPU
on all of them shows that the losses are the same; `--sharded` adds a run in which they hold the base together.
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

from train_gpu import TINY, WARM, Case, build_base, build_tokens, ours

TIMED = 21
PER_GPU = 8  # rows of 2,048 tokens


def all_reduce_ms(gpus: int) -> float:
    """Return the milliseconds of one sum over 25 million fp32 numbers, the gradients of an adapter of rank 16."""
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
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="*", type=int)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--sharded", action="store_true")
    chosen = parser.parse_args()
    there = torch.cuda.device_count() or (os.cpu_count() or 1)
    counts = chosen.gpus or [n for n in (1, 2, 4, 8) if n <= there]
    work = chosen.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "base").exists():
        build_base(work / "base")
    rows = (WARM + TIMED) * PER_GPU * max(counts) + 16
    if not (work / f"tokens-{rows}").exists():
        build_tokens(work / f"tokens-{rows}", rows)
    if (work / "tokens").is_symlink() or not (work / "tokens").exists():
        (work / "tokens").unlink(missing_ok=True)
        (work / "tokens").symlink_to(f"tokens-{rows}")
    else:
        (work / "tokens").rename(work / f"kept-{time.time():.0f}")
        (work / "tokens").symlink_to(f"tokens-{rows}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{name} × {there}, torch {torch.__version__}")
    results: dict[str, dict[str, Any]] = {}
    most = max(counts)
    runs = [(str(gpus), gpus, {}) for gpus in counts]
    if chosen.sharded:
        runs.append((f"{most}, base sharded", most, {"runtime.shard_base": "on"}))
    for what, gpus, more in runs:
        case = Case(f"gpus-{what.replace(', ', '-').replace(' ', '-')}", what, rows=PER_GPU * gpus, timed=TIMED,
                    settings={"runtime.devices": gpus, **more} | ({"runtime.compile": "off"} if TINY else {}))  # fmt: skip
        results[what] = ours(case, work) | {"gpus": gpus}
        print(what, json.dumps({k: v for k, v in results[what].items() if k != "losses"}), flush=True)
    fewest = str(min(counts))
    base = results[fewest]["tokens_per_second"] / min(counts)
    print("\nGPUs     tok/s  × one efficiency  ms/step    GiB  all-reduce ms")
    for what, one in results.items():
        gpus = one["gpus"]
        reduce = all_reduce_ms(gpus) if gpus > 1 and torch.cuda.is_available() else 0.0
        ratio = one["tokens_per_second"] / base
        print(f"{what:>4s} {one['tokens_per_second']:9,.0f} {ratio:6.2f} {ratio / gpus:10.1%} {one['step_ms']:8.1f} "
              f"{one['peak_gib'] or 0:6.1f} {reduce:6.2f}")  # fmt: skip
    same = Case("same-batch", "", rows=PER_GPU, timed=TIMED,
                settings={"runtime.devices": most} | ({"runtime.compile": "off"} if TINY else {}))  # fmt: skip
    together = ours(same, work)
    print(f"losses with the global batch of one GPU, on 1 and on {most}:")
    for label, one in ((fewest, results[fewest]), (str(most), together)):
        print(f"  {label}: {[round(x, 4) for x in one['losses']]}")


if __name__ == "__main__":
    main()
