"""The trials of a sweep: run the stages that they share once, then train each. A trial that fails does not end the sweep."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loraflow.config.stage_configs import TrainConfig
from loraflow.execution.sweep import NOT_MEASURED, Trial, read_curves
from loraflow.execution.trial_groups import GroupResult, divide, read_result
from loraflow.failures import (
    BadConfig,
    BadData,
    BadModel,
    BadPlacement,
    CannotGroup,
    Crashed,
    DeadlineExceeded,
    Failure,
    Killed,
    MissingExtra,
    NonFiniteLoss,
    OutOfMemory,
    Stalled,
)
from loraflow.registry.sweeps import SweepRecord, TrialRecord, choose
from loraflow.stages import TRAIN, TRAIN_GROUP
from loraflow.store import Ref
from loraflow.tasks.run import Run, StageResult
from loraflow.tasks.stages import (
    check_dataset,
    check_rows,
    resolve_base,
    stage_task,
    tokenize,
    train_group,
    version_dataset,
)

log = logging.getLogger("loraflow")


@dataclass(frozen=True)
class TrialInputs:
    """What a trial trains on."""

    tokens: Ref
    base: Ref


@stage_task
def train_trial(run: Run, *, tokens: Ref, base: Ref, label: str) -> StageResult:
    """Train the adapter of one trial: the same stage, with the same artifact, as `train` in a run with its settings.

    Input: tokens, and the base model. Output: `adapter/` in PEFT's format. Work: `loraflow/training/train.py`.
    """
    return run.find_or_run(TRAIN, label, tokens=tokens, base=base)


def run_trials(run: Run, trials: Sequence[Trial]) -> SweepRecord:
    """Run all trials, in groups (`runtime.trials_together`) or one after another, and choose one by its validation loss.

    Raises:
        BadConfig: the trials' validation rows differ.
        BadData: there are no validation rows.
        Failure: all trials failed; or a failure that is not a trial's, such as a full disk.
    """
    records: dict[str, TrialRecord] = {}
    own = run.workspace
    try:
        inputs = _shared_stages(run, trials)
        refs = {label: {"tokens": found.tokens, "base": found.base} for label, found in inputs.items()}
        records |= run_groups(run, trials, refs)
        for number, trial in enumerate(trials, 1):
            if trial.label not in records:
                run.workspace = trial.workspace
                log.info("trial %d of %d: %s", number, len(trials), trial.label)
                records[trial.label] = _run_trial(run, trial, inputs[trial.label])
            loss = records[trial.label].loss
            if loss is not None:
                log.info("trial %d of %d: validation loss %.4f", number, len(trials), loss)
    finally:
        run.workspace = own  # the record of a sweep that ends here has the recipe, not a trial's
    return choose([records[trial.label] for trial in trials])


def _shared_stages(run: Run, trials: Sequence[Trial]) -> dict[str, TrialInputs]:
    """Run the stages before training, each once for the trials that share it, and compare the validation rows."""
    done: dict[tuple[str, str], Ref] = {}
    inputs: dict[str, TrialInputs] = {}
    for trial in trials:
        run.workspace = trial.workspace
        ids = trial.identities
        if (key := ("version_dataset", ids["version_dataset"])) not in done:
            done[key] = version_dataset(run)
        dataset = done[key]
        if (key := ("check_dataset", ids["check_dataset"])) not in done:
            done[key] = check_dataset(run, dataset=dataset)
            check_rows(run.workspace, done[key])
        rows = done[key]
        if (key := ("resolve_base", ids["resolve_base"])) not in done:
            done[key] = resolve_base(run)
        base = done[key]
        if (key := ("tokenize", ids["tokenize"])) not in done:
            done[key] = tokenize(run, rows=rows, base=base)
        inputs[trial.label] = TrialInputs(tokens=done[key], base=base)
    _require_same_validation(run, trials, inputs)
    return inputs


def _require_same_validation(run: Run, trials: Sequence[Trial], inputs: dict[str, TrialInputs]) -> None:
    """Refuse trials whose losses would be means over different tokens."""
    store, first = run.workspace.store, trials[0]

    def validation(tokens: Ref) -> dict[str, str]:
        files = store.manifest(tokens).files
        return {name: entry.sha256 for name, entry in files.items() if name.startswith("validation/")}

    expected = validation(inputs[first.label].tokens)
    if not expected:
        raise BadData(
            "The dataset has no validation rows, and a sweep chooses by their loss.",
            where=first.workspace.recipe.data.source,
            got=f"data.validation_fraction {first.workspace.recipe.data.validation_fraction:g} took none of the rows",
            next_step="raise data.validation_fraction, or add rows",
        )
    for trial in trials:
        if validation(inputs[trial.label].tokens) != expected:
            raise BadConfig(
                "The trials have different validation rows, so their losses cannot be compared.",
                where=trial.label,
                expected=f"the validation tokens of {first.label!r}",
                next_step="remove the keys from --grid that change the dataset, the tokenizer or the length of rows",
            )


def _run_trial(run: Run, trial: Trial, inputs: TrialInputs) -> TrialRecord:
    store = run.workspace.store
    try:
        ref = train_trial(run, tokens=inputs.tokens, base=inputs.base, label=trial.label)
        loss = validation_loss(run, ref)
        if loss is None:
            log.info("%s runs: %s", trial.label, NOT_MEASURED)
            run.recompute.add(ref.fingerprint)
            ref = train_trial(run, tokens=inputs.tokens, base=inputs.base, label=trial.label)
            loss = validation_loss(run, ref)
        if loss is None:
            raise Crashed(
                "A training ended without a validation loss.",
                where=store.location(ref),
                next_step="this is a bug in loraflow: report it, with the run's log",
            )
    except BadPlacement:  # no trial would find a worker
        raise
    except OF_THE_TRIAL as failure:
        log.warning("%s failed; the sweep continues. %s", trial.label, failure)
        return _recorded(trial, state="failed", problem=f"{type(failure).__name__}: {failure.what}")
    stage = run.stages[trial.label]
    return _recorded(
        trial,
        state=stage.state,
        loss=loss,
        seconds=store.manifest(ref).seconds,
        fingerprint=ref.fingerprint,
        digest=ref.digest,
    )


def validation_loss(run: Run, adapter: Ref) -> float | None:
    """Return the loss of an adapter on the validation rows; None if it was not measured."""
    curves = read_curves(run.workspace.store, adapter)
    config = TrainConfig.from_recipe(run.workspace.recipe, run.workspace)
    return None if curves is None else curves.validation_loss(config.training_config)


def refuse_if_all_failed(record: SweepRecord) -> str:
    """Return the label of the chosen trial.

    Raises:
        Failure: there is none. Its class is that of the trials' failures, if all failed in the same way.
    """
    if record.chosen is not None:
        return record.chosen
    kinds = {trial.problem.partition(":")[0] for trial in record.trials}
    classes = {cls.__name__: cls for cls in OF_THE_TRIAL}
    failure = classes.get(kinds.pop(), Failure) if len(kinds) == 1 else Failure
    problems = "".join(f"\n            {trial.label}: {trial.problem}" for trial in record.trials[:5])
    raise failure(
        f"All {len(record.trials)} trials failed.",
        where="loraflow sweep",
        got=f"the first problems:{problems}",
        next_step="run one of them by `loraflow run` with its settings, to see the full message",
    )


def run_groups(run: Run, trials: Sequence[Trial], inputs: Mapping[str, Mapping[str, Ref]]) -> dict[str, TrialRecord]:
    """Train the trials that can be trained together (`runtime.trials_together`); return their records by label.

    Each group is trained in one process over one base, and only measured: the losses choose a trial, which is trained by
    itself afterwards. A trial that cannot be in a group, or whose group cannot be trained, is left to `run_trials`. Trials
    that were in a group of an earlier sweep are not trained again, also if this sweep would make other groups.

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
    same = record.model_dump(exclude={"label", "settings", "seed", "state"})
    return _recorded(trial, state="failed" if record.problem else "cached", **same)


def group_labels(stages: Iterable[str]) -> set[str]:
    """Return the labels of groups among those of a run's stages."""
    return {label for label in stages if label.startswith(f"{TRAIN_GROUP} ")}


def note_loss_alone(record: SweepRecord, alone: float | None) -> SweepRecord:
    """Return a sweep's record with the validation loss of the chosen trial alone, if it was chosen by that in a group."""
    chosen = next(trial for trial in record.trials if trial.label == record.chosen)
    if chosen.group_number is None or alone is None or chosen.loss is None:
        return record
    note = f"trained alone, {chosen.label} has a validation loss of {alone:.4f}; in its group it had {chosen.loss:.4f}"
    log.info("%s", note)
    return record.model_copy(update={"notes": [*record.notes, note]})


def _run_group(run: Run, group: list[Trial], inputs: Mapping[str, Ref], label: str) -> dict[str, TrialRecord]:
    """Train a group, or its halves if the memory is not enough; return the records of the trials that were trained."""
    log.info("%s: %d trials in one pass", label, len(group))
    run.workspace = group[0].workspace.with_group(tuple(trial.config for trial in group))
    try:
        ref = train_group(run, tokens=inputs["tokens"], base=inputs["base"], label=label)
    except BadPlacement:  # no trial would find a worker
        raise
    except OF_THE_GROUP as failure:
        half = (len(group) + 1) // 2
        if not isinstance(failure, OutOfMemory | Killed) or half < 2:
            log.warning("%s: its trials are trained alone. %s", label, failure)
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
    return _recorded(
        trial,
        state="failed" if problem else state,
        loss=result.loss,
        seconds=None if problem or seconds is None else seconds / result.size,
        fingerprint=result.ref.fingerprint,
        digest=result.ref.digest,
        problem=problem,
        group_number=result.number,
    )


def _recorded(trial: Trial, **values: object) -> TrialRecord:
    own = {"label": trial.label, "settings": dict(trial.settings), "seed": trial.seed}
    return TrialRecord.model_validate({**own, **values})


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
