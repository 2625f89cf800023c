"""Callbacks of the trainer: log curves, report progress, finalize checkpoints, and stop on NaN or on SIGTERM."""

import json
import logging
import math
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraflow.failures import NonFiniteLoss, Preempted
from loraflow.hardware.device import Device
from loraflow.hardware.process_group import ProcessGroup
from loraflow.job import Progress
from loraflow.store.checkpoints import finalize_checkpoint, read_checkpoint_manifest

log = logging.getLogger(__name__)
Logs = dict[str, float]
VALIDATION_SECONDS = 10.0  # between two lines of progress of a validation


class CurveWriter(TrainerCallback):
    """Write every logged value with its step.

    The trainer loses its own log on resume. This file continues from the copy in the checkpoint, whose hash was checked.
    The values that count are those in memory: the file is written from them again for each checkpoint and at the end, so
    that a file that is edited or damaged during a training changes nothing.
    """

    def __init__(self, path: Path):
        self.path, self.lines = path, path.read_text().splitlines() if path.exists() else []

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs | None = None, **_: Any) -> None:
        """Append a line."""
        self.lines.append(json.dumps({"step": state.global_step, **(logs or {})}))
        with self.path.open("a") as file:
            file.write(self.lines[-1] + "\n")

    def on_save(self, *_: Any, **__: Any) -> None:
        """Write the file for the checkpoint, which gets a copy of it."""
        self.write()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Write the file for the artifact."""
        self.write()

    def write(self) -> None:
        """Write all lines."""
        self.path.write_text("".join(f"{line}\n" for line in self.lines))


class ProgressReporter(TrainerCallback):
    """Report steps, speed and the remaining time."""

    def __init__(self, report: Progress, total: int, tokens_per_step: float):
        self.report, self.total, self.tokens_per_step = report, total, tokens_per_step
        self.loss: float | None = None
        self.reported = 0.0  # when a validation was reported last

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: Any) -> None:
        """Start the clock."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs | None = None, **_: Any) -> None:
        """Remember the loss."""
        self.loss = (logs or {}).get("loss", self.loss)

    def on_prediction_step(self, args: object, state: TrainerState, control: object, **_: Any) -> None:
        """Report every few seconds that a validation continues: the launcher warns of a worker without progress."""
        if time.monotonic() - self.reported > VALIDATION_SECONDS:
            self.reported = time.monotonic()
            self.report(validating_after_step=state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: Any) -> None:
        """Report a step."""
        per_step = (time.monotonic() - self.started) / max(1, state.global_step - self.first_step)
        self.report(
            step=state.global_step,
            total=self.total,
            loss=self.loss,
            tokens_per_second=round(self.tokens_per_step / per_step, 1),
            eta_seconds=round((self.total - state.global_step) * per_step, 1),
        )


class NonFiniteGuard(TrainerCallback):
    """Stop on a loss or gradient that is NaN or infinite, before it reaches a checkpoint."""

    def on_log(self, args: object, state: TrainerState, control: object, logs: Logs | None = None, **_: Any) -> None:
        """Check the logged values."""
        for key in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(key)
            if value is not None and not math.isfinite(value):
                raise NonFiniteLoss(
                    f"{key} became {value}.",
                    where=f"step {state.global_step}",
                    next_step="lower training_config.learning_rate, or train in bf16 instead of fp16",
                )


class CheckpointFinalizer(TrainerCallback):
    """Finalize each checkpoint once all processes have written it, with the other files that a resume needs.

    Args:
        carried: files that are copied into each checkpoint.
        resumed_from: the checkpoint that this training starts from.
    """

    def __init__(self, group: ProcessGroup, carried: list[Path], resumed_from: Path | None):
        self.group, self.carried = group, carried
        manifest = None if resumed_from is None else read_checkpoint_manifest(resumed_from)
        self.best: str | None = None if manifest is None else manifest["needs"]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: Any) -> None:
        """Set the best checkpoint's path. The saved state has an absolute path, perhaps of another machine.

        transformers ignores a folder that does not exist. If no better checkpoint followed, training would end with its
        last weights instead of the best.
        """
        state.best_model_checkpoint = self.best and str(Path(str(args.output_dir), self.best))

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: object,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Check the adapter for NaN, copy the carried files, then finalize the checkpoint with the hashes of its files."""
        assert model is not None
        refuse_non_finite(model, state.global_step)
        self.group.barrier()
        if self.group.is_main:
            checkpoint = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            best = state.best_model_checkpoint
            for file in self.carried:
                if file.exists():
                    shutil.copyfile(file, checkpoint / file.name)
            finalize_checkpoint(checkpoint, Path(best).name if best else None)
        self.group.barrier()


class PreemptionHandler(TrainerCallback):
    """On SIGTERM, finish the step, save a checkpoint and stop. The stage then fails as preempted, and a retry resumes.

    Several processes must stop at the same step. At the end of each step, each one starts to ask whether any was asked to
    stop, and reads the answer one step later, so they stop up to two steps after the signal. GPUs do not wait for the
    answer; on CPUs, each question waits for all processes.
    """

    def __init__(self, group: ProcessGroup, device: Device) -> None:
        self.group, self.device = group, device
        self.is_requested = False  # of this process
        self.has_stopped = False  # whether this handler ended the training; the same in all processes
        self._answer: Callable[[], bool] | None = None  # whether any process was asked to stop, one step ago
        signal.signal(signal.SIGTERM, self._request)

    def _request(self, signum: int, frame: FrameType | None) -> None:
        self.is_requested = True

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: Any) -> None:
        """Stop before the first step, if that was requested while the model was loaded: there is nothing to save yet."""
        self.raise_if_requested(state.global_step)

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: Any) -> None:
        """Save and stop, if requested."""
        is_due = self.is_requested
        if self.group.size > 1:
            earlier, self._answer = self._answer, self.group.any_later(self.is_requested, self.device)
            is_due = earlier is not None and earlier()
        if is_due:
            self.has_stopped = True
            control.should_save = control.should_training_stop = True

    def raise_if_requested(self, step: int) -> None:
        """Fail if any process was asked to stop. All processes must call this at the same point.

        Raises:
            Preempted: a signal came.
        """
        if any(self.group.all_gather(self.is_requested)):
            raise Preempted("Training was asked to stop.", where=f"step {step}", next_step="run again: it resumes")


class StoppedEarly(Exception):
    """The training had stopped early before it was interrupted: only its best checkpoint is left to load."""


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, which does not resume after the checkpoint at which a training stopped early.

    transformers would train one more step, and continue if its loss is better: to another model than an uninterrupted run.
    """

    @property
    def is_over(self) -> bool:
        """Whether the counter has reached the patience."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Raise StoppedEarly if the checkpoint's counter has reached the patience."""
        if self.is_over:
            raise StoppedEarly


def early_stopping(patience: int, checkpoint: Path | None) -> EarlyStopping:
    """Return the callback, with the counter of the checkpoint, which the trainer does not restore."""
    callback = EarlyStopping(patience)
    if checkpoint is not None:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        by_class = state.get("stateful_callbacks", {})
        # Checkpoints of earlier versions have the name of transformers' class.
        saved = by_class.get(EarlyStopping.__name__) or by_class.get(EarlyStoppingCallback.__name__) or {}
        saved = saved[0] if isinstance(saved, list) else saved
        callback.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return callback


def refuse_non_finite(model: torch.nn.Module, step: int) -> None:
    """Check the trained tensors.

    Raises:
        NonFiniteLoss: a tensor holds a NaN or an infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
            raise NonFiniteLoss(
                f"{name} holds a NaN or an infinity.", where=f"step {step}", next_step="lower the learning rate"
            )


def warn_of_untrained(model: torch.nn.Module) -> None:
    """Log a warning if modules of a model's adapter still have B = 0, as before the training; see `log_untrained`."""
    log_untrained(
        {
            name.partition(".lora_B")[0]: bool(parameter.detach().any())
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and ".lora_B" in name
        }
    )


def log_untrained(trained: Mapping[str, bool], whose: str = "") -> None:
    """Log a warning if modules of an adapter were not trained: a step changed other modules, or none at all.

    Some models read a layer's weight instead of calling the layer (Mamba's dt_proj), or use a layer with images only; and
    a router may choose an expert for no token.

    Args:
        trained: names of the adapted modules, in peft's model, and whether B of their adapter is other than 0.
    """
    untrained = [name.removeprefix("base_model.model.") for name, is_trained in trained.items() if not is_trained]
    if not untrained:
        return
    if len(untrained) == len(trained):
        log.warning(
            "%sNo step changed the adapter, so the model answers as the base does. Either the learning rate was 0 in every "
            "step, as in the first step of a warm-up, or no gradient reached the adapted modules.",
            whose,
        )
        return
    log.warning(
        "%s%d of %d adapted modules were not trained, such as %s. No gradient reached them: the model does not call them "
        "or, in a mixture, no token was routed to them. Their adapters change nothing. To leave them out, name them in "
        "peft_config.exclude_modules.",
        whose,
        len(untrained),
        len(trained),
        untrained[0],
    )
