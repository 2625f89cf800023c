"""Prepare a training: settings, rows in their order, devices, tokenizer, callbacks, and the checkpoint to resume from.

The order is one permutation of all rows for each epoch, drawn from seed and epoch alone. Every optimizer step takes the
next `global_batch` rows of it. So a resumed run, another micro-batch or another number of devices sees the same rows in
the same steps.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from loraflow.adapters.variants import EVA_FILE
from loraflow.base.load import load_tokenizer
from loraflow.config.job_runtime import JobRuntime
from loraflow.config.lora import PeftConfig
from loraflow.config.stage_configs import TrainConfig
from loraflow.config.training import TrainerSettings
from loraflow.data.tokens.positions import Positions
from loraflow.data.tokens.token_files import TokenRows
from loraflow.failures import BadConfig, MissingExtra
from loraflow.hardware.device import Device, free_gpu_bytes, pick_device
from loraflow.hardware.process_group import ProcessGroup, join
from loraflow.job import Inputs, Job, Progress
from loraflow.store.checkpoints import FOLDER, prune_to_newest_intact, step_of
from loraflow.training import callbacks
from loraflow.training.adapter_rank import adapter_rank
from loraflow.training.memory import ModelShape, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback
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


_TRACKERS = ("tensorboard", "wandb", "mlflow", "dvclive", "trackio")  # each is also the name of its package
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
    """The batch size and gradient checkpointing that an engine chooses for the trainer."""

    rows: int  # rows of a micro-batch; for the fast engine, items of its dataset
    accumulation: int  # micro-batches of an optimizer step
    gradient_checkpointing: bool
    activation_offloading: bool = False
    gradient_checkpointing_kwargs: dict[str, JsonValue] | None = None


def trainer_arguments(
    setup: TrainingSetup, batch_settings: BatchSettings, engine: Literal["fast", "stock"]
) -> SFTConfig:
    """Return trl's SFTConfig. The trainer reads all steps as a single epoch, so epochs are translated into steps.

    Raises:
        BadConfig: fp16 on a CPU, or a schedule that has no step left after its warm-up and needs one.
        MissingExtra: the optimizer needs bitsandbytes.
    """
    import torch
    from trl import SFTConfig

    settings, steps, device = setup.settings, setup.steps, setup.device
    _check_device(settings, device)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(setup.work / "tracker")
    values = settings.model_dump(exclude=_TRANSLATED)
    if values["optim"] == "adamw_torch" and device == "cuda" and engine == "fast":
        values["optim"] = "adamw_torch_fused"  # the same sums in one kernel
    warmup = int(settings.warmup_steps)
    if settings.warmup_steps < 1:
        warmup = math.ceil(settings.warmup_steps * steps.total)
    if settings.lr_scheduler_type == "polynomial" and warmup >= steps.total:
        raise BadConfig(
            "The warm-up takes all steps, but the polynomial schedule needs a step after it.",
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
        output_dir=str(setup.checkpoints),
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
        if name not in ("none", "all") and find_spec(name) is None:
            raise MissingExtra(
                f"The tracker {name} is not installed.",
                where="training_config.report_to",
                expected=f"none, or an installed one of {', '.join(_TRACKERS)}",
                next_step=f"pip install {name}",
            )


@dataclass(frozen=True)
class TrainingSetup:
    """A training on this machine, before anything is loaded onto a device."""

    base: Path
    work: Path  # a folder that outlives this attempt
    config: TrainConfig
    settings: TrainerSettings
    runtime: JobRuntime
    rows: TokenRows
    validation: TokenRows | None
    steps: StepCount
    learned_share: float  # share of the training tokens that count in the loss
    order: NDArray[np.int64]  # row numbers, one after another over all steps
    device: Device
    group: ProcessGroup
    tokenizer: PreTrainedTokenizerBase
    preemption: callbacks.PreemptionHandler
    callbacks: list[TrainerCallback]
    resumed_from: Path | None  # a checkpoint
    # All adapters that are trained in one pass (train_group); empty: only this one.
    together: tuple[PeftConfig, ...] = ()
    # Tokens; set if rows are on both sides of it: each document has angles of its own.
    longrope_switch: int | None = None
    is_sharded: bool = False  # whether the frozen base is sharded over the devices; set by `build_trainer`

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.work / FOLDER

    @property
    def resumed_step(self) -> int:
        """The step of the checkpoint that training resumes from; 0 without one."""
        return (self.resumed_from and step_of(self.resumed_from.name)) or 0

    @property
    def compute_dtype(self) -> str:
        """The dtype of matrix products: autocast's if it is on, else the base's."""
        if self.settings.bf16:
            return "bfloat16"
        return "float16" if self.settings.fp16 else self.config.base.dtype

    @property
    def activation_width(self) -> int:
        """Bytes of a number of the activations."""
        return 4 if self.compute_dtype == "float32" else 2

    @property
    def weight_format(self) -> str:
        """The format of the frozen weights: a dtype, fp8 or nf4."""
        return self.config.base.quantization or self.config.base.dtype

    @property
    def uses_gradient_checkpointing(self) -> bool:
        """Whether the stock engine uses gradient checkpointing."""
        return self.runtime.engine == "stock" and self.settings.gradient_checkpointing is not False

    @property
    def rows_per_device(self) -> int:
        """Largest number of rows of an optimizer step on a device."""
        return math.ceil(self.config.training_config.global_batch / self.group.size)

    @cached_property
    def rank(self) -> float:
        """The rank for which memory is needed: see `adapter_rank`. Without a known shape, nothing is estimated."""
        adapters = self.together or (self.config.peft_config,)
        return float(self.config.peft_config.r) if self.shape is None else adapter_rank(self.shape, adapters)

    @cached_property
    def longest_row(self) -> int:
        """Tokens of the longest row: a micro-batch cannot have fewer."""
        return self.rows.row_length or int(self.rows.lengths.max())

    @cached_property
    def step_rows(self) -> NDArray[np.int64]:
        """Row numbers of each optimizer step, [steps, global batch]."""
        return self.order.reshape(-1, self.config.training_config.global_batch)

    @cached_property
    def shape(self) -> ModelShape | None:
        """The base's shape; None if it is not a decoder-only transformer."""
        return shape_of(json.loads((self.base / "config.json").read_text(encoding="utf-8")))

    def free_bytes(self) -> int:
        """Return the bytes of GPU memory that every device of the group can use."""
        return min(self.group.all_gather(free_gpu_bytes()))


def prepare_training(job: Job[TrainConfig], inputs: Inputs, progress: Progress) -> TrainingSetup:
    """Prepare a training and its work folder.

    Raises:
        BadData: a row is too long for the model.
        MissingExtra: an experiment tracker, or the device, is not available.
    """
    config, work = job.config, progress.work
    assert work is not None
    settings = job.runtime.trainer_settings(config)
    check_trackers(settings.report_to)
    rows, validation = _read_rows(inputs["tokens"], with_validation=settings.eval_strategy != "no")
    report = json.loads((inputs["tokens"] / "report.json").read_text(encoding="utf-8"))
    figures: dict[str, float] = report["figures"]
    positions = Positions.of_folder(inputs["base"])
    lengths: list[int] = []
    for part, name in ((rows, "training rows"), (validation, "validation rows")):
        if part is not None:
            positions.check(part.lengths.tolist(), name)
            lengths += part.lengths.tolist()
    global_batch = config.training_config.global_batch
    steps = count_steps(len(rows), global_batch, settings.num_train_epochs, settings.max_steps)
    device = pick_device(job.runtime)
    group = join(device)
    carried = [curves_file(work), work / EVA_FILE]  # copied into each checkpoint, which another machine may resume from
    resumed_from = _resume(group, work, carried)
    preemption = callbacks.PreemptionHandler(group, device)
    trainer_callbacks: list[TrainerCallback] = []
    if group.is_main:
        tokens_per_step = figures["train_tokens"] / len(rows) * global_batch
        trainer_callbacks += [
            callbacks.CurveWriter(curves_file(work)),
            callbacks.ProgressReporter(progress, steps.total, tokens_per_step),
        ]
    trainer_callbacks += [
        callbacks.NonFiniteGuard(),
        callbacks.CheckpointFinalizer(group, carried, resumed_from),
        preemption,
    ]
    if settings.early_stopping_patience:
        trainer_callbacks.append(callbacks.early_stopping(settings.early_stopping_patience, resumed_from))
    return TrainingSetup(
        base=inputs["base"],
        work=work,
        config=config,
        settings=settings,
        runtime=job.runtime,
        rows=rows,
        validation=validation,
        steps=steps,
        learned_share=figures.get("supervised_share", 1.0),
        order=row_order(len(rows), steps.total * global_batch, settings.seed),
        device=device,
        group=group,
        tokenizer=load_tokenizer(inputs["base"]),
        preemption=preemption,
        callbacks=trainer_callbacks,
        resumed_from=resumed_from,
        longrope_switch=positions.switched_angles(lengths, rows.row_length),
    )


def curves_file(work: Path) -> Path:
    """Return the file of the logged values."""
    return work / "curves.jsonl"


def _read_rows(tokens: Path, *, with_validation: bool) -> tuple[TokenRows, TokenRows | None]:
    packing, validation = tokens / "packing.parquet", tokens / "validation"
    rows = TokenRows(tokens / "train", packing if packing.exists() else None)
    return rows, TokenRows(validation) if with_validation and validation.exists() else None


def _resume(group: ProcessGroup, work: Path, carried: list[Path]) -> Path | None:
    """Return the newest intact checkpoint of an earlier attempt, and copy its carried files into the work folder.

    Files of an earlier attempt that no checkpoint has are removed: nothing says whether they are intact.
    """
    found = group.broadcast(prune_to_newest_intact(work / FOLDER) if group.is_main else None)
    if group.is_main:
        for file in carried:
            file.unlink(missing_ok=True)
            if found and (found / file.name).exists():
                shutil.copyfile(found / file.name, file)
    group.barrier()
    return found
