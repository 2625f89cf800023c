"""The trials of a sweep: run the stages that they share once, then train each. A trial that fails does not end the sweep."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from loraflow.execution.sweep import NOT_MEASURED, Trial, read_curves, training_config
from loraflow.failures import BadConfig, BadData, BadPlacement, Crashed, Failure
from loraflow.registry.sweeps import SweepRecord, TrialRecord, choose
from loraflow.stages import TRAIN
from loraflow.store import Ref
from loraflow.tasks.limits import check_rows
from loraflow.tasks.run import Run, StageResult
from loraflow.tasks.stage_task import stage_task
from loraflow.tasks.stages import check_dataset, resolve_base, tokenize, version_dataset
from loraflow.tasks.trial_groups import OF_THE_TRIAL, run_groups

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
    def record(**values: object) -> TrialRecord:
        known = {"label": trial.label, "settings": dict(trial.settings), "seed": trial.seed}
        return TrialRecord.model_validate({**known, **values})

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
        return record(state="failed", problem=f"{type(failure).__name__}: {failure.what}")
    stage = run.stages[trial.label]
    return record(
        state=stage.state,
        loss=loss,
        seconds=store.manifest(ref).seconds,
        fingerprint=ref.fingerprint,
        digest=ref.digest,
    )


def validation_loss(run: Run, adapter: Ref) -> float | None:
    """Return the loss of an adapter on the validation rows; None if it was not measured."""
    curves = read_curves(run.workspace.store, adapter)
    return None if curves is None else curves.validation_loss(training_config(run.workspace))


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
