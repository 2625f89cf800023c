"""What we hang onto the trainer: curves of our own, progress, sealed checkpoints, a stop on bad numbers or a signal."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loraflow.failures import NonFiniteLoss, Preempted
from loraflow.hardware.group import Group
from loraflow.job import Progress
from loraflow.store.checkpoints import seal, seal_of


class Curves(TrainerCallback):
    """Every logged value with its step. The trainer forgets its own on resume: the file goes on from the checkpoint's."""

    def __init__(self, path: Path):
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Append a line."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, **(logs or {})}) + "\n")


class Reporter(TrainerCallback):
    """Steps, speed and the time that is left, for whoever watches."""

    def __init__(self, report: Progress, total: int, tokens_per_step: float):
        self.report, self.total, self.tokens = report, total, tokens_per_step
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.started, self.first = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Remember the loss."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report a step."""
        per_step = (time.monotonic() - self.started) / max(1, state.global_step - self.first)
        self.report(
            step=state.global_step,
            total=self.total,
            loss=self.loss,
            tokens_per_second=round(self.tokens / per_step, 1),
            eta_seconds=round((self.total - state.global_step) * per_step, 1),
        )


class Guard(TrainerCallback):
    """End on a loss or gradient that is no number, before it reaches a checkpoint."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Look at what was logged."""
        for key in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{key} became {value}.",
                    where=f"step {state.global_step}",
                    next_step="lower training_config.learning_rate, or train in bf16 instead of fp16",
                )


class Sealer(TrainerCallback):
    """Make each checkpoint trustworthy once it is written, by all devices, with the files that a resume needs besides."""

    def __init__(self, group: Group, carried: list[Path], resumed_from: Path | None):
        self.group, self.carried = group, carried
        self.best = None if resumed_from is None else (seal_of(resumed_from) or {}).get("needs")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say where the best checkpoint is: the state that was saved names a folder, of another machine perhaps.

        transformers drops a folder that is not there, and a training that saves no more would end with its last weights.
        """
        state.best_model_checkpoint = self.best and str(Path(args.output_dir, self.best))

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Check the adapter for bad numbers, add what is carried, then write the list of hashes."""
        refuse_bad_numbers(model, state.global_step)
        self.group.wait()
        if self.group.first:
            checkpoint, best = Path(args.output_dir, f"checkpoint-{state.global_step}"), state.best_model_checkpoint
            for file in self.carried:
                if file.exists():
                    shutil.copyfile(file, checkpoint / file.name)
            seal(checkpoint, Path(best).name if best else None)
        self.group.wait()


class Stopper(TrainerCallback):
    """On SIGTERM: finish the step, save, stop. The stage then says that it was preempted, and a retry goes on."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, signum: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop, if asked."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def raise_if_asked(self, step: int) -> None:
        """Say that training did not come to its end.

        Raises:
            Preempted: a signal came.
        """
        if self.asked:
            raise Preempted("Training was asked to end.", where=f"step {step}", next_step="run again: it resumes")


def refuse_bad_numbers(model: Any, step: int) -> None:
    """Look through the trained tensors.

    Raises:
        NonFiniteLoss: one holds NaN or an infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
            raise NonFiniteLoss(
                f"{name} holds a NaN or an infinity.", where=f"step {step}", next_step="lower the learning rate"
            )
