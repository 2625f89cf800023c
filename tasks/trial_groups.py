"""Train the trials of a sweep in groups (`runtime.trials_together`), each group in one process over one base.

A group only measures. The losses of its trials choose a trial, which is trained by itself afterwards.
A trial that cannot be in a group, or whose group cannot be trained, is left to `run_trials`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from loraflow.execution.sweep import Trial
from loraflow.execution.trial_groups import GroupResult, config_of, divide, read_result
from loraflow.failures import (
    BadConfig,
    BadModel,
    BadPlacement,
    CannotGroup,
    Crashed,
    DeadlineExceeded,
    Killed,
    MissingExtra,
    NonFiniteLoss,
    OutOfMemory,
    Stalled,
)
from loraflow.registry.sweeps import SweepRecord, TrialRecord
from loraflow.stages import TRAIN_GROUP
from loraflow.store import Ref
from loraflow.tasks.run import Run
from loraflow.tasks.stages import train_group

log = logging.getLogger("loraflow")


def run_groups(run: Run, trials: Sequence[Trial], inputs: Mapping[str, Mapping[str, Ref]]) -> dict[str, TrialRecord]:
    """Train the trials that can be trained together; return their records by label.

    Trials that were in a group of an earlier sweep are not trained again, also if this sweep would make other groups.

    Args:
        run: the sweep's run.
        trials: all trials of the sweep.
        inputs: {label: what the trial trains on}.

    Raises:
        Failure: a group failed for a reason that would also end the trials' own trainings, such as a full disk.
    """
    division = divide(trials, inputs)
    known, groups = division.known, division.groups
    by_label = {trial.label: trial for trial in trials}
    records = {label: _record(run, by_label[label], result, "cached") for label, result in known.items()}
    for line in groups.lines():
        log.info("%s", line)
    for number, group in enumerate(groups.groups, 1):
        records |= _run_group(run, list(group), inputs[group[0].label], f"{TRAIN_GROUP} {number}")
    for label, other in groups.equal.items():
        if other in records:
            records[label] = _as_equal(records[other], by_label[label])
    return records


def _as_equal(record: TrialRecord, trial: Trial) -> TrialRecord:
    """Return the record of a trial which is the same training as a recorded one."""
    own = {"label": trial.label, "settings": dict(trial.settings), "seed": trial.seed}
    state = "failed" if record.problem else "cached"
    return TrialRecord.model_validate({**record.model_dump(), **own, "state": state})


def group_labels(stages: Iterable[str]) -> set[str]:
    """Return the labels of groups among those of a run's stages."""
    return {label for label in stages if label.startswith(f"{TRAIN_GROUP} ")}


def note_loss_alone(record: SweepRecord, alone: float | None) -> SweepRecord:
    """Return a sweep's record with the validation loss of the chosen trial alone, if it was chosen by that in a group."""
    chosen = next(trial for trial in record.trials if trial.label == record.chosen)
    if chosen.group_number is None or alone is None or chosen.loss is None:
        return record
    note = (
        f"trained by itself, {chosen.label} has a validation loss of {alone:.4f}; in its group it had {chosen.loss:.4f}"
    )
    log.info("%s", note)
    return record.model_copy(update={"notes": [*record.notes, note]})


def _run_group(run: Run, group: list[Trial], inputs: Mapping[str, Ref], label: str) -> dict[str, TrialRecord]:
    """Train a group, or its halves if the memory is not enough; return the records of the trials that were trained."""
    log.info("%s: %d trials in one pass", label, len(group))
    run.workspace = group[0].workspace.with_group(tuple(map(config_of, group)))
    try:
        ref = train_group(run, tokens=inputs["tokens"], base=inputs["base"], label=label)
    except BadPlacement:  # no trial would find a worker
        raise
    except OF_THE_GROUP as failure:
        half = (len(group) + 1) // 2
        if not isinstance(failure, OutOfMemory | Killed) or half < 2:
            log.warning("%s: its trials are trained by themselves. %s", label, failure)
            return {}
        log.warning("%s: its %d trials are trained in two groups. %s", label, len(group), failure.what)
        parts = ((group[:half], f"{label}a"), (group[half:], f"{label}b"))
        found = [_run_group(run, part, inputs, name) for part, name in parts if len(part) > 1]
        return {name: record for records in found for name, record in records.items()}
    state = run.stages[label].state
    results = [read_result(run.workspace.store, ref, number, trial) for number, trial in enumerate(group)]
    return {trial.label: _record(run, trial, result, state) for trial, result in zip(group, results, strict=True)}


def _record(run: Run, trial: Trial, result: GroupResult, state: str) -> TrialRecord:
    if not result.problem and result.loss is None:
        raise Crashed(
            "A group ended without a trial's validation loss.",
            where=trial.label,
            next_step="this is a bug in loraflow: report it, with the run's log",
        )
    seconds = run.workspace.store.manifest(result.ref).seconds
    problem = f"NonFiniteLoss: {result.problem}" if result.problem else ""
    return TrialRecord.model_validate(
        {
            "label": trial.label,
            "settings": dict(trial.settings),
            "seed": trial.seed,
            "state": "failed" if problem else state,
            "loss": result.loss,
            "seconds": None if problem or seconds is None else seconds / result.size,
            "fingerprint": result.ref.fingerprint,
            "digest": result.ref.digest,
            "problem": problem,
            "group_number": result.number,
        }
    )


# Failures that a trial's settings may have caused. Any other, such as a full disk, would end the next trial too.
OF_THE_TRIAL = (
    NonFiniteLoss,
    OutOfMemory,
    Killed,
    Crashed,
    Stalled,
    DeadlineExceeded,
    BadConfig,
    BadModel,
    MissingExtra,
)
# A group has those of its trials too: trained by themselves, only the trial that caused one fails.
OF_THE_GROUP = (CannotGroup, *OF_THE_TRIAL)
