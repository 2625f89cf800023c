"""Generate answers for evaluation on one GPU, in Phi-3 mini's shape (random weights): loraflow and `model.generate`.

python benchmarks/generation_gpu.py [--work FOLDER] [--compiled]

All prompts are answered with the same number of tokens, so that tokens per second count the same work. `--compiled` adds
transformers' compiled static cache, whose first call takes a minute.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gpu_training.cases import TINY, VOCABULARY
from gpu_training.model import build_base
from measure import print_row

from loraflow.base.load import load_model, load_tokenizer
from loraflow.config import Runtime
from loraflow.evaluation.generation import generate_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW_TOKENS, PROMPTS = (16, 12) if TINY else (128, 256)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--compiled", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    if not (work / "base").exists():
        build_base(work / "base")
    dtype = "float32" if TINY else "bfloat16"
    model = load_model(work / "base", dtype, Runtime(device="cpu" if TINY else "cuda"))
    tokenizer = load_tokenizer(work / "base")
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(np.log(30 if TINY else 350), 0.4, PROMPTS)), 16, 1500).astype(int)
    prompts = [generator.integers(3, VOCABULARY - 64, length).tolist() for length in lengths]

    card = torch.cuda.get_device_name() if not TINY else "cpu"
    print(
        f"{card}, torch {torch.__version__}, {dtype}, prompts of {lengths.mean():.0f} tokens, {NEW_TOKENS} new tokens"
    )
    print_row("what", "rows at a time", "new tokens/s", "x the first", "GiB")
    generate, loraflow = partial(run_generate, model), partial(run_loraflow, model, tokenizer)
    first = measure_speed("model.generate", 8, generate, prompts[:16])
    measure_speed("model.generate", 64, generate, prompts[:64], first)
    if arguments.compiled:
        compiled = partial(run_generate, model, cache_implementation="static")
        measure_speed("model.generate, compiled static cache", 64, compiled, prompts[:128], first)
    for batch in (8, 64, 128):
        measure_speed("loraflow", batch, loraflow, prompts if batch > 8 else prompts[:32], first)


def run_generate(
    model: PreTrainedModel, prompts: list[list[int]], batch: int, cache_implementation: str | None = None
) -> None:
    """Answer in the order given, padded on the left, as the documentation of `generate` does."""
    options = {"cache_implementation": cache_implementation} if cache_implementation else {}
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in part], device=model.device)
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )[:, width:].tolist()


def run_loraflow(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], batch: int
) -> None:
    generate_answers(model, tokenizer, prompts, stop_ids=[], max_new_tokens=NEW_TOKENS, batch_size=batch)


def measure_speed(
    name: str,
    batch: int,
    answer: Callable[[list[list[int]], int], None],
    prompts: list[list[int]],
    first: float | None = None,
) -> float:
    """Print a row of the table and return new tokens per second; `first` is the speed of the first row."""
    answer(prompts[:batch], batch)  # warm up
    gc.collect()
    if not TINY:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    answer(prompts, batch)
    if not TINY:
        torch.cuda.synchronize()
    speed = len(prompts) * NEW_TOKENS / (time.perf_counter() - started)
    memory = round(torch.cuda.max_memory_allocated() / 2**30, 1) if not TINY else 0
    print_row(name, batch, round(speed), round(speed / first if first else 1, 1), memory)
    return speed


if __name__ == "__main__":
    main()
