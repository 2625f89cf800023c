"""Publish a markdown report of each run: in the UI, and beside the run's record."""

from __future__ import annotations

import logging
from pathlib import Path

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import JsonValue

from loraflow.data.chats import GATE_SET
from loraflow.data.tokens.token_report import TokenReport
from loraflow.evaluation.values import Decision, scores_to_dict
from loraflow.execution.sweep import read_curves
from loraflow.execution.workspace import PipelineResult
from loraflow.failures import CorruptArtifact
from loraflow.registry.runs import RunRecord, RunSummary, read_run, run_ids, write_report
from loraflow.reporting.markdown import RunReport, drift_lines, run_report, scores_report
from loraflow.reporting.sections import History, Learned
from loraflow.stages import TRAIN, TRAIN_GROUP
from loraflow.store import Ref
from loraflow.tasks.run import Run
from loraflow.tasks.run_record import as_record, evaluation_report, model_scores
from loraflow.training.validation_loss import CURVES, Curves, curves_of_trial

log = logging.getLogger("loraflow")
EARLIER_RUNS = 5  # that the report shows
READ_RUNS = 50  # the newest records, among which they are looked for: a bucket reads each by itself


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_report(run: Run, result: PipelineResult, decision: Decision, summary: RunSummary) -> None:
    """Publish the report in the UI, and keep it beside the run's record."""
    recipe = run.workspace.recipe
    tuned = evaluation_report(run, result.tuned_scores)
    losses = read_curves(run.workspace.store, result.adapter)
    report = RunReport(
        summary=summary,
        decision=decision,
        scores=model_scores(run, result),
        confidence=recipe.evaluation.confidence,
        losses=losses.training if losses is not None else (),
        samples=tuned.samples[: recipe.evaluation.samples],
        base_answers={sample.id: sample.answer for sample in evaluation_report(run, result.base_scores).samples},
        confusions=tuned.confusions.get(GATE_SET, ()),
        learned=_learned(run, result.tokens),
        trial_curves=_trial_curves(run),
        history=_history(run, result),
        store=run.workspace.store.uri,
    )
    _publish(run, run_report(report), run_report(report, image=True), "report")


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_waiting(run: Run, why: str) -> None:
    """Publish the report of a retraining that waits for more data."""
    text = "\n".join([f"# {run.workspace.recipe.name}: waits for data", "", why, "", *drift_lines(run.drift)])
    _publish(run, text, text, "report")


@task(name="report", task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def publish_scores(run: Run, model: str, folder: Path, scores: Ref) -> dict[str, JsonValue]:
    """Publish the scores of one model, and return them."""
    report = evaluation_report(run, scores)
    metrics = report.metrics
    table = run.workspace.store.path(scores) / "scores.parquet"
    recipe = run.workspace.recipe
    confidence = recipe.evaluation.confidence
    text = scores_report(
        model,
        recipe.name,
        metrics,
        confidence=confidence,
        folder=str(folder),
        table=str(table),
        available=report.available,
        confusions=report.confusions,
    )
    _publish(run, text, text, "scores")
    return {"model": str(folder), "metrics": scores_to_dict(metrics), "uri": str(table.parent)}


def _history(run: Run, result: PipelineResult) -> History:
    """Return this run's record and those of the newest earlier runs of its recipe that had something to decide."""
    store, this = run.workspace.store, as_record(run, "done")
    earlier: list[RunRecord] = []
    for name in reversed(run_ids(store)[-READ_RUNS:]):
        try:
            record = read_run(store, name) if name != run.id else None
        except CorruptArtifact as failure:  # `loraflow verify` names it
            log.warning("the report leaves out a run. %s", failure)
            continue
        if record is None or record.summary is None or record.summary.decision is None:
            continue
        is_of_recipe = (record.recipe, record.model) == (this.recipe, this.model) and record.started <= this.started
        if is_of_recipe and record.summary.decision.verdict != "unchanged":
            earlier.append(record)
        if len(earlier) == EARLIER_RUNS:
            break
    source, md5 = run.workspace.recipe.data.source, store.manifest(result.dataset).figures.get("md5")
    return History(this, earlier, f"{source or 'data.sources'}, md5 {str(md5)[:12]}")


def _learned(run: Run, tokens: Ref) -> Learned:
    manifest = run.workspace.store.manifest(tokens)
    return Learned(manifest.figures, TokenReport.model_validate(manifest.report))


def _trial_curves(run: Run) -> dict[str, Curves]:
    """Return the losses of a sweep's trials; those whose log is damaged are left out."""
    found = {}
    for trial in run.sweep.trials if run.sweep else ():
        if trial.state != "failed":
            store, number = run.workspace.store, trial.group_number
            stage, name = (TRAIN, CURVES) if number is None else (TRAIN_GROUP, curves_of_trial(number))
            ref = Ref(stage=stage.name, fingerprint=trial.fingerprint, digest=trial.digest, uri=store.uri)
            curves = read_curves(store, ref, name)
            if curves is not None:
                found[trial.label] = curves
    return found


def _publish(run: Run, text: str, shown: str, what: str) -> None:
    key = f"{run.workspace.recipe.name}-{what}".replace("_", "-").replace(".", "-")
    try:
        write_report(run.workspace.store, run.id, text)
        create_markdown_artifact(markdown=shown, key=key)
    except Exception as error:  # the model is registered by now: a missing report must not undo that
        log.warning("the report could not be published: %s", error)
