"""The settings of a training as trl's SFTConfig, how many optimizer steps it takes, and which row is used when.

The order is one permutation of all rows for each epoch, drawn from seed and epoch alone. Every optimizer step takes the
next `global_batch` rows of it. So a resumed run, another micro-batch or another number of devices sees the same rows in
the same steps.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from loraflow.config.training import TrainerSettings
from loraflow.failures import BadConfig, MissingExtra
from loraflow.hardware.device import Device

if TYPE_CHECKING:
    from trl import SFTConfig


class StepCount(NamedTuple):
    """Optimizer steps of a training, and of an epoch."""

    total: int
    per_epoch: int


def count_steps(rows: int, global_batch: int, epochs: float, max_steps: int) -> StepCount:
    """Return the number of optimizer steps. A positive `max_steps` takes precedence over `epochs`."""
    per_epoch = max(1, math.ceil(rows / global_batch))
    return StepCount(max_steps if max_steps > 0 else max(1, math.ceil(epochs * rows / global_batch)), per_epoch)


def row_order(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return the first `count` rows of the run, epoch after epoch, each a permutation from (seed, epoch)."""
    epochs = math.ceil(count / rows)
    return np.concatenate([np.random.default_rng([seed, epoch]).permutation(rows) for epoch in range(epochs)])[:count]


def micro_batch_rows(global_batch: int, most: int) -> int:
    """Return the largest number of rows up to `most` that divides the global batch."""
    return max(n for n in range(1, min(most, global_batch) + 1) if global_batch % n == 0)


_TRACKERS = {  # name in `report_to` → package
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "dvclive": "dvclive",
    "trackio": "trackio",
}
# Fields of TrainerSettings that are translated before they are passed on.
_TRANSLATED = {
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "early_stopping_patience",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_strategy",
    "logging_steps",
}


@dataclass(frozen=True)
class BatchSettings:
    """The batch size and checkpointing that an engine chooses for the trainer."""

    rows: int  # rows of a micro-batch; for the fast engine, items of its dataset
    accumulation: int  # micro-batches of an optimizer step
    gradient_checkpointing: bool
    activation_offloading: bool = False
    gradient_checkpointing_kwargs: dict[str, JsonValue] | None = None


def trainer_arguments(
    settings: TrainerSettings,
    steps: StepCount,
    batch_settings: BatchSettings,
    device: Device,
    engine: Literal["fast", "stock"],
    work: Path,
    checkpoints: Path,
) -> SFTConfig:
    """Return trl's SFTConfig. The trainer reads all steps as a single epoch, so epochs are translated into steps.

    Args:
        settings: all settings of the trainer.
        steps: number of optimizer steps.
        batch_settings: decided by the engine.
        device: where the trainer computes.
        engine: the value of runtime.engine.
        work: folder for the trackers' files.
        checkpoints: folder for checkpoints.

    Raises:
        BadConfig: fp16 on a CPU, or a schedule that has no step left after its warm-up and needs one.
        MissingExtra: the optimizer needs bitsandbytes.
    """
    import torch
    from trl import SFTConfig

    _check_device(settings, device)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / "tracker")
    values = settings.model_dump(exclude=_TRANSLATED)
    if values["optim"] == "adamw_torch" and device == "cuda" and engine == "fast":
        values["optim"] = "adamw_torch_fused"  # the same sums in one kernel
    warmup = int(settings.warmup_steps)
    if settings.warmup_steps < 1:
        warmup = math.ceil(settings.warmup_steps * steps.total)
    if settings.lr_scheduler_type == "polynomial" and warmup >= steps.total:
        raise BadConfig(
            "The warm-up takes all steps, and the schedule polynomial needs one after it.",
            where="training_config.warmup_steps",
            expected=f"less than the {steps.total} steps of the training",
            got=f"{settings.warmup_steps:g}: {warmup} steps",
            next_step="lower warmup_steps, or choose another lr_scheduler_type",
        )
    checkpointing = batch_settings.gradient_checkpointing_kwargs
    return SFTConfig(
        **values,
        **_cadence("logging", settings.logging_strategy, settings.logging_steps, steps),
        **_cadence("save", settings.save_strategy, settings.save_steps, steps),
        **_cadence("eval", settings.eval_strategy, settings.eval_steps, steps),
        **({} if checkpointing is None else {"gradient_checkpointing_kwargs": checkpointing}),
        per_device_train_batch_size=batch_settings.rows,
        gradient_accumulation_steps=batch_settings.accumulation,
        gradient_checkpointing=batch_settings.gradient_checkpointing,
        activation_offloading=batch_settings.activation_offloading,
        output_dir=str(checkpoints),
        max_steps=steps.total,
        warmup_steps=warmup,
        logging_nan_inf_filter=False,  # a NaN must be reported, not averaged away
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda" and torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        disable_tqdm=True,
        push_to_hub=False,
        # The trainer removes an old checkpoint before the new one is finalized, so at least two must be kept.
        save_total_limit=max(2, settings.save_total_limit) if settings.save_total_limit else None,
    )


def _check_device(settings: TrainerSettings, device: Device) -> None:
    if settings.fp16 and device == "cpu":
        raise BadConfig(
            "Training in fp16 needs a GPU.", where="training_config.fp16", next_step="set bf16: true, fp16: false"
        )
    if settings.optim.startswith("paged_") and (device == "cpu" or find_spec("bitsandbytes") is None):
        raise MissingExtra(
            f"{settings.optim} needs a CUDA device and the package bitsandbytes.",
            where="training_config.optim",
            next_step="set training_config.optim to adamw_torch",
        )


def _cadence(event: str, strategy: str, every: int | None, steps: StepCount) -> dict[str, str | int]:
    """Return `<event>_strategy` and `<event>_steps`, with an epoch translated into steps."""
    if strategy == "epoch":
        strategy, every = "steps", min(steps.per_epoch, steps.total)
    values: dict[str, str | int] = {f"{event}_strategy": strategy}
    return values if every is None else {**values, f"{event}_steps": every}


def check_trackers(report_to: str | list[str]) -> None:
    """Check that the packages of the experiment trackers are installed.

    Raises:
        MissingExtra: a package is missing.
    """
    for name in [report_to] if isinstance(report_to, str) else report_to:
        package = _TRACKERS.get(name, name)
        if name not in ("none", "all") and find_spec(package) is None:
            raise MissingExtra(
                f"The tracker {name} is not installed.",
                where="training_config.report_to",
                expected=f"none, or an installed one of {', '.join(_TRACKERS)}",
                next_step=f"pip install {package}",
            )
