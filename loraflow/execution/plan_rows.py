"""What `loraflow plan` says about rows: the sources of a mixture, and which guards have too few rows to pass."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from loraflow.config.data_sources import DataSource
from loraflow.data.check_report import CheckReport
from loraflow.data.general import KINDS
from loraflow.data.heldout_fields import FILE, parse_field_values
from loraflow.data.source_limits import source_lines
from loraflow.evaluation.power import rows_for_margin, rows_that_rule_out
from loraflow.execution.cache import look_up
from loraflow.execution.look_rows import checked_rows, compared_rows, rows_of_a_look
from loraflow.execution.plan import vocabulary_of
from loraflow.execution.workspace import Workspace
from loraflow.stages import CHECK_GENERAL

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.evaluation.score import HeldoutRow


def slice_power_lines(workspace: Workspace) -> list[str]:
    """Return which guards of parts even an unchanged model does not pass; none if the rows are not in the store yet.

    Lengths are those of the references' characters, because nothing is tokenized yet.
    """
    recipe, store = workspace.recipe, workspace.store
    rules = recipe.gate.slices
    rows = checked_rows(workspace) if rules else None
    compared = rows_of_a_look(workspace, rows) if rows else []
    if rows is None or not compared:
        return []
    from loraflow.evaluation.guards import power_lines, unscored_parts
    from loraflow.evaluation.power import largest_differences
    from loraflow.evaluation.slices import divide

    fields = parse_field_values(store.read(rows, FILE)) if recipe.slice_fields else {}
    keys = {row.id: key for key, row in compared}
    table = _table([row for _, row in compared])
    everything = _table([row for _, row in compared_rows(store.read(rows, "heldout.jsonl"), None, 0)])
    reaches = largest_differences(math.log(vocabulary_of(workspace)), recipe.gate.score_ranges)
    found: list[str] = []
    for by, margins in rules.items():
        parts = {str(part): len({keys[row] for row in part.ids}) for part in divide(table, by, fields)}
        found += power_lines(parts, margins, recipe.gate.confidence, reaches)
    unscored = unscored_parts(everything, keys.keys(), rules, fields)
    return [*found, *(f"  {part}: no row is scored, so no model is promoted (gate.slices)" for part in unscored)]


def _table(rows: Sequence[HeldoutRow]) -> pd.DataFrame:
    """Return rows as a score table without scores."""
    import pandas as pd

    return pd.DataFrame(
        {
            "id": [row.id for row in rows],
            "prompt": [json.dumps(row.messages[:-1], ensure_ascii=False) for row in rows],
            "reference": [row.messages[-1]["content"] or "" for row in rows],
            "reference_tokens": 0,
        }
    )


def planned_sources(workspace: Workspace) -> list[str]:
    """Return a line for each source: its rows if they have been checked, otherwise where it is read."""
    sources = workspace.recipe.data.sources
    if not sources:
        return []
    rows = checked_rows(workspace)
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


def forgetting_lines(workspace: Workspace) -> list[str]:
    """Return for each score of gate.forgetting how many rows unchanged outputs need to pass, and how many there are.

    Empty if the recipe asks for nothing, or if the general rows are not in the store yet.
    """
    store, gate = workspace.store, workspace.recipe.gate
    rows = checked_rows(workspace) if gate.forgetting else None
    general = look_up(store, workspace.job(CHECK_GENERAL, {"rows": rows})).ref if rows else None
    return [] if general is None else list(_lines(workspace, store.manifest(general).figures))


def _lines(workspace: Workspace, counts: object) -> Iterator[str]:
    gate = workspace.recipe.gate
    found = counts if isinstance(counts, dict) else {}
    for score, margin in gate.forgetting.items():
        count = found.get(KINDS[score], 0)
        needed: int | None
        if score == "loss":
            needed = rows_that_rule_out(margin, gate.confidence, math.log(vocabulary_of(workspace)))
        else:
            needed = rows_for_margin(margin, gate.confidence, "accuracy")
        enough = isinstance(count, int) and needed is not None and count >= needed
        what = "unchanged outputs pass" if enough else "even unchanged outputs do not pass"
        yield f"  general_{score}: {what}: a margin of {margin:g} needs {needed} rows, you have {count}"
