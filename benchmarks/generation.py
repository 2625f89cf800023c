"""Answers for evaluation on the CPU: batches against one by one, and a shared system prompt computed once against anew.

python benchmarks/generation.py MODEL_FOLDER [DTYPE [ROWS [NEW_TOKENS]]]

Says whether the answers are the same. Of both sides it gives wall and CPU seconds: the latter bear a noisy machine.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from measure import row

from loraflow.base.load import load_model, load_tokenizer, stop_ids
from loraflow.data.loss_mask import ChatTemplate
from loraflow.evaluation import generation
from loraflow.evaluation.prefix_cache import common_length, shared_prefix

BATCH = 20


def main() -> None:
    """Print the table."""
    folder, dtype = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "float32"
    rows, new = (int(sys.argv[k]) if len(sys.argv) > k else default for k, default in ((3, 64), (4, 64)))
    chats = [json.loads(line)["messages"] for line in Path("data/heldout.jsonl").open()][:rows]
    template, tokenizer = ChatTemplate(folder), load_tokenizer(folder)
    prompts, model = template.prompt_ids(chats), load_model(folder, dtype, {"device": "cpu"})
    encoded = template.encode(chats, "last_assistant")
    stops = stop_ids(folder)

    def answers(prompts: list[list[int]], size: int, shared: bool, tokens: int = new) -> tuple[Any, float, float]:
        generation.shared_prefix = shared_prefix if shared else lambda *_: None
        return timed(lambda: generation.answer_all(model, tokenizer, prompts, batch_size=size, stop_ids=stops,
                                                   max_new_tokens=tokens))  # fmt: skip

    def losses(shared: bool) -> tuple[Any, float, float]:
        generation.shared_prefix = shared_prefix if shared else lambda *_: None
        return timed(lambda: generation.answer_losses(model, encoded, tokenizer.pad_token_id, BATCH))

    shared, total = common_length(prompts, 10**6), sum(map(len, prompts))
    saved = shared * (rows - 1) / total
    print(f"{dtype}, {rows} prompts of {total / rows:.0f} tokens, of which {shared} are shared: {saved:.0%} of all")
    answers(prompts[:4], 4, True, 2)  # warm up
    row("what", "rows", "wall s", "CPU s", "tokens/s")
    anew, wall, cpu_anew = answers(prompts, BATCH, False)
    row(f"{BATCH} at a time", rows, wall, cpu_anew, sum(a["tokens"] for a in anew) / wall)
    once, wall, cpu_once = answers(prompts, BATCH, True)
    row(f"{BATCH} at a time, shared prefix", rows, wall, cpu_once, sum(a["tokens"] for a in once) / wall)
    _, _, cpu_prompts = answers(prompts, BATCH, False, 1)
    row("the prompts alone", rows, "", cpu_prompts, "")
    print(f"shared prefix: {cpu_anew / cpu_once:.2f} × by CPU; predicted, from the prompts' share, "
          f"{cpu_anew / (cpu_anew - saved * cpu_prompts):.2f} ×")  # fmt: skip
    print(f"{sum(a != b for a, b in zip(anew, once, strict=True))} of {rows} answers differ from those without it")
    one, wall, cpu_anew = losses(False)
    row("losses", rows, wall, cpu_anew, "")
    other, wall, cpu_once = losses(True)
    row("losses, shared prefix", rows, wall, cpu_once, "")
    apart = max(abs(a - b) / max(1, n) for (a, n), (b, _) in zip(one, other, strict=True))
    print(f"shared prefix: {cpu_anew / cpu_once:.2f} × by CPU; losses differ by at most {apart:.1e} nats per token")
    some = min(16, rows)
    alone, wall, cpu = answers(prompts[:some], 1, False)
    row("one by one", some, wall, cpu, sum(a["tokens"] for a in alone) / wall)
    print(f"{sum(a['text'] != b['text'] for a, b in zip(alone, anew, strict=False))} of {some} differ from one by one")


def timed(work: Any) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = work()
    return out, time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
