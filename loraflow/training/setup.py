"""Prepare a training: settings, rows in their order, devices, tokenizer, callbacks, and the checkpoint to resume from."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from loraflow.adapters.variants import EVA_FILE
from loraflow.base.load import load_tokenizer
from loraflow.config.job_runtime import JobRuntime
from loraflow.config.lora import PeftConfig
from loraflow.config.stage_configs import TrainConfig
from loraflow.config.training import TrainerSettings
from loraflow.data.positions import Positions
from loraflow.data.token_rows import TokenRows
from loraflow.hardware.device import Device, free_gpu_bytes, pick_device
from loraflow.hardware.process_group import ProcessGroup, join
from loraflow.job import Inputs, Job, Progress
from loraflow.store.checkpoints import FOLDER, prune_to_newest_intact, step_of
from loraflow.training import callbacks
from loraflow.training.adapter_rank import adapter_rank
from loraflow.training.arguments import (
    BatchSettings,
    StepCount,
    check_trackers,
    count_steps,
    row_order,
    trainer_arguments,
)
from loraflow.training.memory import ModelShape, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback
    from trl import SFTConfig


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
    together: tuple[PeftConfig, ...] = ()  # the adapters that are trained in one pass; empty: there is only this one
    longrope_switch: int | None = None  # angles are computed for each document, because some have more tokens

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

    def trainer_arguments(self, batch_settings: BatchSettings, engine: Literal["fast", "stock"]) -> SFTConfig:
        """Return the arguments of an engine's trainer."""
        return trainer_arguments(
            self.settings, self.steps, batch_settings, self.device, engine, self.work, self.checkpoints
        )

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
    figures = _figures(inputs["tokens"])
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
    preemption = callbacks.PreemptionHandler()
    watchers: list[TrainerCallback] = []
    if group.is_main:
        tokens_per_step = figures["train_tokens"] / len(rows) * global_batch
        watchers += [
            callbacks.CurveWriter(curves_file(work)),
            callbacks.ProgressReporter(progress, steps.total, tokens_per_step),
        ]
    watchers += [callbacks.NonFiniteGuard(), callbacks.CheckpointSealer(group, carried, resumed_from), preemption]
    if settings.early_stopping_patience:
        watchers.append(callbacks.early_stopping(settings.early_stopping_patience, resumed_from))
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
        callbacks=watchers,
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


def _figures(tokens: Path) -> dict[str, float]:
    """Return the figures of the tokenize stage's report."""
    figures: dict[str, float] = json.loads((tokens / "report.json").read_text(encoding="utf-8"))["figures"]
    return figures


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
