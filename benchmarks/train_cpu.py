"""Time the CPU training step of the quickstart's recipe (SmolLM2 as Phi-3) with the fast engine, the stock one, and trl.

python benchmarks/train_cpu.py [STEPS [PRECISION …]]        PRECISION: fp32, or bf16 (autocast)

Fast and stock run the train stage from its job; trl is SFTTrainer as in its documentation, with the same rows in the same
order. The three processes run one step each in turn, so that other load on the machine affects all of them. A ratio is
the median of the steps' ratios. The first two steps are not counted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import print_row
from pydantic import JsonValue

from loraflow.config import Recipe, load_recipe
from loraflow.job import Inputs, Progress
from loraflow.store import Ref

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.job_factory import Outside, make_job

ENGINES = ("fast", "stock", "trl")
WARM_UP = 2
PRECISIONS = {
    "fp32": {"base.dtype": "float32", "training_config.bf16": False},
    "bf16": {"base.dtype": "bfloat16", "training_config.bf16": True},
}
REF = Ref(stage="s", fingerprint="f", digest="d", uri="", facets={"train": "d", "tokenizer": "d", "heldout": "d"})


class StepBarrier(Progress):
    """A stage's progress reports. Each waits until the parent process releases the next step."""

    def __init__(self, work: Path):
        super().__init__(work / "progress.jsonl", work)
        self.seconds: list[float] = []
        self.started = 0.0

    def wait(self, loss: float | None) -> None:
        """Report a finished step and the loss before it to the parent process; wait to be released."""
        if self.started:
            self.seconds.append(time.perf_counter() - self.started)
        print(f"step {time.perf_counter() - self.started if self.started else 0:.2f} s, loss before {loss}", flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()

    def __call__(self, **figures: JsonValue) -> None:
        super().__call__(**figures)
        if "step" in figures:
            self.wait(figures.get("loss"))


def recipe_of(precision: str, engine: str, steps: int) -> Recipe:
    overrides = {"training_config.max_steps": steps, "training_config.logging_steps": 1, "runtime.device": "cpu"}
    overrides |= {"training_config.save_strategy": "no", "runtime.engine": "stock" if engine == "stock" else "fast"}
    return load_recipe("configs/quickstart.yaml", {**overrides, **PRECISIONS[precision]})


def prepare(folder: Path, precision: str) -> None:
    """Write the base and the tokens with the stages resolve_base and tokenize."""
    from loraflow.base import resolve
    from loraflow.data.tokens import tokenization as tokens
    from loraflow.store.files import HashMemo

    recipe = recipe_of(precision, "fast", 1)
    for name in ("rows", "base", "tokens"):
        (folder / name).mkdir()
    lines = Path("data/train.jsonl").read_text().splitlines()
    rows = [{"id": str(i), "set": "train", "place": str(i), **json.loads(line)} for i, line in enumerate(lines)]
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows" / "validation.jsonl").write_text("")
    surroundings = Outside(base=resolve.locate(recipe.base, HashMemo(folder / "hashes.json")))
    resolve.run(make_job("resolve_base", recipe, {}, surroundings), Inputs({}), folder / "base", Progress())
    job = make_job("tokenize", recipe, {"rows": REF, "base": REF})
    tokens.run(job, Inputs({"rows": folder / "rows", "base": folder / "base"}), folder / "tokens", Progress())


def run_stage(folder: Path, precision: str, engine: str, steps: int, barrier: StepBarrier) -> list[float]:
    """Train with the train stage. Return the loss of each step."""
    from loraflow.training import train

    job = make_job("train", recipe_of(precision, engine, steps), {"tokens": REF, "base": REF})
    out = barrier.work / "out"
    out.mkdir()
    train.run(job, Inputs({"tokens": folder / "tokens", "base": folder / "base"}), out, barrier)
    curve = [json.loads(line) for line in (out / "telemetry" / "curves.jsonl").read_text().splitlines()]
    return [row["loss"] for row in curve if "loss" in row]


def run_trl(folder: Path, precision: str, steps: int, barrier: StepBarrier) -> list[float]:
    """Train with SFTTrainer on the same rows in the same order. Return the loss of each step."""
    import torch
    from datasets import load_from_disk
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from trl import SFTConfig, SFTTrainer

    from loraflow.training.setup import row_order

    recipe = recipe_of(precision, "trl", steps)
    training, adapter = recipe.training_config, recipe.peft_config
    data = load_from_disk(str(folder / "tokens" / "train")).select_columns(["input_ids", "labels"])

    class WaitAfterStep(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            barrier.wait(next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None))

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, recipe.base.dtype))
    model.config.use_cache = False
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(barrier.work / "trl"), max_steps=steps, learning_rate=training.learning_rate,
            lr_scheduler_type=training.lr_scheduler_type, warmup_steps=-(-steps // 10), bf16=training.bf16, use_cpu=True,
            per_device_train_batch_size=training.per_device_train_batch_size, gradient_checkpointing=False,
            train_sampling_strategy="sequential", dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, seed=training.seed,
        ),
        train_dataset=data.select(row_order(len(data), steps * training.global_batch, training.seed).tolist()),
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=LoraConfig(
            r=adapter.r, lora_alpha=adapter.lora_alpha, lora_dropout=adapter.lora_dropout, task_type="CAUSAL_LM",
            target_modules=list(adapter.target_modules),
        ),
        callbacks=[WaitAfterStep()],
    )  # fmt: skip
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def worker_main(folder: Path, precision: str, engine: str, steps: int) -> None:
    """Train with one engine in this process. After each step, print a line `step` and wait; print the figures last."""
    with tempfile.TemporaryDirectory() as name:
        barrier = StepBarrier(Path(name))
        if engine == "trl":
            losses = run_trl(folder, precision, steps, barrier)
        else:
            losses = run_stage(folder, precision, engine, steps, barrier)
    print(json.dumps({"seconds": barrier.seconds, "losses": losses}), flush=True)


def measure(folder: Path, precision: str, steps: int) -> None:
    """Run a step of each engine in turn, and print their table."""
    command = [sys.executable, __file__, str(steps), precision, "--engine", str(folder)]
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for engine in ENGINES:  # one by one: the first step runs directly after the start
            processes[engine] = subprocess.Popen([*command, engine], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           text=True, stderr=subprocess.DEVNULL)  # fmt: skip
            read_line(engine, processes[engine], "step")
        for step in range(2, steps + 1):
            for engine, process in processes.items():
                release_step(process)
                print(
                    f"{precision}, step {step}, {engine}: {read_line(engine, process, 'step')[5:]}", end="", flush=True
                )
        results: dict[str, Any] = {}
        for engine, process in processes.items():
            release_step(process)
            results[engine] = json.loads(read_line(engine, process, '{"seconds"'))
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    print_row(f"{precision}: engine", "s/step, median", "first loss", "last loss", "largest loss difference to trl")
    for engine, result in results.items():
        difference = max(abs(a - b) for a, b in zip(result["losses"], results["trl"]["losses"], strict=True))
        seconds, losses = statistics.median(result["seconds"][WARM_UP:]), result["losses"]
        print_row(engine, seconds, f"{losses[0]:.5f}", f"{losses[-1]:.5f}", f"{difference:.6f}")
    for other in ("stock", "trl"):
        pairs = zip(results["fast"]["seconds"][WARM_UP:], results[other]["seconds"][WARM_UP:], strict=True)
        ratios = sorted(b / a for a, b in pairs)
        print_row(f"{precision}: fast is faster than {other}", f"{statistics.median(ratios):.2f} ×",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} pairs of steps")  # fmt: skip


def release_step(process: subprocess.Popen[str]) -> None:
    process.stdin.write("step\n")
    process.stdin.flush()


def read_line(engine: str, process: subprocess.Popen[str], begins: str) -> str:
    for line in process.stdout:
        if line.startswith(begins):
            return line
    sys.exit(f"{engine} ended with {process.wait()}")


if __name__ == "__main__":
    if "--engine" in sys.argv:
        at = sys.argv.index("--engine")
        worker_main(Path(sys.argv[at + 1]), sys.argv[2], sys.argv[at + 2], int(sys.argv[1]))
    else:
        steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
        for precision in sys.argv[2:] or PRECISIONS:
            with tempfile.TemporaryDirectory() as name:
                prepare(Path(name), precision)
                measure(Path(name), precision, steps)
