"""Stage train: tokens and a base to a PEFT adapter, by trl's SFTTrainer.

What is ours around it: the rows and their order (`batches`), checkpoints that a resume can trust,
curves, progress and guards (`callbacks`).
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loraflow.config.recipe import TrainerSettings
from loraflow.config.stage_configs import JobRuntime, TrainConfig
from loraflow.data.token_rows import TokenRows
from loraflow.failures import BadConfig, MissingExtra
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from loraflow.training.engine import Engine, answers_to_out_of_memory

log = logging.getLogger(__name__)
_TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "dvclive": "dvclive",
    "trackio": "trackio",
}


def run(job: Job[TrainConfig], inputs: Inputs, out: Path, progress: Progress) -> Summary:
    """Train, resuming from the newest whole checkpoint of an earlier attempt.

    Raises:
        BadConfig: a target module matches nothing, or the hardware cannot do the precision.
        NonFiniteLoss: the loss became NaN or infinite.
        OutOfMemory: it says what to try instead.
        Preempted: asked to end; a checkpoint was saved.
    """
    from loraflow.adapters.origin import write_origin
    from loraflow.adapters.variants import EVA_FILE
    from loraflow.base.load import load_tokenizer, pick_device
    from loraflow.hardware import group as devices
    from loraflow.store.checkpoints import FOLDER, newest_whole, step_of
    from loraflow.training import batches, callbacks

    config, runtime = job.config, job.runtime
    settings, global_batch = config.trainer_settings(runtime), config.training_config.global_batch
    _check_trackers(settings.report_to)
    work = progress.work
    assert work is not None
    figures = json.loads((inputs["tokens"] / "report.json").read_text(encoding="utf-8"))["figures"]
    packing = inputs["tokens"] / "packing.parquet"
    train = TokenRows(inputs["tokens"] / "train", packing if packing.exists() else None)
    validation = None
    if (inputs["tokens"] / "validation").exists() and settings.eval_strategy != "no":
        validation = TokenRows(inputs["tokens"] / "validation")
    steps, per_epoch = batches.steps_of(len(train), global_batch, settings.num_train_epochs, settings.max_steps)
    group = devices.join(pick_device(runtime))
    checkpoints = work / FOLDER
    found = group.agree(newest_whole(checkpoints) if group.first else None)
    resumed_at = (found and step_of(found.name)) or 0
    curves, stopper = work / "curves.jsonl", callbacks.Stopper()
    carried = [curves, work / EVA_FILE]  # with each checkpoint: it may be resumed from in another folder
    if group.first:
        curves.write_text("")
        for file in carried:
            if found and (found / file.name).exists():
                shutil.copyfile(found / file.name, file)
    group.wait()
    tokens_per_step = figures["train_tokens"] / len(train) * global_batch
    watching: list[Any] = []
    if group.first:
        watching += [callbacks.Curves(curves), callbacks.Reporter(progress, steps, tokens_per_step)]
    watching += [callbacks.Guard(), callbacks.Sealer(group, carried, found), stopper]
    if settings.early_stopping_patience:
        watching.append(_early_stopping(settings.early_stopping_patience, found))
    run = Engine(
        base=inputs["base"],
        config=config,
        settings=settings,
        runtime=runtime,
        rows=train,
        validation=validation,
        order=batches.row_order(len(train), steps * global_batch, settings.seed),
        group=group,
        stopper=stopper,
        callbacks=watching,
        tokenizer=load_tokenizer(inputs["base"]),
        work=work,
        arguments=lambda **own: _arguments(settings, steps, per_epoch, checkpoints, runtime, work, **own),
    )
    with answers_to_out_of_memory(run):
        trainer = run.trainer()
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        log.info("%d rows, %d steps of %d, from step %d; %d trainable parameters of %d; %s",
                 len(train), steps, global_batch, resumed_at, trainable,
                 sum(p.numel() for p in trainer.model.parameters()), run.said)  # fmt: skip
        result = trainer.train(resume_from_checkpoint=str(found) if found else None)
    stopper.raise_if_asked(trainer.state.global_step)
    callbacks.refuse_bad_numbers(trainer.model, steps)
    group.wait()
    if not group.first:
        return Summary()

    if config.method == "loralib":
        from loraflow.adapters.loralib.export import save_run

        save_run(trainer.model, out)
    else:
        _save_adapter(trainer.model, out / "adapter")
        if run.initial:
            from loraflow.adapters.variants import as_lora

            as_lora(out / "adapter", run.initial)
    write_origin(out / "adapter", inputs["base"], job.inputs["base"].digest)
    (out / "training.json").write_text(
        json.dumps({**{key: config.identity()[key] for key in ("training_config", "peft_config")}, "steps": steps},
                   indent=1, sort_keys=True) + "\n"
    )  # fmt: skip
    (out / "telemetry").mkdir()
    shutil.copyfile(curves, out / "telemetry" / "curves.jsonl")
    engine = {**run.said, "devices": group.size, "peak_gib": _peak_gib()}
    (out / "telemetry" / "engine.json").write_text(json.dumps(engine, indent=1) + "\n")
    if (work / "tracker").exists():
        shutil.copytree(work / "tracker", out / "telemetry" / "tracker")
    losses = [row["loss"] for line in curves.read_text().splitlines() if "loss" in (row := json.loads(line))]
    return Summary(
        figures={
            "steps": steps,
            "epochs": round(steps / per_epoch, 3),
            "trainable_parameters": trainable,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "mean_loss_of_last_attempt": result.training_loss,
            "resumed_at": resumed_at,
        },
        facets={"adapter": ["adapter/"]},
    )


def _peak_gib() -> float | None:
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if torch.cuda.is_available() else None


def _early_stopping(patience: int, checkpoint: Path | None) -> Any:
    """Return transformers' callback, with what it had counted given back: the trainer forgets it on resume."""
    from transformers import EarlyStoppingCallback

    callback = EarlyStoppingCallback(patience)
    if checkpoint is not None:
        _restore_patience(callback, checkpoint)
    return callback


def _restore_patience(callback: Any, checkpoint: Path) -> None:
    """Give early stopping back what it had counted: the trainer forgets it on resume."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback", {})
    saved = saved[0] if isinstance(saved, list) else saved
    callback.early_stopping_patience_counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)


def _arguments(
    settings: TrainerSettings,
    steps: int,
    per_epoch: int,
    checkpoints: Path,
    runtime: JobRuntime,
    work: Path,
    **own: Any,
) -> Any:
    """Return trl's SFTConfig. Epochs become steps: the trainer sees one long epoch, in an order of our own."""
    import os

    import torch
    from trl import SFTConfig

    from loraflow.base.load import pick_device

    device = pick_device(runtime)
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
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(work / "tracker")
    ours = {"num_train_epochs", "max_steps", "per_device_train_batch_size", "early_stopping_patience"}
    ours |= {"gradient_accumulation_steps", "eval_strategy", "eval_steps", "save_strategy", "save_steps"}
    ours |= {"logging_strategy", "logging_steps", "warmup_steps", "log_level", "save_total_limit"}
    ours |= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
    values = settings.model_dump(exclude=ours)
    if values["optim"] == "adamw_torch" and device == "cuda" and runtime.engine == "fast":
        values["optim"] = "adamw_torch_fused"  # the same sums in one kernel
    warmup = settings.warmup_steps
    return SFTConfig(
        **values,
        **_cadence("logging", settings, per_epoch, steps),
        **_cadence("save", settings, per_epoch, steps),
        **_cadence("eval", settings, per_epoch, steps),
        output_dir=str(checkpoints),
        max_steps=steps,
        warmup_steps=int(warmup) if warmup >= 1 else math.ceil(warmup * steps),
        log_level=settings.log_level,
        logging_nan_inf_filter=False,  # a NaN must be seen, not averaged away
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda" and torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        remove_unused_columns=False,
        disable_tqdm=True,
        push_to_hub=False,
        # The trainer removes an old checkpoint before the new one is sealed, so that one whole one must remain.
        save_total_limit=max(2, settings.save_total_limit) if settings.save_total_limit else None,
        **own,
    )


def _cadence(what: str, settings: TrainerSettings, per_epoch: int, steps: int) -> dict[str, Any]:
    """Return `<what>_strategy` and `<what>_steps`, with an epoch said in steps."""
    strategy = getattr(settings, f"{what}_strategy")
    if strategy == "epoch":
        return {f"{what}_strategy": "steps", f"{what}_steps": min(per_epoch, steps)}
    every = getattr(settings, f"{what}_steps")
    out: dict[str, Any] = {f"{what}_strategy": strategy}
    return out if every is None else {**out, f"{what}_steps": every}


def _check_trackers(report_to: str | list[str]) -> None:
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name in ("none", "all"):
            continue
        if find_spec(_TRACKERS.get(name, name)) is None:
            raise MissingExtra(
                f"The tracker {name} is not installed.",
                where="training_config.report_to",
                expected=f"none, or an installed one of {', '.join(_TRACKERS)}",
                next_step=f"pip install {_TRACKERS.get(name, name)}",
            )


def _save_adapter(model: Any, target: Path) -> None:
    """Save the adapter as peft does, without what would differ between two equal runs: paths, orders of sets."""
    model.save_pretrained(str(target))
    (target / "README.md").unlink(missing_ok=True)
    file = target / "adapter_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = None
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
