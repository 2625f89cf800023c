"""The time of a run's heavy stages with workers that are forked from one process, and with a new Python for each.

    python benchmarks/worker_start.py [ROUNDS]

Each round runs the stages of a small training twice, in a new process and an empty store each time: once with
`runtime.worker_start: fork`, once with `spawn`. The base is a random Phi-3 of two layers, so that the time is that of
starting. The digests of all artifacts must be equal.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RECIPE = """\
name: start
data: {{source: {folder}/data, train: [train.jsonl], heldout: [heldout.jsonl]}}
base: {{model: {folder}/base}}
training_config: {{max_steps: 5, per_device_train_batch_size: 8, max_length: 128, logging_steps: 1, save_steps: 100}}
peft_config: {{target_modules: [qkv_proj, o_proj, gate_up_proj, down_proj]}}
evaluation: {{metrics: [token_loss, exact_match], max_rows: 8, max_new_tokens: 8}}
runtime: {{store: {store}, worker_start: {how}}}
"""


def run_stages(folder: Path, store: Path, how: str) -> dict[str, tuple[float, str]]:
    """Run all stages; return seconds and digest by stage."""
    from loraflow.config import parse_recipe
    from loraflow.execution.runner import run_stage
    from loraflow.execution.workspace import Workspace
    from loraflow.stages import STAGES
    from loraflow.store import Ref

    workspace = Workspace(parse_recipe(RECIPE.format(folder=folder, store=store, how=how)))
    results: dict[str, tuple[float, str]] = {}

    def stage(name: str, **inputs: Ref) -> Ref:
        started = time.perf_counter()
        ref = run_stage(workspace, STAGES[name], **inputs)
        results[name] = (round(time.perf_counter() - started, 2), ref.digest)
        return ref

    rows, base = stage("check_dataset", dataset=stage("version_dataset")), stage("resolve_base")
    adapter = stage("train", tokens=stage("tokenize", rows=rows, base=base), base=base)
    merged = stage("merge", base=base, adapter=adapter)
    stage("verify", base=base, adapter=adapter, merged=merged, rows=rows)
    stage("evaluate", model=merged, rows=rows)
    return results


def in_new_process(folder: Path, store: Path, how: str) -> dict[str, tuple[float, str]]:
    """Run all stages in a process that has started none yet."""
    code = (
        "import json, sys; from pathlib import Path; from benchmarks.worker_start import run_stages;"
        "print(json.dumps(run_stages(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(store), how], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    return {name: (seconds, digest) for name, (seconds, digest) in json.loads(done.stdout.splitlines()[-1]).items()}


def main(rounds: int) -> None:
    """Print the seconds of each stage, and the ratio of the sums."""
    from tests.conftest import build_phi3, chat

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        for file, numbers in (("train.jsonl", range(200)), ("heldout.jsonl", range(5000, 5016))):
            (folder / "data" / file).write_text("".join(json.dumps(chat(i)) + "\n" for i in numbers))
        build_phi3(folder / "base")
        results: dict[str, list[dict[str, tuple[float, str]]]] = {"spawn": [], "fork": []}
        for number in range(rounds):
            for how, found in results.items():
                found.append(in_new_process(folder, folder / f"{how}-{number}", how))
        every = [trial for found in results.values() for trial in found]
        digests = {json.dumps({stage: digest for stage, (_, digest) in trial.items()}) for trial in every}
        print(f"{'stage':16} {'spawn s':>8} {'fork s':>8}")
        for stage in results["spawn"][0]:
            medians = [statistics.median(trial[stage][0] for trial in found) for found in results.values()]
            print(f"{stage:16} {medians[0]:8.2f} {medians[1]:8.2f}")
        sums = [[sum(seconds for seconds, _ in trial.values()) for trial in found] for found in results.values()]
        ratios = [spawn / fork for spawn, fork in zip(*sums, strict=True)]
        print(f"{'all':16} {statistics.median(sums[0]):8.2f} {statistics.median(sums[1]):8.2f}")
        print(
            f"spawn / fork: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}, {rounds} rounds)"
        )
        print("digests:", "equal" if len(digests) == 1 else "DIFFERENT")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
