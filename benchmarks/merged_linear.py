"""loralib's MergedLinear against peft's plain LoRA on Phi-3 mini's qkv_proj, forward and backward: milliseconds and memory.

python benchmarks/merged_linear.py [TOKENS]        default 8,192 on a GPU, 64 on a CPU

The same weight, rank 16, all three blocks adapted, under bf16 autocast with fp32 adapters as both train. loralib's own
layer computes the full ΔW in each forward pass; it is measured too.
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
from measure import print_row
from peft.tuners.lora import Linear as PeftLinear

from loraflow.adapters.loralib.layers import wrap_module

IN_FEATURES, OUT_FEATURES, RANK = 3072, 9216, 16
ROUNDS = 30


def build_layers() -> dict[str, Any]:
    """Return the three layers, on the same bf16 weight."""
    torch.manual_seed(0)
    base = torch.nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    settings = {"r": RANK, "lora_alpha": 32, "lora_dropout": 0.0}
    wrapped = torch.nn.Sequential()
    wrapped.add_module("qkv_proj", base)
    plain = peft.get_peft_model(wrapped, peft.LoraConfig(target_modules=["qkv_proj"], **settings)).model.qkv_proj  # type: ignore[arg-type]
    assert isinstance(plain, PeftLinear)
    loralib_layer = loralib.MergedLinear(
        IN_FEATURES, OUT_FEATURES, enable_lora=[True] * 3, fan_in_fan_out=False, bias=False, **settings
    )
    loralib_layer.weight.data = base.weight.data
    loraflow_layer = wrap_module(
        base, sizes=[OUT_FEATURES // 3] * 3, enable_lora=[True] * 3, merge_weights=False, **settings
    )
    return {"peft, plain LoRA": plain, "loraflow": loraflow_layer, "loralib 0.1.2": loralib_layer}


def main() -> None:
    """Print the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 8192 if device == "cuda" else 64
    layers = {name: layer.to(device) for name, layer in build_layers().items()}
    x = torch.randn(1, tokens, IN_FEATURES, device=device, dtype=torch.bfloat16)
    slope = torch.randn(1, tokens, OUT_FEATURES, device=device, dtype=torch.bfloat16)
    for layer in layers.values():
        layer.train()  # not chained: loralib's train() returns nothing
        torch.nn.init.normal_(
            layer.lora_B["default"].weight if isinstance(layer, PeftLinear) else layer.lora_B, std=0.02
        )

    def step_of(layer: Any) -> Callable[[], None]:
        def run_step() -> None:
            leaf = x.detach().requires_grad_()
            with torch.autocast(device, torch.bfloat16):
                out = layer(leaf)
            out.backward(slope.to(out.dtype))
            layer.zero_grad(set_to_none=True)

        return run_step

    seconds: dict[str, list[float]] = {name: [] for name in layers}
    peak = dict.fromkeys(layers, 0.0)
    for round_number in range(ROUNDS + 3):
        for name, layer in layers.items():
            run_step = step_of(layer)
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
            started = time.perf_counter()
            for _ in range(5):
                run_step()
            if device == "cuda":
                torch.cuda.synchronize()
                peak[name] = (torch.cuda.max_memory_allocated() - allocated) / 2**20
            if round_number >= 3:
                seconds[name].append((time.perf_counter() - started) / 5)
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{card}, torch {torch.__version__}, peft {peft.__version__}, {tokens} tokens, medians of {ROUNDS} rounds")
    print_row("layer", "ms", "x peft", "MiB beside weights")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["peft, plain LoRA"], strict=True))
        print_row(name, statistics.median(times) * 1e3, ratio, peak[name])


if __name__ == "__main__":
    main()
