"""Which trials of a sweep are trained together, over one base. Imports no prefect and no torch.

Trials of a group share base, tokens, batch and number of steps. What may differ is their own in a group: the optimizer
and its schedule, the seed, and rank, scale and dropout of LoRA.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from loraflow.config.stage_configs import TrainConfig, TrainGroupConfig
from loraflow.execution.sweep import Trial
from loraflow.job import Job
from loraflow.stages import TRAIN, TRAIN_GROUP
from loraflow.store import Ref, Store
from loraflow.training.validation_loss import GROUP_PROBLEMS, Curves

# Keys of training_config and peft_config in which the trials of a group may differ.
OWN_TRAINING = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
}  # fmt: skip
OWN_PEFT = {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"}


@dataclass(frozen=True)
class Groups:
    """The trials that are trained together, and why the others are not."""

    groups: tuple[tuple[Trial, ...], ...]  # of two trials at least
    apart: Mapping[str, str]  # label of a trial → reason

    def lines(self) -> list[str]:
        """Return the groups, as lines for people."""
        lines = [f"trained together, in one process: {', '.join(one.label for one in group)}" for group in self.groups]
        by_reason: dict[str, list[str]] = {}
        for label, why in self.apart.items():
            by_reason.setdefault(why, []).append(label)
        return lines + [f"trained by itself: {', '.join(labels)} ({why})" for why, labels in by_reason.items()]


@dataclass(frozen=True)
class GroupResult:
    """What a group's artifact has of one trial."""

    ref: Ref
    number: int  # of the trial in the group
    size: int  # of the group
    problem: str  # why it failed; empty if it did not
    loss: float | None  # on the validation rows


def config_of(trial: Trial) -> TrainConfig:
    """Return the config of a trial's training."""
    return TrainConfig.from_recipe(trial.workspace.recipe, trial.workspace)


def make_groups(trials: Sequence[Trial], inputs: Mapping[str, str], size: int) -> Groups:
    """Divide trials into groups.

    Args:
        trials: that are to be trained.
        inputs: {label of a trial: what its training reads}; trials with an equal value read the same.
        size: the largest number of trials of a group (`runtime.trials_together`).
    """
    alike: dict[str, list[Trial]] = {}
    apart: dict[str, str] = {}
    for trial in trials:
        why = why_alone(trial)
        if why:
            apart[trial.label] = why
        else:
            alike.setdefault(json.dumps([_shared(trial), inputs[trial.label]], sort_keys=True), []).append(trial)
    groups = []
    for found in alike.values():
        for first in range(0, len(found), size):
            part = tuple(found[first : first + size])
            if len(part) > 1:
                groups.append(part)
            else:
                apart[part[0].label] = _why_left(size, len(alike))
    return Groups(tuple(groups), apart)


def _why_left(size: int, kinds: int) -> str:
    if size == 1:
        return "runtime.trials_together is 1"
    return "no other trial has the same rows, batch and steps" if kinds > 1 else "it is the only one that is left"


def _shared(trial: Trial) -> JsonValue:
    """Return the settings of a training in which the trials of a group are equal."""
    identity = config_of(trial).identity()
    for part, own in (("training_config", OWN_TRAINING), ("peft_config", OWN_PEFT)):
        values = identity[part]
        assert isinstance(values, dict)
        identity[part] = {key: value for key, value in values.items() if key not in own}
    return identity


def why_alone(trial: Trial) -> str:
    """Return why a trial cannot be trained together with any other; empty if it can, as far as the recipe says."""
    recipe = trial.workspace.recipe
    training, peft, base, runtime = recipe.training_config, recipe.peft_config, recipe.base, recipe.runtime
    dtype = "bfloat16" if training.bf16 else "float16" if training.fp16 else base.dtype
    reasons = {
        "runtime.engine is stock": runtime.engine == "stock",
        "several devices train it": runtime.devices > 1 or runtime.rendezvous.nodes > 1,
        "its training is placed on another work pool": TRAIN.name in runtime.placement,
        "the method is loralib": recipe.method == "loralib",
        "peft_config.use_dora": peft.use_dora,
        "peft_config.bias": peft.bias != "none",
        "peft_config.modules_to_save": bool(peft.modules_to_save),
        "peft_config.trainable_token_indices": bool(peft.trainable_token_indices),
        "peft_config.target_parameters": bool(peft.target_parameters),
        "peft_config.loraplus_lr_ratio": bool(peft.loraplus_lr_ratio),
        "this peft_config.init_lora_weights": peft.init_lora_weights not in (True, False, "gaussian", "orthogonal"),
        "training_config.neftune_noise_alpha": bool(training.neftune_noise_alpha),
        "training_config.early_stopping_patience": bool(training.early_stopping_patience),
        "training_config.optim is neither AdamW nor SGD": training.optim
        not in ("adamw_torch", "adamw_torch_fused", "sgd"),
        "training_config.fp16": training.fp16,
        "base.quantization": base.quantization is not None,
        f"the base is {base.dtype}, and training computes in {dtype}": dtype != base.dtype,
        "it is tracked by training_config.report_to": training.report_to not in ("none", ["none"], []),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")


def group_job(trials: Sequence[Trial], inputs: Mapping[str, Ref]) -> Job[TrainGroupConfig]:
    """Return the job of a group."""
    workspace = trials[0].workspace.with_group(tuple(map(config_of, trials)))
    return workspace.job(TRAIN_GROUP, inputs)  # type: ignore[return-value]


def known_results(
    store: Store, trials: Sequence[Trial], jobs: Mapping[str, Job[TrainGroupConfig]]
) -> dict[str, GroupResult]:
    """Return what the store has of trials that were trained in some group: {label: result}.

    Args:
        store: of the artifacts.
        trials: to look up.
        jobs: {label: the job of a group that has only this trial}; labels that are absent are not looked up.
    """
    wanted = {_key(jobs[trial.label].payload, 0): trial for trial in trials if trial.label in jobs}
    found: dict[str, GroupResult] = {}
    if not wanted:
        return found
    for ref in store.artifacts():
        if ref.stage != TRAIN_GROUP.name or store.find(ref.stage, ref.fingerprint) is None:
            continue
        payload = store.manifest(ref).payload
        for number in range(_size(payload)):
            trial = wanted.get(_key(payload, number))
            if trial is not None and trial.label not in found:
                found[trial.label] = read_result(store, ref, number, trial)
    return found


def read_result(store: Store, ref: Ref, number: int, trial: Trial) -> GroupResult:
    """Return a trial's part of a group's artifact."""
    problems: list[str] = json.loads(store.read(ref, GROUP_PROBLEMS))
    loss = None
    if not problems[number]:
        loss = read_curves_of(store, ref, number).validation_loss(config_of(trial).training_config)
    return GroupResult(ref, number, len(problems), problems[number], loss)


def read_curves_of(store: Store, ref: Ref, number: int) -> Curves:
    """Return the losses that a trial of a group logged."""
    return Curves.parse(store.read(ref, f"curves-{number}.jsonl"))


def _size(payload: Mapping[str, JsonValue]) -> int:
    return sum(1 for _ in _trials(payload))


def _trials(payload: Mapping[str, JsonValue]) -> Iterator[JsonValue]:
    config = payload["config"]
    assert isinstance(config, dict) and isinstance(config["trials"], list)
    yield from config["trials"]


def _key(payload: Mapping[str, JsonValue], number: int) -> str:
    """Return what identifies a trial in a group's payload: version and inputs of the stage, and its own config."""
    return json.dumps([payload["version"], payload["inputs"], [*_trials(payload)][number]], sort_keys=True)
