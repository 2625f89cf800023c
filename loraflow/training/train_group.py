"""Stage train_group: train the adapters of several trials of a sweep at once, to choose one by its validation loss.

It writes the losses that each trial logged. The chosen trial's adapter is trained again by the stage train, alone: its
bits depend on nothing but its own settings, and a group's result differs from it by rounding.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from pydantic import JsonValue

from loraflow.adapters.lora_config import lora_config
from loraflow.base.architecture import logit_factor, obstacle_to_fast_engine
from loraflow.config.job_runtime import RetryWith
from loraflow.config.stage_configs import TrainConfig, TrainGroupConfig
from loraflow.failures import CannotGroup
from loraflow.hardware.device import peak_gpu_gib
from loraflow.job import Inputs, Job, Progress
from loraflow.stages import TRAIN
from loraflow.store import Summary
from loraflow.training.base_model import check_adapter, load_base
from loraflow.training.batches import StepDataset
from loraflow.training.callbacks import log_untrained
from loraflow.training.choices import choose_attention
from loraflow.training.cuda_graphs import GraphedPass, choose_graphs
from loraflow.training.fast_engine import (
    choose_compile,
    choose_layout,
    choose_memory_fit,
    cost_of_length,
    grid_rows,
    passes_of,
)
from loraflow.training.group_batches import GroupSteps
from loraflow.training.group_lora import GroupLora, stack_adapters
from loraflow.training.group_trainer import GroupModel, GroupTrainer, base_of, build_member
from loraflow.training.layers import draws_in_passes, prepare_layers
from loraflow.training.loss_head import is_frozen_linear
from loraflow.training.memory import explain_out_of_memory
from loraflow.training.setup import BatchSettings, TrainingSetup, prepare_training, row_order, trainer_arguments
from loraflow.training.validation_loss import GROUP_PROBLEMS, curves_of_trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraflow.hardware.attention import Attention
    from loraflow.training.memory import MemoryFit

log = logging.getLogger(__name__)


def run(job: Job[TrainGroupConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Train the adapters of all trials, resuming from the newest intact checkpoint of an earlier attempt.

    Raises:
        BadConfig: an adapter of the group does not fit the base; trained alone, it is refused too.
        CannotGroup: base, device or settings need a training of its own for each trial.
        OutOfMemory: the GPU's memory is not enough for so many adapters.
        Preempted: training was asked to stop; a checkpoint was saved.
    """
    setups = _prepare(job, inputs, progress)
    with explain_out_of_memory("while a group's trainer was built", retry_with=RetryWith()):
        trainer, choices = build_group(setups, progress)
    log.info(
        "%d adapters in one pass, %d steps, from step %d; %s", len(setups), len(trainer.steps), trainer.step, choices
    )
    with explain_out_of_memory(json.dumps(choices), retry_with=RetryWith()):
        trainer.train()
    problems = [member.problem for member in trainer.members]
    if trainer.step < len(trainer.steps) and not all(problems):  # else only the losses are left to write
        setups[0].preemption.raise_if_requested(trainer.step)
    _warn_of_untrained(trainer)
    (out / GROUP_PROBLEMS).write_text(json.dumps(problems, indent=1) + "\n")
    for number, member in enumerate(trainer.members):
        lines = "".join(json.dumps(row) + "\n" for row in member.logs)
        (out / curves_of_trial(number)).write_text(lines)
    (out / "telemetry").mkdir()
    engine = {**choices, "peak_gib": peak_gpu_gib()}
    (out / "telemetry" / "engine.json").write_text(json.dumps(engine, indent=1) + "\n")
    return Summary(
        figures={"trials": len(setups), "failed": sum(map(bool, problems)), "steps": len(trainer.steps)},
    )


def _warn_of_untrained(trainer: GroupTrainer) -> None:
    """Log a warning for each trial that has modules that were not trained, unless it ended with a problem."""
    modules = [(name, module) for name, module in trainer.model.model.named_modules() if isinstance(module, GroupLora)]
    for number, member in enumerate(trainer.members):
        if not member.problem:
            trained = {name: bool(module.ups[number].detach().any()) for name, module in modules}
            log_untrained(trained, f"Trial {number + 1} of {len(trainer.members)}: ")


def _prepare(job: Job[TrainGroupConfig], inputs: Inputs, progress: Progress) -> list[TrainingSetup]:
    """Return the setup of each trial's training. They share everything but settings and the order of rows."""
    trials = job.config.trials
    alone = Job[TrainConfig](
        stage=TRAIN.name, version=TRAIN.version, inputs=job.inputs, config=trials[0], runtime=job.runtime
    )
    first = replace(prepare_training(alone, inputs, progress), together=tuple(trial.peft_config for trial in trials))
    setups = []
    for trial in trials:
        settings = job.runtime.trainer_settings(trial)
        order = row_order(len(first.rows), len(first.order), settings.seed)
        setups.append(replace(first, config=trial, settings=settings, order=order))
    return setups


def _refuse(why: str) -> CannotGroup:
    return CannotGroup(
        f"These trials cannot be trained together: {why}.",
        where="train_group",
        next_step="nothing: each trial is trained alone. To train no groups at all, set runtime.trials_together to 1",
    )


def build_group(setups: list[TrainingSetup], progress: Progress) -> tuple[GroupTrainer, dict[str, JsonValue]]:
    """Return the trainer of a group, and what was chosen for it.

    Raises:
        BadConfig: an adapter does not fit the base.
        CannotGroup: the base, its adapters or the device do not allow a group.
    """
    from transformers import AutoConfig

    setup = setups[0]
    config = AutoConfig.from_pretrained(setup.base, trust_remote_code=setup.config.base.trust_remote_code)
    if setup.runtime.engine == "stock" or (obstacle := obstacle_to_fast_engine(config)):
        raise _refuse("the stock engine trains one adapter" if setup.runtime.engine == "stock" else obstacle)
    if setup.longrope_switch is not None:
        raise _refuse("long documents have different rotary angles")
    if setup.group.size > 1:
        raise _refuse("several devices train one adapter")
    attention = choose_attention(setup, config)
    dtype: torch.dtype = getattr(torch, setup.compute_dtype)
    model, names = _add_adapters(setups, attention)
    adapters = stack_adapters(model, names, dtype)
    factor = logit_factor(config)
    head = base_of(model).get_output_embeddings()
    if adapters is None or factor is None:
        raise _refuse("an adapter is more than LoRA on linear layers, or the base computes in another dtype")
    if not is_frozen_linear(head, dtype) or draws_in_passes(base_of(model).get_decoder()):
        raise _refuse("the base's head is no linear layer, or the base has a dropout of its own")
    group = GroupModel(model, adapters, factor, setup.device)
    fit = _fit(setups, attention)
    choices = _prepare_passes(group, setups, attention, fit)
    steps, validation = _steps(setups, attention, fit, is_compiling=bool(group.compiled_layers))
    batch = BatchSettings(rows=1, accumulation=1, gradient_checkpointing=False)
    members = [
        build_member(trainer_arguments(setup, batch, "fast"), values, gradients)
        for setup, values, gradients in zip(setups, adapters.values, adapters.gradients, strict=True)
    ]
    trainer = GroupTrainer(
        group,
        members,
        steps,
        validation,
        setup.checkpoints,
        lambda: setup.preemption.is_requested,
        lambda step: progress(step=step, total=len(steps), adapters=len(setups)),
    )
    if setup.resumed_from is not None:
        trainer.resume(setup.resumed_from, setup.resumed_step)
    return trainer, choices


def _add_adapters(setups: list[TrainingSetup], attention: Attention) -> tuple[PreTrainedModel, list[str]]:
    """Return peft's model with an adapter for each trial, initialised as it is when it is trained alone."""
    from peft import get_peft_model
    from transformers import set_seed

    base = load_base(setups[0], attention)  # this also checks the first adapter
    for setup in setups[1:]:
        check_adapter(base, setup.config.peft_config)
    module: torch.nn.Module = base  # transformers' own `to` has no usable type
    module.to(setups[0].device)
    names = [f"trial{number}" for number in range(len(setups))]
    settings = [lora_config(setup.config.peft_config, base) for setup in setups]
    set_seed(setups[0].settings.seed)
    model = get_peft_model(base, settings[0], adapter_name=names[0])
    for setup, name, config in zip(setups[1:], names[1:], settings[1:], strict=True):
        set_seed(setup.settings.seed)
        model.add_adapter(name, config)
    return model, names


def _fit(setups: list[TrainingSetup], attention: Attention) -> MemoryFit:
    """Choose the tokens of each trial in a micro-batch, and what is recomputed.

    K trials together need the memory of a micro-batch that is K times as large.
    """
    setup, count = setups[0], len(setups)
    fit = choose_memory_fit(setup, attention, adapters=count)
    is_measured = setup.device != "cpu" and setup.shape is not None and attention.concatenated
    return replace(fit, tokens=max(setup.longest_row, fit.tokens // count if is_measured else fit.tokens))


def _prepare_passes(
    group: GroupModel, setups: list[TrainingSetup], attention: Attention, fit: MemoryFit
) -> dict[str, JsonValue]:
    """Compile layers and record passes where that saves time, as the training of one adapter does."""
    setup, count = setups[0], len(setups)
    tokens, passes = passes_of(setup, fit.tokens)
    whole = replace(fit, tokens=fit.tokens * count)
    is_graphed, graphs_why = choose_graphs(setup, attention, whole, group, passes=passes)
    dropping = max(setups, key=lambda setup: setup.config.peft_config.lora_dropout)  # masks are computed for all rows
    is_compiled, compiled_why = choose_compile(dropping, attention, tokens * count, passes, graphed=is_graphed)
    if is_graphed:
        sums = [parameter.grad for parameter in group.adapters.parameters]
        group.graphs = GraphedPass(group.hidden_states, group.adapters.parameters, lambda: None, sums)  # type: ignore[arg-type]
    recomputed = 0.0 if fit.recompute == "offload" else fit.share
    group.compiled_layers = prepare_layers(
        group.decoder, compiled=is_compiled, recomputed=recomputed, elementwise=is_compiled and fit.elementwise
    )
    return {
        "adapters": count,
        "micro_batch_tokens": fit.tokens * count,
        "recompute": fit.recompute,
        "compiled_layers": len(group.compiled_layers),
        "compiled_why": compiled_why,
        "cuda_graphs": is_graphed,
        "cuda_graphs_why": graphs_why,
        "attention": attention.kernel,
    }


def _steps(
    setups: list[TrainingSetup], attention: Attention, fit: MemoryFit, *, is_compiling: bool
) -> tuple[GroupSteps, GroupSteps | None]:
    """Return the optimizer steps of all trials, and the validation rows once for each."""
    setup = setups[0]
    rows, validation_rows = grid_rows(setup), setup.settings.per_device_eval_batch_size
    step_rows = np.concatenate([trial.step_rows for trial in setups])
    cost = cost_of_length(setup, passes_of(setup, fit.tokens)[0], is_compiling)
    layout = choose_layout(setup.rows, step_rows, fit, None if attention.concatenated else rows, length_cost=cost)
    pad_id = setup.tokenizer.pad_token_id
    members = [
        StepDataset(
            trial.rows, trial.step_rows, layout, pad_id,
            seed=trial.settings.seed, dropout=trial.config.peft_config.lora_dropout > 0,
        )
        for trial in setups
    ]  # fmt: skip
    if setup.validation is None:
        return GroupSteps(members), None
    step = np.arange(len(setup.validation))[None]
    layout = choose_layout(setup.validation, step, fit, None if attention.concatenated else validation_rows)
    validation = StepDataset(setup.validation, step, layout, pad_id)
    return GroupSteps(members), GroupSteps([validation] * len(setups))
