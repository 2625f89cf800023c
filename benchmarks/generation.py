"""Answers for evaluation on the CPU: sorted batches against one by one, and whether they are the same.

python benchmarks/generation.py MODEL_FOLDER [DTYPE]
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from loraflow.base.load import load_model, load_tokenizer, stop_ids
from loraflow.data.mask import ChatTemplate
from loraflow.evaluation.generation import answer_all

if __name__ == "__main__":
    folder, dtype = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "float32"
    chats = [json.loads(line)["messages"] for line in Path("data/heldout.jsonl").open()][:64]
    template, tokenizer = ChatTemplate(folder), load_tokenizer(folder)
    prompts, model = template.prompt_ids(chats), load_model(folder, dtype, {"device": "cpu"})
    options = {"stop_ids": stop_ids(folder), "max_new_tokens": 64}
    answer_all(model, tokenizer, prompts[:2], batch_size=2, **options)  # warm up
    rates, answers = {}, {}
    for size, count in ((1, 16), (20, 64), (64, 64)):
        started = time.perf_counter()
        answers[size] = answer_all(model, tokenizer, prompts[:count], batch_size=size, **options)
        rates[size] = sum(a["tokens"] for a in answers[size]) / (time.perf_counter() - started)
        print(
            f"{dtype}, {size} at a time: {rates[size]:.1f} tokens/s, {rates[size] / rates[1]:.1f} × one by one",
            flush=True,
        )
    changed = sum(a["text"] != b["text"] for a, b in zip(answers[1], answers[20][:16], strict=True))
    print(f"{changed} of 16 answers differ from one by one")
