"""What compiling the layers costs and saves on a GPU, by width of the layers, dropout and tokens of a step.

    python benchmarks/compile_gain.py

The table is the source of `loraflow/training/cuda_graphs.py`. Each line trains random weights twice with loraflow's train
stage, in one process: uncompiled, then compiled with the compiler's caches off. `compile s` is how much longer the first
step takes. `break-even` is the number of steps after which the compiled training is ahead.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

TINY = os.environ.get("LORAFLOW_BENCH_TINY") == "1"  # a dry run on a CPU, uncompiled: says nothing about speed
STEPS, WARM_UP = 12, 4


@dataclass(frozen=True)
class Shape:
    """A model's shape. `scale` layers of the real model stand for one that is built."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    scale: int = 1
    head_dim: int | None = None


SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3)
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 8192, 16, 32, 8)
PHI3 = Shape("Phi-3 mini, a quarter of its layers", 3072, 8192, 8, 32, 32, scale=4)
QWEN3_600M = Shape("Qwen3-0.6B", 1024, 3072, 28, 16, 8, head_dim=128)
CASES = [
    (SMOLLM2, 1024, 0.0), (SMOLLM2, 1024, 0.05), (SMOLLM2, 8192, 0.05),
    (QWEN3_600M, 1024, 0.0), (QWEN3_600M, 16384, 0.0),
    (LLAMA_1B, 8192, 0.0), (LLAMA_1B, 8192, 0.05), (PHI3, 8192, 0.0), (PHI3, 8192, 0.05),
]  # fmt: skip


def build_base(folder: Path, shape: Shape, device: str | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a Llama of random weights, by default in bfloat16."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    from tests.conftest import build_tokenizer

    folder.mkdir(parents=True)
    build_tokenizer(folder)
    eos = AutoTokenizer.from_pretrained(folder).eos_token_id
    config = LlamaConfig(
        vocab_size=32064, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=2 if TINY else shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim, eos_token_id=eos, pad_token_id=0, bos_token_id=1,
        max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    device = device or ("cpu" if TINY else "cuda")
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype or torch.bfloat16)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def build_tokens(folder: Path, length: int, documents: int) -> None:
    """Write documents of equal length, as the tokenize stage does."""
    from loraflow.data.tokens.token_files import TokenBatch, open_shard

    generator = np.random.default_rng(0)
    ids = generator.integers(3, 500, documents * length).astype(np.int32)
    folder.mkdir(parents=True)
    with open_shard(folder / "train") as append:
        append(TokenBatch(ids, ids.copy(), np.full(documents, length, np.int32)))
    (folder / "report.json").write_text(json.dumps({"figures": {"train_tokens": len(ids)}}))


def train(
    work: Path, base: Path, tokens: int, dropout: float, *, compiled: bool, graphs: bool
) -> tuple[float, float, float]:
    """Train; return (seconds to the end of the first step, median seconds of a later step, peak GiB)."""
    import torch

    from loraflow.config import parse_recipe
    from loraflow.job import Inputs, Progress
    from loraflow.store import Ref
    from loraflow.training import train as stage
    from tests.job_factory import make_job

    length = 128
    torch._dynamo.reset()
    shutil.rmtree(work / "tokens", ignore_errors=True)
    build_tokens(work / "tokens", length, STEPS * tokens // length)
    settings = {
        "base.dtype": "bfloat16", "training_config.bf16": True, "training_config.packing": False,
        "training_config.max_length": length, "training_config.per_device_train_batch_size": tokens // length,
        "training_config.gradient_accumulation_steps": 1, "training_config.max_steps": STEPS,
        "training_config.logging_steps": 1, "training_config.save_strategy": "no",
        "peft_config.lora_dropout": dropout, "runtime.compile": "on" if compiled else "off",
        "runtime.cuda_graphs": "on" if graphs else "off",
        "runtime.device": "cpu" if TINY else "cuda",
    }  # fmt: skip
    recipe = parse_recipe("name: bench\nbase: {model: x}\n", overrides=settings)
    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    home = work / "home"
    shutil.rmtree(home, ignore_errors=True)
    out = home / "out"
    out.mkdir(parents=True)
    job = make_job("train", recipe, {"tokens": ref, "base": ref})
    started = time.time()
    stage.run(job, Inputs({"tokens": work / "tokens", "base": base}), out, Progress(home / "progress.jsonl", work=home))
    lines = [json.loads(line) for line in (home / "progress.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if "step" in line}
    later = [after - before for before, after in pairwise([times[step] for step in range(WARM_UP, STEPS + 1)])]
    engine = json.loads((home / "out" / "telemetry" / "engine.json").read_text())
    losses = [
        json.loads(line).get("loss") for line in (home / "out" / "telemetry" / "curves.jsonl").read_text().splitlines()
    ]
    if os.environ.get("LORAFLOW_BENCH_LOSSES"):
        print({k: v for k, v in engine.items() if "graph" in k}, [x for x in losses if x], flush=True)
    return times[1] - started, statistics.median(later), engine["peak_gib"] or 0.0


def main() -> None:
    """Print the table."""
    import torch
    import torch._inductor.config

    torch._inductor.config.force_disable_caches = True
    work = Path(tempfile.mkdtemp())
    print(torch.cuda.get_device_name() if not TINY else "cpu", "torch", torch.__version__, flush=True)
    bases: dict[str, Path] = {}
    print(
        "shape | tokens | dropout | plain ms | graphs ms | compiled ms | both ms | graphs s | compile s | peak GiB",
        flush=True,
    )
    for shape, tokens, dropout in CASES:
        if shape.name not in bases:
            bases[shape.name] = work / f"base-{len(bases)}"
            build_base(bases[shape.name], shape)
            train(work, bases[shape.name], tokens, dropout, compiled=False, graphs=False)  # warms the libraries up
        base = bases[shape.name]
        ways = [(False, False), (False, True), (True, False), (True, True)]
        found = [
            train(work, base, tokens, dropout, compiled=compiled and not TINY, graphs=graphs)
            for compiled, graphs in ways
        ]
        first = [seconds for seconds, _, _ in found]
        times = " | ".join(f"{step * shape.scale * 1e3:.1f}" for _, step, _ in found)
        print(
            f"{shape.name} | {tokens} | {dropout} | {times} | {first[1] - first[0]:.1f} | {first[2] - first[0]:.1f} | "
            + ", ".join(f"{peak:.1f}" for _, _, peak in found),
            flush=True,
        )


if __name__ == "__main__":
    main()
