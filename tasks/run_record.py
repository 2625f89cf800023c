"""The record of a run in the store, `runs/<id>.json`, and the summary in it."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from prefect.exceptions import Pause, TerminationSignal
from prefect.runtime import flow_run

from loraflow import __version__
from loraflow.credentials import mask, mask_json
from loraflow.data.chats import GATE_SET
from loraflow.data.checks.check_report import CheckReport, DataDrift
from loraflow.data.versions.git import has_uncommitted_changes, head_commit
from loraflow.evaluation.power import HeldoutRows, advice
from loraflow.evaluation.values import EvaluationReport, ModelScores, Scores, SeedScores
from loraflow.execution.workspace import PipelineResult, Registration
from loraflow.failures import Failure
from loraflow.registry.log import actor
from loraflow.registry.runs import Publication, RecordedDecision, RowsSummary, RunRecord, RunState, RunSummary, find_run
from loraflow.reporting.rows import RowPolicy, summarise_rows, used_elsewhere
from loraflow.store import Ref
from loraflow.tasks.guards import heldout_slices

if TYPE_CHECKING:
    from loraflow.tasks.run import Run


def model_scores(run: Run, result: PipelineResult) -> ModelScores:
    """Return the scores of base, tuned model and champion."""
    champion = result.champion_scores
    return ModelScores(
        _with_general(run, result.base_scores, result.general.get("base")),
        _with_general(run, result.tuned_scores, result.general.get("tuned")),
        _with_general(run, champion, result.general.get("champion")) if champion else None,
    )


def _with_general(run: Run, scores: Ref, general: Ref | None) -> Scores:
    """Return the scores of a model on all sets, those of general rows last."""
    found = evaluation_report(run, scores).metrics
    return found if general is None else {**found, **evaluation_report(run, general).metrics}


def evaluation_report(run: Run, scores: Ref) -> EvaluationReport:
    """Return the report of an evaluation."""
    return EvaluationReport.model_validate(run.workspace.store.manifest(scores).report)


def rows_summary(run: Run, result: PipelineResult) -> RowsSummary:
    """Return what became of the dataset's rows."""
    store, recipe = run.workspace.store, run.workspace.recipe
    return summarise_rows(
        CheckReport.model_validate(store.manifest(result.rows).report),
        store.manifest(result.tokens).figures,
        evaluation_report(run, result.tuned_scores),
        RowPolicy(recipe.training_config.max_length, recipe.data.too_long, recipe.deals_rows, used_elsewhere(recipe)),
    )


def set_summary(run: Run, result: PipelineResult, registration: Registration) -> RunSummary:
    """Set and return the run's summary: the JSON document that `--json` prints, which is also part of the record."""
    store, decision = run.workspace.store, registration.decision
    run.summary = RunSummary(
        run=run.id,
        recipe=run.workspace.recipe.name,
        stages=list(run.stages.values()),
        rows=rows_summary(run, result),
        metrics=dict(vars(model_scores(run, result))),
        slices=heldout_slices(run.workspace, result),
        seeds=_seed_scores(run, result),
        drift=_with_base_loss(run, result),
        decision=RecordedDecision(verdict=decision.verdict, reasons=list(decision.reasons)),
        advice=advice(decision, heldout_rows(run, result)),
        registered=registration.entry,
        reserve=run.workspace.reserve,
        adapter=f"{store.location(result.adapter)}/adapter",
        merged=store.location(result.merged),
        sweep=run.sweep,
    )
    return run.summary


def heldout_rows(run: Run, result: PipelineResult) -> HeldoutRows:
    """Return how many held-out rows the gate's set has, and whether they are dealt to models."""
    check = CheckReport.model_validate(run.workspace.store.manifest(result.rows).report)
    return HeldoutRows(check.sets.get(GATE_SET, 0), run.workspace.recipe.deals_rows)


def _seed_scores(run: Run, result: PipelineResult) -> list[SeedScores]:
    """Return the scores of the models of gate.seeds; nothing if there is only one."""
    if not result.further_seeds:
        return []
    from loraflow.evaluation.seeds import seed_scores

    refs = {run.workspace.recipe.training_config.seed: result.tuned_scores}
    refs |= {further.seed: further.scores for further in result.further_seeds}
    return seed_scores({seed: evaluation_report(run, ref).metrics.get(GATE_SET, {}) for seed, ref in refs.items()})


def _with_base_loss(run: Run, result: PipelineResult) -> DataDrift | None:
    """Return how the data changed since the champion, with the base's loss on the held-out rows before and now."""
    drift, seen = run.drift, run.workspace.seen_head
    trained = find_run(run.workspace.store, seen.merged) if drift is not None and seen is not None else None
    if drift is None or trained is None or trained.summary is None or run.workspace.recipe.deals_rows:
        return drift  # with data.heldout_reserve, the base is scored on other rows in each run
    before = (trained.summary.metrics.get("base") or {}).get(GATE_SET, {}).get("token_loss")
    now = evaluation_report(run, result.base_scores).metrics.get(GATE_SET, {}).get("token_loss")
    if before is None or now is None or before == now:
        return drift
    line = f"the base's token_loss on the held-out rows: {before} → {now}"
    return drift.model_copy(update={"lines": [*drift.lines, line]})


def set_publication(run: Run, published: Publication | None) -> RunSummary:
    """Set the upload to the hub in the run's summary, and return the summary."""
    assert run.summary is not None
    run.summary = run.summary.model_copy(update={"published": published})
    return run.summary


def as_record(run: Run, state: RunState = "running", error: str | None = None) -> RunRecord:
    """Return the run's record as it is now."""
    return RunRecord(
        run=run.id,
        recipe=run.workspace.recipe.name,
        recipe_text=mask(run.recipe_file.text),
        overrides={key: mask_json(value) for key, value in run.recipe_file.overrides.items()},
        resolved=run.workspace.recipe.model_dump(by_alias=True, mode="json"),
        started=run.started,
        seconds=round(time.time() - run.started, 3),
        actor=actor(),
        loraflow=__version__,
        commit=head_commit(Path.cwd()),
        uncommitted=has_uncommitted_changes(Path.cwd()),
        prefect_run=str(flow_run.id) if flow_run.id else None,
        state=state,
        error=mask(error) if error else None,
        stages=list(run.stages.values()),
        summary=run.summary,
        promotion_head=run.workspace.log.last_seen,
        looks_head=run.workspace.looks.last_seen,
    )


def write_record(run: Run, error: BaseException | None) -> RunRecord:
    """Write and return the run's record. If the store cannot be written to, the run has already failed with that error."""
    if error is None:
        record = as_record(run, "done")
    elif isinstance(error, Pause):  # for a person's approval
        record = as_record(run, "waiting")
    else:
        record = as_record(run, "failed", error_line(error))
    with suppress(OSError, Failure):
        run.workspace.store.write_document(f"runs/{run.id}.json", record.document)
    return record


def error_line(error: BaseException) -> str:
    """Return the line of a run's record that says why the run did not end."""
    if isinstance(error, TerminationSignal) or (isinstance(error, SystemExit) and error.code == 143):
        return "Preempted: the run was asked to stop (SIGTERM); another run resumes"
    if isinstance(error, KeyboardInterrupt):
        return "KeyboardInterrupt: the run was interrupted (Ctrl-C); another run resumes"
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0]
