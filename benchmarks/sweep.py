"""Eight trials of a sweep: trained one after another, and together in one pass.

    python benchmarks/sweep.py [--steps 200] [--trials 8] [--tokens 1024] [--dropout 0.05] [--compile auto]

On a GPU, the base has SmolLM2-135M's shape and random weights in bfloat16; without a GPU, a tiny one in float32. All
trainings run in this process with loraflow's stages train and train_group, after one that is not counted. A training's
seconds include loading the base, recording and compiling. `sweep together` is what a sweep with
runtime.trials_together needs: the group, and the chosen trial alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from compile_gain import SMOLLM2, Shape, build_base, build_tokens
from measure import print_row

TINY = Shape("tiny", 64, 160, 2, 4, 2)
LENGTH, WARM_UP = 128, 5  # tokens of a document; steps that are not in the median


@dataclass(frozen=True)
class Timing:
    """The time of a training."""

    seconds: float
    step: float  # median seconds of a step
    losses: list[float]  # the last one of each adapter
    engine: dict[str, object]


def settings(options: argparse.Namespace, device: str) -> dict[str, object]:
    """Return the recipe's settings that all trials share."""
    is_gpu = device == "cuda"
    return {
        "base.dtype": "bfloat16" if is_gpu else "float32", "training_config.bf16": is_gpu,
        "training_config.packing": False, "training_config.max_length": LENGTH,
        "training_config.per_device_train_batch_size": options.tokens // LENGTH,
        "training_config.gradient_accumulation_steps": 1, "training_config.max_steps": options.steps,
        "training_config.logging_steps": options.steps, "training_config.save_strategy": "no",
        "training_config.log_level": "error",
        "peft_config.lora_dropout": options.dropout, "runtime.compile": options.compile, "runtime.device": device,
    }  # fmt: skip


def trials(count: int) -> list[dict[str, object]]:
    """Return the settings of each trial."""
    return [
        {"peft_config.r": (8, 16)[number % 2], "training_config.learning_rate": 1e-4 * (1 + number // 2)}
        for number in range(count)
    ]


def train(work: Path, base: Path, shared: dict[str, object], chosen: list[dict[str, object]]) -> Timing:
    """Train one trial by the stage train, or several by train_group."""
    from loraflow.config import parse_recipe
    from loraflow.config.stage_configs import TrainConfig
    from loraflow.execution.worker import stage_function
    from loraflow.job import Inputs, Progress
    from loraflow.stages import STAGES
    from loraflow.store import Ref
    from tests.job_factory import Outside, make_job

    recipes = [parse_recipe("name: bench\nbase: {model: x}\n", overrides={**shared, **settings}) for settings in chosen]
    ref = Ref(stage="s", fingerprint="f", digest="d", uri="")
    home = work / "home"
    shutil.rmtree(home, ignore_errors=True)
    out = home / "out"
    out.mkdir(parents=True)
    outside = Outside(grouped=tuple(TrainConfig.from_recipe(recipe, Outside()) for recipe in recipes))
    stage = "train" if len(chosen) == 1 else "train_group"
    job = make_job(stage, recipes[0], {"tokens": ref, "base": ref}, outside)
    started = time.time()
    inputs = Inputs({"tokens": work / "tokens", "base": base})
    stage_function(STAGES[stage])(job, inputs, out, Progress(home / "progress.jsonl", work=home))
    seconds = time.time() - started
    rows = [json.loads(line) for line in (home / "progress.jsonl").read_text().splitlines()]
    times = [row["time"] for row in rows if row.get("step", 0) >= WARM_UP]
    files = [out / "telemetry" / "curves.jsonl"] if stage == "train" else sorted(out.glob("curves-*.jsonl"))
    logged = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    return Timing(
        seconds,
        statistics.median(after - before for before, after in pairwise(times)),
        [[row["loss"] for row in rows if "loss" in row][-1] for rows in logged],
        json.loads((out / "telemetry" / "engine.json").read_text()),
    )


def main() -> None:
    """Print the table."""
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024, help="of an optimizer step of one trial")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {vars(options)}", flush=True)
    work = Path(tempfile.mkdtemp())
    base, shape = work / "base", SMOLLM2 if device == "cuda" else TINY
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    build_base(base, shape, device, dtype)
    build_tokens(work / "tokens", LENGTH, options.steps * options.tokens // LENGTH)
    shared, grid = settings(options, device), trials(options.trials)
    few = min(options.steps, WARM_UP + 5)
    short = {**shared, "training_config.max_steps": few, "training_config.logging_steps": few}
    train(work, base, short, grid[:1])  # warms the libraries up
    alone = [train(work, base, shared, [settings]) for settings in grid]
    together = train(work, base, shared, grid)
    of_one = statistics.median(found.seconds for found in alone)
    apart = sum(found.seconds for found in alone)
    step = statistics.median(found.step for found in alone)
    print({key: value for key, value in alone[0].engine.items() if "graph" in key or "compiled" in key})
    print(together.engine)
    print_row("way", "seconds", "times one", "step ms", "times one's step")
    print_row("one trial", of_one, 1.0, step * 1e3, 1.0)
    print_row(f"{len(grid)} apart", apart, apart / of_one, "", "")
    print_row(
        f"{len(grid)} together", together.seconds, together.seconds / of_one, together.step * 1e3, together.step / step
    )
    print_row("sweep together", together.seconds + of_one, (together.seconds + of_one) / of_one, "", "")
    print_row("apart / sweep together", apart / (together.seconds + of_one), "", "", "")
    gaps = [abs(mine - other.losses[0]) for mine, other in zip(together.losses, alone, strict=True)]
    print_row("largest difference of a trial's mean loss, together and alone", f"{max(gaps):.1e}")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
