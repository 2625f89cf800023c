"""What a sweep will do: which trials are trained already, and how often each shared stage runs. Imports no prefect."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from pydantic import JsonValue

from loraflow.execution.plan import PlannedStep, plan
from loraflow.execution.sweep import (
    NOT_MEASURED,
    SHARED,
    STEPS,
    Trial,
    own_loss,
    sharing_lines,
    stage_counts,
)
from loraflow.execution.trial_groups import TRAIN_INPUTS, Division, divide
from loraflow.registry.sweeps import TrialRecord, choose
from loraflow.stages import TRAIN, TRAIN_GROUP
from loraflow.store import Ref

TRAIN_CHOSEN = "train for the chosen trial"  # for the trial that was chosen in a group, which only measured it


@dataclass(frozen=True)
class PlannedTrial:
    """What will happen to a trial, and why."""

    label: str
    settings: dict[str, JsonValue]
    seed: int
    status: Literal["cached", "runs", "depends"]
    why: tuple[str, ...]
    fingerprint: str | None  # None until the stages before it have run
    seconds: float | None  # duration of the training, or that of the last training
    loss: float | None  # validation loss, if it is known

    def to_json(self) -> dict[str, JsonValue]:
        """Return the trial as `loraflow sweep --plan --json` prints it."""
        return {**vars(self), "why": [*self.why]}


@dataclass(frozen=True)
class SweepPlan:
    """What will happen to the trials and to the stages before them."""

    trials: tuple[PlannedTrial, ...]
    times: dict[str, int]  # how often each shared stage runs, at most
    to_run: dict[str, int]  # how many of these runs are not cached
    # Trainings that will run: of groups, of single trials, and of the chosen trial after its group
    trainings: dict[str, int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, JsonValue]:
        """Return the plan as `loraflow sweep --plan --json` prints it."""
        stages: list[JsonValue] = [
            {"stage": label, "times": count, "to_run": self.to_run[label]} for label, count in self.times.items()
        ]
        return {
            "trials": [trial.to_json() for trial in self.trials],
            "stages": stages,
            "trainings": {**self.trainings},
            "notes": [*self.notes],
        }


def plan_sweep(trials: Sequence[Trial], keys: Sequence[str]) -> SweepPlan:
    """Return what a sweep would do. `keys` are those of its grid."""
    planned: list[PlannedTrial] = []
    by_trial = {trial.label: {step.label: step for step in plan(trial.workspace, steps=STEPS)} for trial in trials}
    division = divide(trials, {trial.label: _inputs(trial, by_trial[trial.label]) for trial in trials})
    missing: dict[str, set[str]] = {label: set() for label in SHARED}
    for trial in trials:
        steps = by_trial[trial.label]
        for label in SHARED:
            if steps[label].status != "cached":
                missing[label].add(trial.identities[label])
        train = steps[TRAIN.name]
        status, why, loss = train.status, tuple(train.why), None
        if train.status == "cached" and train.fingerprint is not None:
            loss = own_loss(trial, train.fingerprint)
            if loss is None:
                status, why = "runs", (NOT_MEASURED,)
        if (result := division.known.get(trial.label)) is not None:
            status, why, loss = "cached", (result.problem or "it was trained in a group",), result.loss
        planned.append(
            PlannedTrial(
                trial.label, dict(trial.settings), trial.seed, status, why, train.fingerprint, train.seconds, loss
            )
        )
    trained = {label for label, steps in by_trial.items() if steps[TRAIN.name].status == "cached"}
    return SweepPlan(
        tuple(planned),
        stage_counts(trials),
        {label: len(found) for label, found in missing.items()},
        _trainings(planned, division, trained),
        (*sharing_lines(trials, keys), *division.groups.lines()),
    )


def _trainings(planned: Sequence[PlannedTrial], division: Division, trained: Set[str]) -> dict[str, int]:
    """Return how many trainings of each way will run."""
    groups, equal = division.groups.groups, division.groups.equal
    together = {trial.label for group in groups for trial in group}
    left = sum(trial.status != "cached" and trial.label not in together | equal.keys() for trial in planned)
    grouped = together | division.known.keys() | {label for label, other in equal.items() if other in together}
    counts = {TRAIN_GROUP.name: len(groups), TRAIN.name: left, TRAIN_CHOSEN: 0}
    if all(trial.status == "cached" for trial in planned):  # so it is known which one is chosen
        counts[TRAIN_CHOSEN] = int(_chosen(planned) in grouped - trained)
    elif grouped - trained:
        counts[TRAIN_CHOSEN] = 1
    return {way: count for way, count in counts.items() if count}


def _chosen(planned: Sequence[PlannedTrial]) -> str | None:
    return choose(
        [
            TrialRecord(
                label=trial.label,
                settings=trial.settings,
                seed=trial.seed,
                state="failed" if trial.loss is None else "cached",
                loss=trial.loss,
            )
            for trial in planned
        ]
    ).chosen


def _inputs(trial: Trial, steps: Mapping[str, PlannedStep]) -> dict[str, Ref]:
    """Return what a trial trains on, as far as it is in the store."""
    found = {}
    for name, label in TRAIN_INPUTS.items():
        step = steps[label]
        if step.status == "cached" and step.fingerprint is not None:
            ref = trial.workspace.store.find(step.stage, step.fingerprint)
            if ref is not None:
                found[name] = ref
    return found
