"""Stop a run whose reports exceed a limit of the recipe. These checks are cheap and never cached."""

from __future__ import annotations

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from loraflow.execution.workspace import Workspace
from loraflow.reporting.rows import check_notes, used_elsewhere
from loraflow.store import Ref, read_intact

log = logging.getLogger("loraflow")


@task(name="check", task_run_name="check rows", cache_policy=NO_CACHE, persist_result=False)
def check_rows(workspace: Workspace, rows: Ref) -> None:
    """Stop the run if too many rows are malformed or near-duplicates are refused, or no row is left."""
    from loraflow.data.checks.check_report import CheckReport
    from loraflow.data.checks.row_limits import check_limits, refuse_findings

    report = workspace.store.manifest(rows).report
    where = f"{workspace.store.location(rows)}/report.json"
    for note in check_notes(CheckReport.model_validate(report), used_elsewhere(workspace.recipe)):
        log.warning("%s", note)
    refuse_findings(report, where)
    data = workspace.recipe.data
    refuse = data.near_duplicates == "refuse"
    check_limits(
        report,
        data.max_quarantined,
        where,
        data.source if not data.sources else "The mixture",
        refuse_near_leaks=refuse,
    )


@task(name="check", task_run_name="check merge", cache_policy=NO_CACHE, persist_result=False)
def check_merge(workspace: Workspace, verified: Ref) -> None:
    """Stop the run if the merged model differs too much from base and adapter (merge.max_kl)."""
    from loraflow.adapters import verify

    report = workspace.store.manifest(verified).report
    figures = {name: value for name, value in report.items() if isinstance(value, int | float)}
    verify.check_limits(figures, workspace.recipe.merge.max_kl)


@task(name="check", task_run_name="check general rows", cache_policy=NO_CACHE, persist_result=False)
def check_general_rows(workspace: Workspace, general: Ref) -> None:
    """Stop the run before training if the general rows are too few for gate.forgetting."""
    from loraflow.data.chats import GENERAL_FILE
    from loraflow.data.checks import general as rows
    from loraflow.evaluation.power import MINIMUM_ROWS

    if margins := workspace.recipe.gate.forgetting_margins:
        rows.check_limits(read_intact(workspace.store, general, GENERAL_FILE), margins, MINIMUM_ROWS)
