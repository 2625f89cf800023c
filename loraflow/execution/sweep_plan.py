"""What a sweep will do: which trials are trained already, and how often each shared stage runs. Imports no prefect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from loraflow.execution.plan import plan
from loraflow.execution.sweep import SHARED, STEPS, Trial, sharing_lines, stage_counts
from loraflow.execution.trial_groups import GroupResult, group_job, known_results, make_groups, why_alone
from loraflow.execution.trial_loss import NOT_MEASURED, read_curves, training_config
from loraflow.stages import TRAIN
from loraflow.store import Ref

TRAIN_INPUTS = {"tokens": "tokenize", "base": "resolve_base"}  # input of train → step


@dataclass(frozen=True)
class PlannedTrial:
    """What will happen to a trial, and why."""

    label: str
    settings: dict[str, JsonValue]
    seed: int
    status: Literal["cached", "runs", "depends"]
    why: tuple[str, ...]
    fingerprint: str | None  # None until the stages before it have run
    seconds: float | None  # that it took, or that a training took the last time
    loss: float | None  # on the validation rows, if it is known

    def to_json(self) -> dict[str, JsonValue]:
        """Return the trial as `loraflow sweep --plan --json` prints it."""
        return {**vars(self), "why": [*self.why]}


@dataclass(frozen=True)
class SweepPlan:
    """What will happen to the trials and to the stages before them."""

    trials: tuple[PlannedTrial, ...]
    times: dict[str, int]  # how often each shared stage runs, at most
    to_run: dict[str, int]  # and how many of these are not cached
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, JsonValue]:
        """Return the plan as `loraflow sweep --plan --json` prints it."""
        stages: list[JsonValue] = [
            {"stage": label, "times": count, "to_run": self.to_run[label]} for label, count in self.times.items()
        ]
        return {"trials": [trial.to_json() for trial in self.trials], "stages": stages, "notes": [*self.notes]}


def plan_sweep(trials: Sequence[Trial], keys: Sequence[str]) -> SweepPlan:
    """Return what a sweep would do. `keys` are those of its grid."""
    planned: list[PlannedTrial] = []
    known, groups = _groups(trials)
    missing: dict[str, set[str]] = {label: set() for label in SHARED}
    for trial in trials:
        steps = {step.label: step for step in plan(trial.workspace, steps=STEPS)}
        for label in SHARED:
            if steps[label].status != "cached":
                missing[label].add(trial.identities[label])
        train = steps[TRAIN.name]
        status, why, loss = train.status, tuple(train.why), None
        if train.status == "cached" and train.fingerprint is not None:
            loss = _known_loss(trial, train.fingerprint)
            if loss is None:
                status, why = "runs", (NOT_MEASURED,)
        if (result := known.get(trial.label)) is not None:
            status, why, loss = "cached", (result.problem or "it was trained in a group",), result.loss
        planned.append(
            PlannedTrial(
                trial.label, dict(trial.settings), trial.seed, status, why, train.fingerprint, train.seconds, loss
            )
        )
    return SweepPlan(
        tuple(planned),
        stage_counts(trials),
        {label: len(found) for label, found in missing.items()},
        (*sharing_lines(trials, keys), *groups),
    )


def _groups(trials: Sequence[Trial]) -> tuple[dict[str, GroupResult], list[str]]:
    """Return what is known of trials that were trained in a group, and how the others are trained."""
    first = trials[0].workspace
    size = first.recipe.runtime.trials_together
    if size == 1:
        return {}, []
    jobs = {}
    for trial in trials:
        refs = {} if why_alone(trial) else _inputs(trial)
        if len(refs) == len(TRAIN.inputs):
            jobs[trial.label] = group_job([trial], refs)
    known = known_results(first.store, trials, jobs)
    left = [trial for trial in trials if trial.label not in known]
    reads = {trial.label: json.dumps([trial.identities[label] for label in TRAIN_INPUTS.values()]) for trial in left}
    return known, make_groups(left, reads, size).lines()


def _inputs(trial: Trial) -> dict[str, Ref]:
    """Return what a trial trains on, as far as it is in the store."""
    steps = {step.label: step for step in plan(trial.workspace, steps=STEPS)}
    found = {}
    for name, label in TRAIN_INPUTS.items():
        step = steps[label]
        if step.status == "cached" and step.fingerprint is not None:
            ref = trial.workspace.store.find(step.stage, step.fingerprint)
            if ref is not None:
                found[name] = ref
    return found


def _known_loss(trial: Trial, fingerprint: str) -> float | None:
    store = trial.workspace.store
    ref: Ref | None = store.find(TRAIN.name, fingerprint)
    curves = read_curves(store, ref) if ref is not None else None
    return None if curves is None else curves.validation_loss(training_config(trial.workspace))
