"""Run a case with loraflow's train stage, or with a peer: trl's SFTTrainer, or unsloth."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_training import ROOT
from gpu_training.cases import LENGTH, TINY, WARM_UP, Case, recipe_of
from gpu_training.model import base_folder, documents, split_base, step_tokens


def run_loraflow(case: Case, work: Path) -> dict[str, Any]:
    """Run the train stage in its worker process, as the flow does."""
    from loraflow.cli.show import memory_line
    from loraflow.execution.job_file import JobFile, read_memory
    from loraflow.store import Ref
    from tests.job_factory import make_job

    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    job = make_job("train", recipe_of(case), {"tokens": ref, "base": ref})
    home = work / case.name
    shutil.rmtree(home, ignore_errors=True)  # of an earlier call; compiled code is in another folder
    home.mkdir()
    folders = {"tokens": work / "tokens", "base": base_folder(work, case)}
    job_file = JobFile(job, home / "out", folders, home).write()
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(work / "compiled")}
    started = time.time()
    with (home / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "loraflow.execution.worker", str(job_file)]
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, env=env).returncode
    if code:
        raise RuntimeError((home / "log.txt").read_text()[-3000:])
    engine = json.loads((home / "out" / "telemetry" / "engine.json").read_text())
    curve = [json.loads(line) for line in (home / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()]
    progress_lines = [json.loads(line) for line in (home / "progress.jsonl").read_text().splitlines()]
    time_of_step = {line["step"]: line["time"] for line in progress_lines if "step" in line}
    # Every fifth step is logged, which waits for the GPU. The time of the step after it is one kernel launch late.
    first, last = WARM_UP + 1, WARM_UP + 1 + (case.timed - 1) // 5 * 5
    tokens = step_tokens(work, case)[first:last].sum()
    intervals = [time_of_step[k + 5] - time_of_step[k] for k in range(first, last, 5)]
    shutil.rmtree(home / "out" / "adapter")
    return {
        "tokens_per_second": tokens / (time_of_step[last] - time_of_step[first]),
        "step_ms": statistics.median(intervals) / 5 * 1e3,
        "peak_gib": engine.get("peak_gib"),
        "memory": memory_line(read_memory(home)),
        "first_step_s": time_of_step[1] - started,
        "losses": [row["loss"] for row in curve if "loss" in row],
        "engine": engine,
    }


def run_baseline(case: Case, work: Path, unsloth: Path | None) -> dict[str, Any]:
    """Run trl or unsloth with a case's settings, in its own process. `unsloth` is the folder of its environment."""
    env = {**os.environ, "LORAFLOW_BENCH_BASELINE": json.dumps([case.name, str(work)])}
    if case.peer == "unsloth":
        if unsloth is None:
            raise RuntimeError("needs --unsloth FOLDER, its environment (docs/performance.md)")
        split_base(work, case)
        env["PYTHONPATH"] = os.pathsep.join([str(unsloth), env.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "train_gpu.py")], capture_output=True, text=True, env=env, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def baseline_main(case: Case, work: Path) -> None:
    """Train with trl's SFTTrainer in this process. Print the figures as JSON."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig

    options = dict(case.baseline or {})
    torch.backends.cuda.enable_cudnn_sdp(options.pop("cudnn", True))
    packing = options.get("packing", False)
    options.setdefault("per_device_train_batch_size", case.rows)
    steps = WARM_UP + case.timed
    data = baseline_dataset(
        int(steps * options["per_device_train_batch_size"] * (LENGTH / 400 * 1.2 if packing else 1)) + 64
    )
    if options.get("use_liger_kernel"):
        options["liger_kernel_config"] = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    if TINY:
        options.pop("use_liger_kernel", None), options.pop("liger_kernel_config", None)
    timed_trainer, times, tokens = make_timed_trainer(wait_every=1)  # trl waits in every step for its own metrics
    trainer = timed_trainer(
        model=AutoModelForCausalLM.from_pretrained(
            base_folder(work, case), dtype=torch.bfloat16, attn_implementation=baseline_attention(bool(packing)),
            device_map=None if TINY else {"": 0},
        ),
        args=SFTConfig(
            output_dir=str(work / "trl"), max_steps=steps, learning_rate=1e-4, lr_scheduler_type="cosine", bf16=True,
            max_length=LENGTH, save_strategy="no", report_to="none", logging_steps=20, seed=0, disable_tqdm=True,
            use_cpu=TINY, gradient_checkpointing_kwargs={"use_reentrant": False}, **options,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(base_folder(work, case)),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0 if packing else 0.05, target_modules="all-linear",
                               task_type="CAUSAL_LM"),
    )  # fmt: skip
    result = trainer.train()
    print(json.dumps({
        "tokens_per_second": sum(tokens[WARM_UP : steps - 1]) / (times[steps - 1] - times[WARM_UP]),
        "step_ms": statistics.median(b - a for a, b in itertools.pairwise(times[WARM_UP:])) * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0,
        "losses": [result.training_loss],
    }))  # fmt: skip


def baseline_dataset(count: int) -> Any:
    """Return random documents as a dataset for trl."""
    from datasets import Dataset

    rows = documents(count)
    return Dataset.from_dict({"input_ids": [a.tolist() for a, _ in rows], "labels": [b.tolist() for _, b in rows]})


def baseline_attention(packing: bool) -> str:
    """Return the attention implementation of a case."""
    if not packing or TINY:
        return "sdpa"
    from loraflow.hardware.attention import DOCUMENTS
    from loraflow.training.attention import register

    register()  # torch's varlen FA2, which needs no package; trl's collator passes the document boundaries to it
    return DOCUMENTS


def make_timed_trainer(wait_every: int) -> tuple[type, list[float], list[int]]:
    """Return an SFTTrainer that records when each step starts and its tokens, and the two lists.

    It waits for the GPU at every `wait_every`-th step: the times of the other steps are those of the host.
    """
    import torch
    from trl import SFTTrainer

    times: list[float] = []
    tokens: list[int] = []

    class TimedTrainer(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            if torch.cuda.is_available() and len(times) % wait_every == 0:
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            tokens.append(int((inputs["input_ids"] != 0).sum()))
            if len(times) == WARM_UP and torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            return super().training_step(model, inputs, *args, **options)

    return TimedTrainer, times, tokens
