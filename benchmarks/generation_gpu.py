"""Answers for evaluation on one GPU, in Phi-3 mini's shape (random weights): ours against batched `model.generate`.

python benchmarks/generation_gpu.py [--work FOLDER] [--compiled]

All prompts are answered with as many tokens, so that tokens per second count the same work. `--compiled` adds
transformers' own fast way, a compiled static cache, whose first call takes a minute.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import row
from train_gpu import TINY, VOCABULARY, build_base

NEW, PROMPTS = (16, 12) if TINY else (128, 256)


def main() -> None:
    """Print the table."""
    from loraflow.base.load import load_model, load_tokenizer
    from loraflow.evaluation.generation import answer_all

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--compiled", action="store_true")
    chosen = parser.parse_args()
    work = chosen.work or Path(tempfile.mkdtemp())
    if not (work / "base").exists():
        build_base(work / "base")
    dtype, device = ("float32", "cpu") if TINY else ("bfloat16", "cuda")
    model, tokenizer = load_model(work / "base", dtype, {"device": device}), load_tokenizer(work / "base")
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(np.log(30 if TINY else 350), 0.4, PROMPTS)), 16, 1500).astype(int)
    prompts = [draw.integers(3, VOCABULARY - 64, length).tolist() for length in lengths]

    def by_generate(batch: int, some: list[list[int]], **options: Any) -> list[list[int]]:
        """Answer in the order given, padded on the left, as the documentation of `generate` does."""
        said = []
        for first in range(0, len(some), batch):
            part = some[first : first + batch]
            width = max(map(len, part))
            ids = torch.tensor([[0] * (width - len(one)) + one for one in part], device=model.device)
            mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part], device=model.device)
            with torch.inference_mode():
                out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False,
                                     temperature=None, top_p=None, top_k=None, eos_token_id=None, pad_token_id=0,
                                     **options)  # fmt: skip
            said += out[:, width:].tolist()
        return said

    def by_ours(batch: int, some: list[list[int]]) -> list[Any]:
        return answer_all(model, tokenizer, some, stop_ids=[], max_new_tokens=NEW, batch_size=batch)

    def measure(name: str, batch: int, answer: Callable[..., Any], some: list[list[int]], **options: Any) -> float:
        answer(batch, some[:batch], **options)  # warm up
        gc.collect()
        if not TINY:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        started = time.perf_counter()
        answer(batch, some, **options)
        if not TINY:
            torch.cuda.synchronize()
        speed = len(some) * NEW / (time.perf_counter() - started)
        row(name, batch, round(speed), round(speed / speeds[0] if speeds else 1, 1),
            round(torch.cuda.max_memory_allocated() / 2**30, 1) if not TINY else 0)  # fmt: skip
        return speed

    card = torch.cuda.get_device_name() if not TINY else "cpu"
    print(f"{card}, torch {torch.__version__}, {dtype}, prompts of {lengths.mean():.0f} tokens, {NEW} new ones")
    row("what", "rows at a time", "new tokens/s", "x the first", "GiB")
    speeds: list[float] = []
    speeds.append(measure("model.generate", 8, by_generate, prompts[:16]))
    measure("model.generate", 64, by_generate, prompts[:64])
    if chosen.compiled:
        measure("model.generate, compiled static cache", 64, by_generate, prompts[:128], cache_implementation="static")
    for batch in (8, 64, 128):
        measure("ours", batch, by_ours, prompts if batch > 8 else prompts[:32])


if __name__ == "__main__":
    main()
