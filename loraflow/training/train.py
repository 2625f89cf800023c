"""Stage train: token rows and a base model to a PEFT adapter, by trl's SFTTrainer.

`run` reads top to bottom: prepare the training (`setup`), build the trainer (`build_trainer`), train, save.
"""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from loraflow.adapters.tokenizer_files import write_origin
from loraflow.base.architecture import is_tested, read_config
from loraflow.base.longrope import compute_angles_per_document
from loraflow.config.job_runtime import RetryWith
from loraflow.config.stage_configs import TrainConfig
from loraflow.failures import BadModel
from loraflow.hardware.device import device_name, peak_gpu_gib
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.training.base_model import load_base
from loraflow.training.callbacks import EarlyStopping, StoppedEarly, refuse_non_finite, warn_of_untrained
from loraflow.training.choices import (
    EngineChoices,
    choose_attention,
    choose_engine,
    choose_sharding,
    refuse_mixed_devices,
    refuse_unsupported,
    warn_of_slow_bfloat16,
)
from loraflow.training.document_check import (
    refuse_leaking_documents,
    refuse_other_generation,
    refuse_padding_that_is_seen,
    refuse_seeing_later_tokens,
)
from loraflow.training.memory import MemoryParts, StepMemory, explain_out_of_memory, training_parts
from loraflow.training.setup import TrainingSetup, curves_file, prepare_training
from loraflow.training.trainer import BuiltTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loraflow.training.memory import ModelShape, Recompute

log = logging.getLogger(__name__)


def run(job: Job[TrainConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Train an adapter, resuming from the newest intact checkpoint of an earlier attempt.

    Raises:
        BadConfig: a target module matches nothing, or the hardware cannot compute in the precision.
        NonFiniteLoss: the loss became NaN or infinite.
        OutOfMemory: the GPU's memory is not enough; says what to try next.
        Preempted: training was asked to stop; a checkpoint was saved.
    """
    setup = prepare_training(job, inputs, progress)
    with explain_out_of_memory("while the trainer was built", retry_with=RetryWith()):
        built = build_trainer(setup)
    trainer, choices = built.trainer, built.choices.to_json()
    trainable, parameters = _count_parameters(trainer.model)
    _log_start(setup, trainable, parameters, choices)
    if setup.group.is_main and setup.shape is not None:
        progress.expect_memory(_expected_memory(setup, setup.shape, built.choices).as_bytes())
    checkpoint = str(setup.resumed_from) if setup.resumed_from else None
    mean_loss: float | None = None
    with explain_out_of_memory(json.dumps(choices), retry_with=built.micro_batch.retry_with()):
        try:
            mean_loss = trainer.train(resume_from_checkpoint=checkpoint).training_loss
        except StoppedEarly:  # before its first step
            if trainer.state.best_model_checkpoint is not None:  # as transformers does after the last step
                trainer._load_best_model()
    step = trainer.state.global_step
    early = (call for call in trainer.callback_handler.callbacks if isinstance(call, EarlyStopping))
    is_over = step == setup.steps.total or any(call.is_over for call in early)  # only the adapter is left to write
    if setup.preemption.has_stopped and not is_over:
        setup.preemption.raise_if_requested(step)
    refuse_non_finite(trainer.model, step)
    setup.group.barrier()
    if not setup.group.is_main:
        return Summary()
    warn_of_untrained(trainer.model)
    _save_adapter(setup, built, out)
    write_origin(out / "adapter", inputs["base"], job.inputs["base"].digest)
    _write_training_settings(setup, out / "training.json")
    _write_telemetry(setup, built.final_choices().to_json(), out / "telemetry")
    losses = _logged_losses(setup.work)
    return Summary(
        figures={
            "steps": step,  # fewer than planned after early stopping
            "epochs": round(step / setup.steps.per_epoch, 3),
            "trainable_parameters": trainable,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "mean_loss_of_last_attempt": mean_loss,
            "resumed_at": setup.resumed_step,
        },
        facets={"adapter": ["adapter/"]},
    )


def build_trainer(setup: TrainingSetup) -> BuiltTrainer:
    """Return a trainer that is ready to train, and the choices that were made for it.

    Raises:
        BadConfig: the recipe and the hardware do not fit together.
        MissingExtra: a package that was asked for is not installed.
    """
    config = read_config(setup.base, trust=setup.config.base.trust_remote_code)
    engine = choose_engine(setup, config)
    setup = replace(setup, runtime=setup.runtime.model_copy(update={"engine": engine}))
    attention = choose_attention(setup, config)
    refuse_unsupported(config, is_packed=setup.rows.row_length is not None, quantization=setup.config.base.quantization)
    refuse_mixed_devices(setup.group, setup.device)
    is_sharded, sharding_why = choose_sharding(setup)
    setup = replace(setup, is_sharded=is_sharded)
    model = load_base(setup, attention)
    if setup.longrope_switch is not None:
        separate_angles(model, setup)
    if not is_sharded:
        _check_model(setup, model, is_concatenated=attention.concatenated)
    warn_of_slow_bfloat16(setup)
    choices = EngineChoices(
        base_sharded=is_sharded,
        base_sharded_why=sharding_why,
        engine=engine,
        attention=attention.kernel,
        attention_why=attention.why,
        device=device_name(setup.device),
        dtype=setup.compute_dtype,
    )
    if choices.engine == "fast":
        from loraflow.training.fast_engine import build_fast_trainer

        return build_fast_trainer(setup, model, attention, choices)
    from loraflow.training.stock_engine import build_stock_trainer

    return build_stock_trainer(setup, model, choices)


def _check_model(setup: TrainingSetup, model: PreTrainedModel, *, is_concatenated: bool) -> None:
    """Compute some tokens, and refuse a model whose tokens depend on what they must not see."""
    import torch

    pad_id, dtype = setup.tokenizer.pad_token_id, getattr(torch, setup.compute_dtype)
    if not is_tested(model.config) and not is_concatenated:
        refuse_other_generation(model, pad_id, compute_dtype=dtype)
    refuse_seeing_later_tokens(model, pad_id, is_concatenated=is_concatenated, compute_dtype=dtype)
    if is_concatenated or setup.rows.row_length is not None:
        refuse_leaking_documents(model, pad_id, is_concatenated=is_concatenated, compute_dtype=dtype)
    elif not is_tested(model.config):
        refuse_padding_that_is_seen(model, pad_id, compute_dtype=dtype)


def separate_angles(model: PreTrainedModel, setup: TrainingSetup) -> None:
    """Compute a model's angles for each document, because a call has positions on both sides of the switch.

    Args:
        model: the base, changed in place.

    Raises:
        BadModel: the angles are computed by code that comes with the model.
    """
    switch = setup.longrope_switch
    assert switch is not None
    if not compute_angles_per_document(model, switch):
        raise BadModel(
            "Rows on both sides of the model's longrope switch cannot be computed together: the longest row of a batch "
            "would change the angles of the others.",
            where="base.model",
            expected="rotary embeddings of transformers",
            got=f"architecture {model.config.model_type}, with code of its own",
            next_step=f"set training_config.max_length to {switch}, and data.too_long to drop or truncate",
        )
    log.info("documents of more than %d tokens use longrope's long factors, the others its short factors", switch)


def _log_start(setup: TrainingSetup, trainable: int, parameters: int, choices: dict[str, JsonValue]) -> None:
    log.info(
        "%d rows, %d steps of %d, from step %d; %d of %d parameters are trained; %s",
        len(setup.rows),
        setup.steps.total,
        setup.config.training_config.global_batch,
        setup.resumed_step,
        trainable,
        parameters,
        choices,
    )


def _expected_memory(setup: TrainingSetup, shape: ModelShape, choices: EngineChoices) -> MemoryParts:
    """Estimate this process's memory from the rows and from what the engine chose."""
    recompute: Recompute = choices.recompute or ("full" if setup.uses_gradient_checkpointing else "none")
    rows = choices.micro_batch_rows or min(setup.settings.per_device_train_batch_size, setup.rows_per_device)
    in_grid = setup.device == "cpu" or choices.engine == "stock" or choices.micro_batch_rows is not None
    tokens = rows * setup.longest_row if in_grid else choices.micro_batch_tokens or setup.longest_row
    return training_parts(
        shape,
        setup.device,
        setup.weight_format,
        setup.rank,
        StepMemory(
            tokens, setup.learned_share, recompute, choices.layers_recomputed, bool(choices.elementwise_recomputed)
        ),
        width=setup.activation_width,
        devices=setup.group.size if choices.base_sharded else 1,
    )


def _count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, is_trained in counts if is_trained), sum(count for count, _ in counts)


def _save_adapter(setup: TrainingSetup, built: BuiltTrainer, out: Path) -> None:
    """Write the PEFT adapter to `adapter/`, and loralib's own checkpoint beside it if that is the method."""
    if setup.config.method == "loralib":
        from loraflow.adapters.loralib.model import save_run

        save_run(built.trainer.model, out)
        return
    _save_peft_adapter(built.trainer.model, out / "adapter")
    if built.initial:
        from loraflow.adapters.variants import convert_to_plain_lora

        convert_to_plain_lora(out / "adapter", built.initial)


def _save_peft_adapter(model: PreTrainedModel, target: Path) -> None:
    """Save the adapter as peft does, without what would differ between two equal runs: paths, and the order of sets."""
    model.save_pretrained(str(target))
    file = target / "adapter_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = None
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_training_settings(setup: TrainingSetup, file: Path) -> None:
    """Write the settings that decided the result: they are part of the artifact's digest."""
    identity = setup.config.identity()
    settings = {key: identity[key] for key in ("training_config", "peft_config")} | {"steps": setup.steps.total}
    file.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _write_telemetry(setup: TrainingSetup, choices: dict[str, JsonValue], folder: Path) -> None:
    """Write curves, the engine's choices and the tracker's files: none of them is part of the artifact's digest."""
    folder.mkdir()
    shutil.copyfile(curves_file(setup.work), folder / "curves.jsonl")
    engine = {**choices, "devices": setup.group.size, "peak_gib": peak_gpu_gib()}
    (folder / "engine.json").write_text(json.dumps(engine, indent=1) + "\n")
    tracker = setup.work / "tracker"
    if tracker.exists():
        shutil.copytree(tracker, folder / "tracker")


def _logged_losses(work: Path) -> list[float]:
    rows = [json.loads(line) for line in curves_file(work).read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
