"""The device time of a training step by class of kernel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu_training.cases import Case
from gpu_training.gradients import build_case_trainer

if TYPE_CHECKING:
    from loraflow.training.trainer import FastTrainer

KERNEL_CLASSES = (
    ("attention", ("flash", "fmha", "attn")),
    ("frozen and LoRA products", ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "sm90")),
    ("compiled elementwise", ("triton",)),
    ("optimizer, clipping", ("multi_tensor", "adam", "foreach")),
    ("copies", ("memcpy", "memset")),
)


def profile_kernels(work: Path, case: Case) -> None:
    """Print the device time of a step by class of kernel."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profile_device

    trainer = build_case_trainer(work, case)
    trainer.model.train()
    trainer.create_optimizer()
    for number in range(4):
        train_step(trainer, number)
    torch.cuda.synchronize()
    with profile_device(activities=[ProfilerActivity.CUDA]) as profile:
        for number in range(4, 7):
            train_step(trainer, number)
        torch.cuda.synchronize()
    print_kernels(case, profile)


def train_step(trainer: FastTrainer, number: int) -> None:
    import torch

    for micro in (item := trainer.steps[number])["micro_batches"]:
        (trainer.micro_batch_loss(micro) / item["num_supervised_tokens"]).backward()
    torch.nn.utils.clip_grad_norm_(trainer.trained, 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def print_kernels(case: Case, profile: Any) -> None:
    """Print the classes of kernels, and the slowest kernels."""
    rows = [(e.key, e.self_device_time_total / 3e3, e.count / 3) for e in profile.key_averages()
            if e.self_device_time_total > 0 and "CUDA" in str(e.device_type)]  # fmt: skip
    total = sum(ms for _, ms, _ in rows)
    print(f"\n{case.name}: {total:.1f} ms of kernels a step")
    by_class = dict.fromkeys([name for name, _ in KERNEL_CLASSES] + ["other"], 0.0)
    for key, ms, _ in rows:
        lower = key.lower()
        by_class[next((name for name, words in KERNEL_CLASSES if any(word in lower for word in words)), "other")] += ms
    for name, ms in by_class.items():
        print(f"  {name:26s} {ms:8.1f} ms {100 * ms / total:5.1f} %")
    for key, ms, count in sorted(rows, key=lambda row: -row[1])[:22]:
        print(f"    {ms:8.2f} ms {count:6.0f} x {key[:130]}")
