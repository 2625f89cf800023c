"""The held-out rows of a run: deal rows to its model (data.heldout_reserve), and say which rows evaluate will score."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

from loraflow.config.load import parse_recipe
from loraflow.data.chats import GATE_SET
from loraflow.data.checks.split import chat_key
from loraflow.execution.cache import look_up
from loraflow.execution.workspace import Workspace
from loraflow.failures import Failure
from loraflow.registry.deals import DealRecord, DealRequest, DealtRows
from loraflow.registry.log import actor
from loraflow.registry.rebuild import revision_of
from loraflow.registry.reserve import read_rows
from loraflow.registry.runs import RunRecord, StageRun
from loraflow.stages import CHECK_DATASET, DEAL_ROWS, MERGE, VERSION_DATASET
from loraflow.store import Ref, Store, read_intact

if TYPE_CHECKING:
    from loraflow.evaluation.score import HeldoutRow


def deal_heldout(workspace: Workspace, rows: Ref, merged: Ref) -> DealtRows:
    """Deal held-out rows to a model, unless it has its rows already. The workspace's next jobs are about these rows.

    Raises:
        BadConfig: no row is left for a look.
        DamagedLog: the record of looks or of deals is damaged.
    """
    heldout = read_rows(read_intact(workspace.store, rows, "heldout.jsonl"))
    dealt = _record(workspace).take(
        merged.digest, heldout, workspace.looks.scored_keys, _request(workspace), actor=actor()
    )
    workspace.dealt, workspace.reserve = dealt.keys, dealt.state
    return dealt


def preview_heldout(workspace: Workspace, rows: Ref, merged: Ref | None) -> DealtRows:
    """Return what `deal_heldout` would, without dealing; `merged` is None if the model is not trained yet.

    Raises:
        BadConfig: no row is left for a look.
        DamagedLog: the record of looks or of deals is damaged.
    """
    heldout = read_rows(workspace.store.read(rows, "heldout.jsonl"))
    challenger = None if merged is None else merged.digest
    dealt = _record(workspace).preview(challenger, heldout, workspace.looks.scored_keys, _request(workspace))
    workspace.dealt, workspace.reserve = dealt.keys, dealt.state
    return dealt


def deal_for_scores(workspace: Workspace, rows: Ref, model: Ref) -> None:
    """Choose rows to score a model on without a look: rows that were dealt before, so that the reserve stays unseen.

    If no rows were dealt yet, the model is dealt some.

    Raises:
        BadConfig: no row is left for a look.
        DamagedLog: the record of looks or of deals is damaged.
    """
    heldout = read_rows(read_intact(workspace.store, rows, "heldout.jsonl"))
    workspace.dealt = _record(workspace).for_scores(model.digest, heldout)
    if workspace.dealt is None:
        deal_heldout(workspace, rows, model)


def use_dealt_rows(workspace: Workspace, store: Store, merged: str, recorded: StageRun | None = None) -> None:
    """Score models on the rows that a model was dealt before, such as those of an earlier run.

    A model can be dealt rows more than once, if the dataset or evaluation.max_rows changed.

    Args:
        workspace: whose next jobs are about these rows; without data.heldout_reserve, nothing changes.
        recorded: deal_rows in that run. Without it, or if its artifact is gone, the model's last deal counts.

    Raises:
        DamagedLog: the record of deals is damaged.
    """
    recipe = workspace.recipe
    if recipe.data.heldout_reserve is None:
        return
    workspace.dealt = _dealt_to(store, recorded) if recorded else None
    if workspace.dealt is None:
        record = DealRecord(store, recipe.register_.model)
        workspace.dealt = record.of_model(merged, recipe.data.heldout_reserve)


def recorded_workspace(store: Store, record: RunRecord, uri: str) -> Workspace:
    """Return the workspace of a recorded run, with another store.

    Args:
        store: has the record, and the record of deals.
        uri: the store in which the workspace computes.

    Raises:
        BadConfig: the recorded recipe is not valid today.
        DamagedLog: the record of deals is damaged.
    """
    settings = {**record.overrides, **revision_of(store, record), "runtime.store": uri}
    name = f"the recipe of run {record.run}"
    workspace = Workspace(parse_recipe(record.recipe_text, name=name, overrides=settings, is_recorded=True))
    merged = record.stage(MERGE.name)
    if merged is not None:
        use_dealt_rows(workspace, store, merged.digest, record.stage(DEAL_ROWS.name))
    return workspace


def _dealt_to(store: Store, recorded: StageRun) -> frozenset[str] | None:
    """Return the keys of the rows in an artifact of deal_rows; None if the artifact is gone or damaged."""
    try:
        config = store.manifest(recorded.ref(store)).payload.get("config")
    except Failure:
        return None
    keys = config.get("keys") if isinstance(config, dict) else None
    return frozenset(map(str, keys)) if isinstance(keys, list) else None


def _record(workspace: Workspace) -> DealRecord:
    return DealRecord(workspace.store, workspace.recipe.register_.model)


def _request(workspace: Workspace) -> DealRequest:
    recipe = workspace.recipe
    assert recipe.data.heldout_reserve is not None
    return DealRequest(recipe.data.heldout_reserve, recipe.evaluation.max_rows, recipe.data.seed)


def checked_rows(workspace: Workspace) -> Ref | None:
    """Return the artifact of check_dataset; None if it is not in the store yet."""
    dataset = look_up(workspace.store, workspace.job(VERSION_DATASET, {})).ref
    return look_up(workspace.store, workspace.job(CHECK_DATASET, {"dataset": dataset})).ref if dataset else None


def rows_of_a_look(workspace: Workspace, rows: Ref) -> list[tuple[str, HeldoutRow]]:
    """Return (key, row) for each row of the gate's set that will be scored.

    With data.heldout_reserve, call `preview_heldout` first: it chooses the rows.
    """
    scored = workspace.recipe.evaluation
    lines = workspace.store.read(rows, "heldout.jsonl")
    return compared_rows(lines, scored.max_rows, scored.seed, workspace.dealt)


def compared_rows(
    lines: bytes, max_rows: int | None, seed: int, dealt: Set[str] | None = None
) -> list[tuple[str, HeldoutRow]]:
    """Return (key, row) for each row of the gate's set in a heldout.jsonl that evaluate scores."""
    from loraflow.evaluation.score import sampled_rows

    texts = [text for text in lines.decode().split("\n") if text]
    if dealt is not None:  # deal_rows leaves out the others, before evaluate takes a sample
        texts = [
            text for text in texts if (row := json.loads(text))["set"] != GATE_SET or chat_key(row["messages"]) in dealt
        ]
    rows, _ = sampled_rows(texts, max_rows, seed)
    return [(chat_key(row.messages), row) for row in rows if row.set == GATE_SET]


def group_sizes(rows: Sequence[HeldoutRow]) -> list[int]:
    """Return the rows of each group of rows that depend on each other, as the gate forms them: by `group` and by prompt."""
    prompts = [json.dumps(row.messages[:-1], ensure_ascii=False) for row in rows]
    if not any(row.group for row in rows):
        return list(Counter(prompts).values())
    import pandas as pd

    from loraflow.evaluation.intervals import group_labels

    labels = group_labels(pd.DataFrame({"group": [row.group for row in rows], "prompt": prompts}))
    return list(Counter(labels.tolist()).values())
