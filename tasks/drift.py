"""Compare a run's training rows with those that the champion was trained on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from prefect import task
from prefect.cache_policies import NO_CACHE

from loraflow.data.checks.check_report import CheckReport, DataDrift, StoredSources, unchanged_rows
from loraflow.execution.workspace import Workspace
from loraflow.failures import Failure
from loraflow.registry.champions import lineage
from loraflow.stages import CHECK_DATASET
from loraflow.store import Ref, require_intact

if TYPE_CHECKING:
    from loraflow.data.checks.compare import CheckedRows

log = logging.getLogger("loraflow")


@task(name="drift", task_run_name="compare data", cache_policy=NO_CACHE, persist_result=False)
def compare_data(workspace: Workspace, rows: Ref) -> DataDrift | None:
    """Compare the rows of check_dataset with the champion's, and log what differs.

    None if there is no champion, or if its rows cannot be read any more.
    """
    head = workspace.log.head()
    if head is None:
        return None
    of_champion = {ref.stage: ref for ref in lineage(workspace.store, head)}
    if CHECK_DATASET.name not in of_champion:
        log.warning("the champion's training rows are no longer in the store, so the new rows are not compared")
        return None
    try:
        drift = _drift(workspace, of_champion[CHECK_DATASET.name], rows)
    except (Failure, OSError) as failure:  # a comparison must not stop the retraining
        log.warning("the training rows cannot be compared with the champion's. %s", failure)
        return None
    for line in drift.lines:
        log.info("since the champion: %s", line)
    return drift


def _drift(workspace: Workspace, before: Ref, after: Ref) -> DataDrift:
    from loraflow.data.checks.compare import measure_drift

    if before.facets.get("train") == after.facets.get("train") is not None:
        return unchanged_rows(_report(workspace, after))
    return measure_drift(_read(workspace, before), _read(workspace, after))


def _report(workspace: Workspace, rows: Ref) -> CheckReport:
    return CheckReport.model_validate(workspace.store.manifest(rows).report)


def _read(workspace: Workspace, rows: Ref) -> CheckedRows:
    """Read the training rows of check_dataset, and the fields that the rows of its dataset's files have."""
    from loraflow.data.checks.compare import CheckedRows, count_fields
    from loraflow.data.files.readers import match_files

    store = workspace.store
    found = CheckedRows(_report(workspace, rows))
    for name in ("train.jsonl", "validation.jsonl"):
        found.add(store.read(rows, name))
    dataset = store.manifest(rows).input_refs(store.uri)["dataset"]
    require_intact(store, dataset, workspace.memo)  # a damaged one must not decide whether to train
    folder = store.path(dataset) / "files"
    config = store.manifest(rows).payload["config"]
    sources = StoredSources.model_validate(config).sources
    for source in sources:
        for name in match_files(folder / source.name, source.files):
            count_fields(folder, f"{source.name}/{name}", found.version, source.query)
    for name in () if sources else match_files(folder, ["*"]):
        count_fields(folder, name, found.version)
    return found
