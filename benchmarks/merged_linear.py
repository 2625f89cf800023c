"""loralib's MergedLinear against peft's plain LoRA on Phi-3 mini's qkv_proj, forward and backward: milliseconds and memory.

python benchmarks/merged_linear.py [TOKENS]        default 8,192 on a GPU, 64 on a CPU

The same weight, rank 16, all three blocks adapted, under bf16 autocast with fp32 adapters as both train. loralib's own
layer, which makes the whole ΔW in each forward pass, stands beside them.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import loralib
import peft
import torch
from measure import row
from peft.tuners.lora import Linear as PeftLinear

from loraflow.adapters.loralib.layers import wrap_module

WIDE, TALL, RANK = 3072, 9216, 16
ROUNDS = 30


def sides() -> dict[str, Any]:
    """Return the three layers, on the same bf16 weight."""
    torch.manual_seed(0)
    base = torch.nn.Linear(WIDE, TALL, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    settings = {"r": RANK, "lora_alpha": 32, "lora_dropout": 0.0}
    wrapped = torch.nn.Sequential()
    wrapped.add_module("qkv_proj", base)
    plain = peft.get_peft_model(wrapped, peft.LoraConfig(target_modules=["qkv_proj"], **settings)).model.qkv_proj  # type: ignore[arg-type]
    assert isinstance(plain, PeftLinear)
    theirs = loralib.MergedLinear(WIDE, TALL, enable_lora=[True] * 3, fan_in_fan_out=False, bias=False, **settings)
    theirs.weight.data = base.weight.data
    ours = wrap_module(base, sizes=[TALL // 3] * 3, enable_lora=[True] * 3, merge_weights=False, **settings)
    return {"peft, plain LoRA": plain, "ours": ours, "loralib 0.1.2": theirs}


def main() -> None:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192 if device == "cuda" else 64
    layers = {name: layer.to(device) for name, layer in sides().items()}
    x = torch.randn(1, tokens, WIDE, device=device, dtype=torch.bfloat16)
    slope = torch.randn(1, tokens, TALL, device=device, dtype=torch.bfloat16)
    for layer in layers.values():
        layer.train()  # loralib's returns nothing
        torch.nn.init.normal_(
            layer.lora_B["default"].weight if isinstance(layer, PeftLinear) else layer.lora_B, std=0.02
        )

    def step(layer: Any) -> Callable[[], None]:
        def once() -> None:
            leaf = x.detach().requires_grad_()
            with torch.autocast(device, torch.bfloat16):
                out = layer(leaf)
            out.backward(slope.to(out.dtype))
            layer.zero_grad(set_to_none=True)

        return once

    seconds: dict[str, list[float]] = {name: [] for name in layers}
    peak = dict.fromkeys(layers, 0.0)
    for turn in range(ROUNDS + 3):
        for name, layer in layers.items():
            once = step(layer)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if device == "cuda" else 0
            started = time.perf_counter()
            for _ in range(5):
                once()
            if device == "cuda":
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
            if turn >= 3:
                seconds[name].append((time.perf_counter() - started) / 5)
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{card}, torch {torch.__version__}, peft {peft.__version__}, {tokens} tokens, medians of {ROUNDS} turns")
    row("layer", "ms", "x peft", "MiB beside weights")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["peft, plain LoRA"], strict=True))
        row(name, statistics.median(times) * 1e3, ratio, peak[name])


if __name__ == "__main__":
    main()
