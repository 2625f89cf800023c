"""Which trials of a sweep are trained together, over one base. Imports no prefect and no torch.

Trials of a group share base, tokens, batch and number of steps. Each has its own optimizer, schedule and seed, and its own
rank, scale and dropout of LoRA.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from loraflow.config.stage_configs import TrainGroupConfig
from loraflow.execution.sweep import Trial, own_loss
from loraflow.job import Job
from loraflow.stages import TRAIN, TRAIN_GROUP
from loraflow.store import Ref, Store
from loraflow.training.validation_loss import GROUP_PROBLEMS, Curves, curves_of_trial

TRAIN_INPUTS = {"tokens": "tokenize", "base": "resolve_base"}  # input of train → step
# Keys of training_config and peft_config in which the trials of a group may differ.
OWN_TRAINING = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
}  # fmt: skip
OWN_PEFT = {"r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern"}


@dataclass(frozen=True)
class Groups:
    """The trials that are trained together, and why the others are not."""

    groups: tuple[tuple[Trial, ...], ...]  # each has two trials at least
    alone: Mapping[str, str]  # label of a trial → reason
    equal: Mapping[str, str]  # label of a trial → label of an earlier trial that is the same training

    def lines(self) -> list[str]:
        """Return the groups, as lines for people."""
        lines = [
            f"trained together, in one process: {', '.join(trial.label for trial in group)}" for group in self.groups
        ]
        by_reason: dict[str, list[str]] = {}
        for label, why in self.alone.items():
            by_reason.setdefault(why, []).append(label)
        lines += [f"trained alone: {', '.join(labels)} ({why})" for why, labels in by_reason.items()]
        return lines + [
            f"not trained again: {label} is the same training as {other}" for label, other in self.equal.items()
        ]


@dataclass(frozen=True)
class GroupResult:
    """What a group's artifact has of one trial."""

    ref: Ref
    number: int  # position of the trial in the group
    size: int  # number of trials in the group
    problem: str  # why it failed; empty if it did not
    loss: float | None  # validation loss


@dataclass(frozen=True)
class Division:
    """What a sweep that trains trials together does with each trial. Its plan and its run both call `divide`."""

    known: Mapping[str, GroupResult]  # by label: what the store has of trials that were trained in some group
    groups: Groups  # groups of the remaining trials, which are neither known nor trained alone


def divide(trials: Sequence[Trial], inputs: Mapping[str, Mapping[str, Ref]]) -> Division:
    """Look up trials in the store, and divide those that are left into groups."""
    workspace = trials[0].workspace
    size = workspace.recipe.runtime.trials_together
    if size == 1:
        return Division({}, Groups((), {}, {}))
    ready = {trial.label for trial in trials if inputs[trial.label].keys() >= TRAIN.inputs.keys()}
    jobs = {
        trial.label: group_job([trial], inputs[trial.label])
        for trial in trials
        if trial.label in ready and not why_alone(trial)
    }
    known = known_results(workspace.store, trials, jobs)
    left, reads = [], {}
    for trial in trials:
        label, refs = trial.label, inputs[trial.label]
        if label in known:
            continue
        if label in ready and own_loss(trial, trial.workspace.job(TRAIN, refs).fingerprint) is not None:
            continue
        left.append(trial)
        reads[label] = json.dumps(
            [refs[name].digest if label in ready else trial.identities[step] for name, step in TRAIN_INPUTS.items()]
        )
    return Division(known, make_groups(left, reads, size))


def make_groups(trials: Sequence[Trial], inputs: Mapping[str, str], size: int) -> Groups:
    """Divide trials into groups of about equal sizes. Of trials that are the same training, a group has only one.

    Args:
        inputs: {label of a trial: what its training reads}; trials with an equal value read the same.
        size: the largest number of trials of a group (`runtime.trials_together`).
    """
    alike: dict[str, list[Trial]] = {}
    alone: dict[str, str] = {}
    equal: dict[str, str] = {}
    first: dict[str, str] = {}  # training → label of the first trial that is this training
    for trial in trials:
        label, reads = trial.label, inputs[trial.label]
        training = json.dumps([trial.config.identity(), reads], sort_keys=True)
        if why := why_alone(trial):
            alone[label] = why
        elif first.setdefault(training, label) != label:
            equal[label] = first[training]
        else:
            alike.setdefault(json.dumps([_shared(trial), reads], sort_keys=True), []).append(trial)
    groups = []
    for found in alike.values():
        for part in _parts(found, size):
            if len(part) > 1:
                groups.append(part)
            else:
                alone[part[0].label] = _why_left(size, len(found), len(alike))
    return Groups(tuple(groups), alone, equal)


def _parts(trials: Sequence[Trial], size: int) -> Iterator[tuple[Trial, ...]]:
    """Yield as few parts of at most `size` trials as possible. Their sizes differ by one at most; larger ones come first.

    When a sweep continues after an interruption, it divides the trials that are left into the same groups again.
    """
    count = math.ceil(len(trials) / size)
    start = 0
    for left in range(count, 0, -1):
        end = start + math.ceil((len(trials) - start) / left)
        yield tuple(trials[start:end])
        start = end


def _why_left(size: int, count: int, kinds: int) -> str:
    """Return why a trial is trained alone, although `count` trials have the same rows, batch and steps."""
    if size == 1:
        return "runtime.trials_together is 1"
    if count > 1:
        return f"the others fill groups of {size}: runtime.trials_together"
    if kinds > 1:
        return "no other remaining trial has the same rows, batch and steps"
    return "it is the only remaining trial"


def _shared(trial: Trial) -> JsonValue:
    """Return the settings of a training in which the trials of a group are equal."""
    identity = trial.config.identity()
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
    workspace = trials[0].workspace.with_group(tuple(trial.config for trial in trials))
    return workspace.job(TRAIN_GROUP, inputs)  # type: ignore[return-value]


def known_results(
    store: Store, trials: Sequence[Trial], jobs: Mapping[str, Job[TrainGroupConfig]]
) -> dict[str, GroupResult]:
    """Return what the store has of trials that were trained in some group: {label: result}.

    Args:
        jobs: {label: the job of a group that has only this trial}; labels that are absent are not looked up.
    """
    by_key: dict[str, list[Trial]] = {}  # several trials may be the same training
    for trial in trials:
        if trial.label in jobs:
            by_key.setdefault(_key(jobs[trial.label].payload, 0), []).append(trial)
    found: dict[str, GroupResult] = {}
    for ref in store.artifacts() if by_key else ():
        if ref.stage != TRAIN_GROUP.name or store.find(ref.stage, ref.fingerprint) is None:
            continue
        payload = store.manifest(ref).payload
        for number in range(len(_trials(payload))):
            for trial in by_key.pop(_key(payload, number), []):
                found[trial.label] = read_result(store, ref, number, trial)
    return found


def read_result(store: Store, ref: Ref, number: int, trial: Trial) -> GroupResult:
    """Return a trial's part of a group's artifact."""
    problems: list[str] = json.loads(store.read(ref, GROUP_PROBLEMS))
    loss = None
    if not problems[number]:
        loss = read_curves_of(store, ref, number).validation_loss(trial.config.training_config)
    return GroupResult(ref, number, len(problems), problems[number], loss)


def read_curves_of(store: Store, ref: Ref, number: int) -> Curves:
    """Return the losses that a trial of a group logged."""
    return Curves.parse(store.read(ref, curves_of_trial(number)))


def _trials(payload: Mapping[str, JsonValue]) -> list[JsonValue]:
    config = payload["config"]
    assert isinstance(config, dict) and isinstance(config["trials"], list)
    return config["trials"]


def _key(payload: Mapping[str, JsonValue], number: int) -> str:
    """Return what identifies a trial in a group's payload: version and inputs of the stage, and its own config."""
    return json.dumps([payload["version"], payload["inputs"], _trials(payload)[number]], sort_keys=True)
