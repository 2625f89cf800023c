"""Near-duplicates: how many planted copies are found, and the speed and memory of check_dataset with the search.

    python benchmarks/near_duplicates.py [ROWS [PLANTED]]

The oracle compares all pairs: a sparse matrix of rows and 5-grams, times its transpose, counts the common 5-grams. Times
are wall and CPU seconds of one process; `taskset -c 0` keeps it on one core.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.sparse import csr_array

from loraflow.data.checks.near import THRESHOLD, Comparison, candidates_of, comparable_text, grams, jaccard
from loraflow.data.checks.split import normalize

Chat = list[dict[str, str]]

CHECK = """
import sys, tempfile, time
from pathlib import Path
from loraflow.config.data import Data
from loraflow.data.checks import check
from loraflow.job import Inputs, Job, Progress
fields = {"format", "columns", "train", "heldout", "extra_heldout", "validation_fraction", "system", "duplicates", "limit"}
config = Data().model_dump(include=fields | {"heldout_fraction", "seed"})
if sys.argv[2] != "off":
    config["near_duplicates"] = sys.argv[2]
job = Job(stage="check_dataset", version=1, config=config)
with tempfile.TemporaryDirectory() as out:
    wall, cpu = time.perf_counter(), time.process_time()
    rows = check.run(job, Inputs({"dataset": Path(sys.argv[1])}), Path(out), Progress()).report["counts"]["read"]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
status = Path("/proc/self/status").read_text()  # ru_maxrss would include the process that started this one
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(f"{rows / wall:,.0f} rows/s (wall), {rows / cpu:,.0f} rows/s (CPU), peak {peak:,.0f} MB")
"""


def make_chats(rows: int, planted: int, seed: int = 0) -> list[Chat]:
    """Return random chats, and near copies of some of them at the end."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", k=rng.randint(2, 9))) for _ in range(20_000)]
    texts = [(" ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=10))) for _ in range(rows)]
    texts += [near_copy(texts[number], words, rng) for number in rng.sample(range(rows), planted)]
    return [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in texts]


def near_copy(original: tuple[str, str], words: list[str], rng: random.Random) -> tuple[str, str]:
    """Return a copy of a question and its answer: up to three other words, other spaces or capitals, at 0.8 or above."""
    while True:
        question = original[0].split()
        for _ in range(rng.randint(0, 3)):
            question[rng.randrange(len(question))] = rng.choice(words)
        copy = ("  ".join(question).upper() if rng.random() < 0.3 else " ".join(question), original[1])
        if jaccard(*(grams(normalize(" ".join(pair))) for pair in (original, copy))) >= THRESHOLD:
            return copy


def all_pairs(texts: list[str]) -> set[tuple[int, int]]:
    """Return all pairs at or above the threshold, by comparing all rows."""
    numbers: dict[str, int] = {}
    columns: list[int] = []
    starts = [0]
    for text in texts:
        columns += [numbers.setdefault(gram, len(numbers)) for gram in grams(text)]
        starts.append(len(columns))
    sizes = np.diff(starts)
    matrix = csr_array((np.ones(len(columns), np.int32), columns, starts), shape=(len(texts), len(numbers)))
    found: set[tuple[int, int]] = set()
    for begin in range(0, len(texts), 500):
        common = (matrix[begin : begin + 500] @ matrix.T).tocoo()
        row, column = common.coords[0] + begin, common.coords[1]
        near = (row < column) & (common.data >= THRESHOLD * (sizes[row] + sizes[column] - common.data) - 1e-9)
        found |= set(zip(row[near].tolist(), column[near].tolist(), strict=True))
    return found


def found_pairs(texts: list[str]) -> set[tuple[int, int]]:
    """Return the pairs that the search finds."""
    candidates, comparison = candidates_of(texts), Comparison(texts.__getitem__)
    equal = {(int(first), row) for row, first in enumerate(candidates.first) if first != row}
    return equal | {(a, b) for b in range(len(texts)) for a in candidates.before(b) if comparison.is_near(a, b)}


def main() -> None:
    rows, planted = (int(text) for text in [*sys.argv[1:], *("20000", "500")[len(sys.argv) - 1 :]])
    chats = make_chats(rows, planted)
    texts = [comparable_text(chat) for chat in chats]
    wall, cpu = time.perf_counter(), time.process_time()
    found = found_pairs(texts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"search alone     {len(texts) / wall:,.0f} rows/s (wall), {len(texts) / cpu:,.0f} rows/s (CPU)")
    if rows <= 50_000:
        oracle = all_pairs(texts)
        print(
            f"pairs            {len(oracle)} at or above {THRESHOLD}, {len(found & oracle)} found, "
            f"{len(found - oracle)} found below {THRESHOLD}"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "files", "train.jsonl")
        file.parent.mkdir()
        file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
        for policy in ("off", "report", "drop"):
            command = [sys.executable, "-c", CHECK, folder, policy]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
            print(f"check, {policy:<9} {done.stdout.strip()}")


if __name__ == "__main__":
    main()
