"""The CPU training step of the quickstart's recipe, SmolLM2 as Phi-3: `runtime.engine` fast, stock, and plain trl.

python benchmarks/train_cpu.py [STEPS [PRECISION …]]        PRECISION: fp32, or bf16 (autocast)

Fast and stock are the stage itself, from its job; plain trl is SFTTrainer as its documentation has it, given the same
rows in the same order. Three processes take turns, a step each, so that a noisy neighbour hits all of them: a ratio is
the median over the steps' own ratios. The first two steps are not counted.
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

from measure import row
from pydantic import JsonValue

from loraflow.config import Recipe, load_recipe
from loraflow.job import Inputs, Progress
from loraflow.store import Ref

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.job_factory import Outside, make_job

SIDES = ("fast", "stock", "trl")
WARM_UP = 2
PRECISIONS = {
    "fp32": {"base.dtype": "float32", "training_config.bf16": False},
    "bf16": {"base.dtype": "bfloat16", "training_config.bf16": True},
}
REF = Ref(stage="s", fingerprint="f", digest="d", uri="", facets={"train": "d", "tokenizer": "d"})


class Turns(Progress):
    """A stage's progress reports, each of which waits for this side's next turn."""

    def __init__(self, work: Path):
        super().__init__(work / "progress.jsonl", work)
        self.seconds: list[float] = []
        self.started = 0.0

    def wait(self, loss: float | None) -> None:
        """Tell the parent that a step is done, and the loss of the one before; wait for the next turn."""
        if self.started:
            self.seconds.append(time.perf_counter() - self.started)
        print(f"step {time.perf_counter() - self.started if self.started else 0:.2f} s, loss before {loss}", flush=True)
        sys.stdin.readline()
        self.started = time.perf_counter()

    def __call__(self, **figures: JsonValue) -> None:
        super().__call__(**figures)
        if "step" in figures:
            self.wait(figures.get("loss"))


def recipe_of(precision: str, side: str, steps: int) -> Recipe:
    overrides = {"training_config.max_steps": steps, "training_config.logging_steps": 1, "runtime.device": "cpu"}
    overrides |= {"training_config.save_strategy": "no", "runtime.engine": "stock" if side == "stock" else "fast"}
    return load_recipe("configs/quickstart.yaml", {**overrides, **PRECISIONS[precision]})


def prepare(folder: Path, precision: str) -> None:
    """Write the base and the tokens, by the stages that a run has for it."""
    from loraflow.base import resolve
    from loraflow.data import tokenization as tokens
    from loraflow.store.files import HashMemo

    recipe = recipe_of(precision, "fast", 1)
    for name in ("rows", "base", "tokens"):
        (folder / name).mkdir()
    lines = Path("data/train.jsonl").read_text().splitlines()
    rows = [{"id": str(i), "set": "train", "place": str(i), **json.loads(line)} for i, line in enumerate(lines)]
    (folder / "rows" / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    (folder / "rows" / "validation.jsonl").write_text("")
    outside = Outside(base=resolve.locate(recipe.base, HashMemo(folder / "hashes.json")))
    resolve.run(make_job("resolve_base", recipe, {}, outside), Inputs({}), folder / "base", Progress())
    job = make_job("tokenize", recipe, {"rows": REF, "base": REF})
    tokens.run(job, Inputs({"rows": folder / "rows", "base": folder / "base"}), folder / "tokens", Progress())


def stage(folder: Path, precision: str, side: str, steps: int, turns: Turns) -> list[float]:
    """Train by the stage's function. Return the losses of the steps."""
    from loraflow.training import train

    job = make_job("train", recipe_of(precision, side, steps), {"tokens": REF, "base": REF})
    out = turns.work / "out"
    out.mkdir()
    train.run(job, Inputs({"tokens": folder / "tokens", "base": folder / "base"}), out, turns)
    curve = [json.loads(line) for line in (out / "telemetry" / "curves.jsonl").read_text().splitlines()]
    return [one["loss"] for one in curve if "loss" in one]


def plain(folder: Path, precision: str, steps: int, turns: Turns) -> list[float]:
    """Train by SFTTrainer, with nothing of ours but the rows and their order. Return the losses of the steps."""
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

    from loraflow.training.schedule import row_order

    recipe = recipe_of(precision, "trl", steps)
    training, adapter = recipe.training_config, recipe.peft_config
    data = load_from_disk(str(folder / "tokens" / "train")).select_columns(["input_ids", "labels"])

    class Turn(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
            turns.wait(next((one["loss"] for one in reversed(state.log_history) if "loss" in one), None))

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, recipe.base.dtype))
    model.config.use_cache = False
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(turns.work / "trl"), max_steps=steps, learning_rate=training.learning_rate,
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
        callbacks=[Turn()],
    )  # fmt: skip
    trainer.train()
    return [one["loss"] for one in trainer.state.log_history if "loss" in one]


def side_main(folder: Path, precision: str, side: str, steps: int) -> None:
    """Be one side: a line `step` after each step, then wait for a line; at the end, the figures."""
    with tempfile.TemporaryDirectory() as name:
        turns = Turns(Path(name))
        run = plain(folder, precision, steps, turns) if side == "trl" else stage(folder, precision, side, steps, turns)
    print(json.dumps({"seconds": turns.seconds, "losses": run}), flush=True)


def measure(folder: Path, precision: str, steps: int) -> None:
    """Let the sides take turns, and print their table."""
    command = [sys.executable, __file__, str(steps), precision, "--side", str(folder)]
    sides: dict[str, subprocess.Popen[str]] = {}
    try:
        for side in SIDES:  # one by one: a side's first step comes by itself, behind its start
            sides[side] = subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                           stderr=subprocess.DEVNULL)  # fmt: skip
            await_line(side, sides[side], "step")
        for step in range(2, steps + 1):
            for side, process in sides.items():
                go(process)
                print(f"{precision}, step {step}, {side}: {await_line(side, process, 'step')[5:]}", end="", flush=True)
        found = {}
        for side, process in sides.items():
            go(process)
            found[side] = json.loads(await_line(side, process, '{"seconds"'))
    finally:
        for process in sides.values():
            process.kill()
            process.wait()
    row(f"{precision}: engine", "s/step, median", "first loss", "last loss", "largest loss difference to trl")
    for side, one in found.items():
        apart = max(abs(a - b) for a, b in zip(one["losses"], found["trl"]["losses"], strict=True))
        row(side, statistics.median(one["seconds"][WARM_UP:]), f"{one['losses'][0]:.5f}", f"{one['losses'][-1]:.5f}",
            f"{apart:.6f}")  # fmt: skip
    for other in ("stock", "trl"):
        pairs = zip(found["fast"]["seconds"][WARM_UP:], found[other]["seconds"][WARM_UP:], strict=True)
        ratios = sorted(b / a for a, b in pairs)
        row(f"{precision}: fast is faster than {other}", f"{statistics.median(ratios):.2f} ×",
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {len(ratios)} pairs of steps")  # fmt: skip


def go(process: subprocess.Popen[str]) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def await_line(side: str, process: subprocess.Popen[str], begins: str) -> str:
    for line in process.stdout:
        if line.startswith(begins):
            return line
    sys.exit(f"{side} ended with {process.wait()}")


if __name__ == "__main__":
    if "--side" in sys.argv:
        at = sys.argv.index("--side")
        side_main(Path(sys.argv[at + 1]), sys.argv[2], sys.argv[at + 2], int(sys.argv[1]))
    else:
        steps = int(sys.argv[1]) if len(sys.argv) > 1 else 12
        for precision in sys.argv[2:] or PRECISIONS:
            with tempfile.TemporaryDirectory() as name:
                prepare(Path(name), precision)
                measure(Path(name), precision, steps)
