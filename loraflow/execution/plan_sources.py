"""The lines of a plan about the sources of a mixture (data.sources)."""

from __future__ import annotations

from loraflow.config.data_sources import DataSource
from loraflow.data.check_report import CheckReport
from loraflow.data.source_limits import source_lines
from loraflow.execution.cache import look_up
from loraflow.execution.workspace import Workspace
from loraflow.stages import CHECK_DATASET, VERSION_DATASET


def planned_sources(workspace: Workspace) -> list[str]:
    """Return a line for each source: its rows if they have been checked, otherwise where it is read."""
    sources = workspace.recipe.data.sources
    if not sources:
        return []
    dataset = look_up(workspace.store, workspace.job(VERSION_DATASET, {})).ref
    rows = look_up(workspace.store, workspace.job(CHECK_DATASET, {"dataset": dataset})).ref if dataset else None
    if rows is None:
        return [_line(source) for source in sources]
    return source_lines(CheckReport.model_validate(workspace.store.manifest(rows).report))


def _line(source: DataSource) -> str:
    settings = {
        "weight": None if source.weight == 1 else f"{source.weight:g}",
        "limit": source.limit,
        "split": source.split,
    }
    return f"source {source.key}: {source.source}" + "".join(f", {k} {v}" for k, v in settings.items() if v is not None)
