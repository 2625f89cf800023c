"""Measure LoRA training on one GPU: loraflow's train stage, unsloth and trl's trainer, on equal rows.

    python benchmarks/train_gpu.py                     every case
    python benchmarks/train_gpu.py bf16 fp8 trl-best   some of them
    python benchmarks/train_gpu.py bf16 unsloth --unsloth FOLDER   beside unsloth, from its own environment
    python benchmarks/train_gpu.py --check             LoRA gradients against eager fp32
    python benchmarks/train_gpu.py --profile bf16      device time by class of kernel

Cases have Phi-3 mini's shape (3.82 billion random weights) where they name no other. Lengths are lognormal (median
350, clipped to 2,047, so that the 4k model's window masks nothing), half of the tokens have labels. Tokens per second
do not count padding; the time is that of complete steps after the warm-up, from the host's batch to the optimizer. The
ceiling is the measured rate of an 8192³ bf16 product over the counted FLOPs.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from gpu_training.cases import CASES, TIMED, WARM_UP, Case
from gpu_training.gradients import check_gradients
from gpu_training.kernel_times import profile_kernels
from gpu_training.model import build_tokens
from gpu_training.report import measure_peak_flops, print_table
from gpu_training.run import baseline_main, run_baseline, run_loraflow


def main() -> None:
    """Run the cases of the command line and print their table."""
    if "LORAFLOW_BENCH_BASELINE" in os.environ:
        name, work = json.loads(os.environ["LORAFLOW_BENCH_BASELINE"])
        case = next(case for case in CASES if case.name == name)
        if case.peer == "unsloth":
            from gpu_training.unsloth_run import unsloth_main

            unsloth_main(case, Path(work))
        else:
            baseline_main(case, Path(work))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[])
    parser.add_argument("--work", type=Path, help="folder for model and rows, reused by the next call")
    parser.add_argument("--unsloth", type=Path, help="folder with unsloth and its pins, for the cases of that name")
    parser.add_argument("--check", action="store_true", help="compare LoRA's gradients with eager fp32")
    parser.add_argument("--profile", action="store_true", help="print the device time by class of kernel")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)
    names = arguments.cases or [case.name for case in CASES]
    if not (work / "tokens").exists():
        build_tokens(work / "tokens", rows=(WARM_UP + TIMED) * 8 + 16)
    import torch

    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "torch", torch.__version__, flush=True)
    cases = [case for case in CASES if case.name in names]
    if arguments.check:
        check_gradients(work, names)
    elif arguments.profile:
        for case in cases:
            profile_kernels(work, case)
    else:
        peak_flops = measure_peak_flops()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print_table(run_cases(cases, work, arguments.unsloth), work, peak_flops)


def run_cases(cases: list[Case], work: Path, unsloth: Path | None) -> dict[str, dict[str, Any]]:
    """Run each case and print its figures. A case that fails is left out."""
    results = {}
    for case in cases:
        try:
            peer = case.baseline is not None
            results[case.name] = run_baseline(case, work, unsloth) if peer else run_loraflow(case, work)
            print(case.name, json.dumps({k: v for k, v in results[case.name].items() if k != "losses"}), flush=True)
        except RuntimeError as error:
            print(case.name, "failed:", str(error)[-1500:], flush=True)
    return results


if __name__ == "__main__":
    main()
