"""The held-out rows that a run's gate will compare, for `loraflow plan`: those that evaluate will score."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from loraflow.data.chats import GATE_SET, ChatRecord, Message
from loraflow.data.row_key import row_key
from loraflow.execution.cache import look_up
from loraflow.execution.workspace import Workspace
from loraflow.stages import CHECK_DATASET, VERSION_DATASET
from loraflow.store import Ref

if TYPE_CHECKING:
    from loraflow.evaluation.score import HeldoutRow


def checked_rows(workspace: Workspace) -> Ref | None:
    """Return the artifact of check_dataset; None if it is not in the store yet."""
    dataset = look_up(workspace.store, workspace.job(VERSION_DATASET, {})).ref
    return look_up(workspace.store, workspace.job(CHECK_DATASET, {"dataset": dataset})).ref if dataset else None


def rows_of_a_look(workspace: Workspace, rows: Ref) -> list[tuple[str, HeldoutRow]]:
    """Return (key, row) for each row of the gate's set that will be scored.

    With data.heldout_reserve, `plan` has to find out which rows are dealt before.
    """
    scored = workspace.recipe.evaluation
    lines = workspace.store.read(rows, "heldout.jsonl")
    return compared_rows(lines, scored.max_rows, scored.seed, workspace.dealt)


def compared_rows(
    lines: bytes, max_rows: int | None, seed: int, dealt: Set[str] | None = None
) -> list[tuple[str, HeldoutRow]]:
    """Return (key, row) for each row of the gate's set in a heldout.jsonl that evaluate scores.

    Args:
        lines: the lines of the file.
        max_rows: evaluation.max_rows.
        seed: evaluation.seed.
        dealt: the keys of the rows that are dealt; None without data.heldout_reserve.
    """
    from loraflow.evaluation.score import sampled_rows

    texts = [text for text in lines.decode().split("\n") if text]
    if dealt is not None:  # deal_rows leaves out the others, before evaluate takes a sample
        texts = [text for text in texts if _is_dealt(json.loads(text), dealt)]
    rows, _ = sampled_rows(texts, max_rows, seed)
    return [(_key(row.messages), row) for row in rows if row.set == GATE_SET]


def _is_dealt(row: ChatRecord, dealt: Set[str]) -> bool:
    return row["set"] != GATE_SET or _key(row["messages"]) in dealt


def _key(messages: Sequence[Message]) -> str:
    return row_key(json.dumps(messages[:-1], ensure_ascii=False))
