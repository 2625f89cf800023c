"""Whether the gate can compare losses per token with the champion, before the training: not if its tokens are others."""

from __future__ import annotations

import io
import logging

from loraflow.execution.cache import look_up
from loraflow.execution.look_rows import checked_rows
from loraflow.execution.workspace import Workspace
from loraflow.failures import CorruptArtifact, DamagedLog
from loraflow.stages import EVALUATE, RESOLVE_BASE
from loraflow.store import Ref, read_intact

log = logging.getLogger("loraflow")


def warn_of_other_tokens(workspace: Workspace) -> None:
    """Log before the training what `token_lines` finds."""
    try:
        lines = token_lines(workspace)
    except DamagedLog:  # the run stops at it after the training, when it asks for the champion
        return
    for line in lines:
        log.warning("%s", line)


def token_lines(workspace: Workspace) -> list[str]:
    """Return a warning if the champion splits references into other tokens than the recipe's base, or may do so.

    It is certain where base and champion were scored on the recipe's rows. Otherwise only the files of tokenizer and chat
    template are compared. Empty if these are equal, if the gate compares no loss, or if base or champion are not in the
    store.
    """
    store, rules = workspace.store, workspace.recipe.gate
    named = {
        rules.primary,
        *rules.guards,
        *rules.worst,
        *(name for margins in rules.slices.values() for name in margins),
    }
    losses = [name for name, used in (("token_loss", named), ("loss", rules.forgetting)) if name in used]
    head = workspace.log.head() if losses else None
    base = look_up(store, workspace.job(RESOLVE_BASE, {})).ref if head else None
    if head is None or base is None:
        return []
    try:
        of_champion = store.manifest(head.merged).input_refs(store.uri).get("base")
        if of_champion is None or of_champion.facets.get("tokenizer") == base.facets.get("tokenizer"):
            return []
        differs = _rows_with_other_tokens(workspace, base, head.merged)
    except CorruptArtifact:  # the plan of the champion's scores says so
        return []
    if differs == 0:
        return []
    where = "gate.forgetting" if losses == ["loss"] else "gate"
    found = "has another tokenizer or chat template than the base"
    if differs is None:
        found += f": if it splits the references into other tokens, {where} refuses to compare {' and '.join(losses)}"
    else:
        found += f", and other tokens in {differs} references: {where} will refuse to compare {' and '.join(losses)}"
    return [f"champion: it {found}, after the training. Compare scores of answers, or set another register.model"]


def _rows_with_other_tokens(workspace: Workspace, base: Ref, champion: Ref) -> int | None:
    """Return in how many rows the references have other numbers of tokens; None if the models were not scored."""
    rows = checked_rows(workspace)
    models = () if rows is None else (base, champion)
    jobs = [workspace.job(EVALUATE, {"model": model, "rows": rows}) for model in models if rows is not None]
    scores = [look_up(workspace.store, job).ref for job in jobs]
    if not scores or None in scores:
        return None
    import pandas as pd

    from loraflow.evaluation.pairing import rows_with_other_tokens

    first, second = (
        pd.read_parquet(io.BytesIO(read_intact(workspace.store, ref, "scores.parquet"))).set_index("id").sort_index()
        for ref in scores
        if ref is not None
    )
    return rows_with_other_tokens(first, second, "champion")
