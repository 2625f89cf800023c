"""How many rows get much worse: `gate.worst` limits their number, and the report lists them.

A mean can improve while a few answers become useless. This rule is about the rows that were scored: it counts them, and
needs no level.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loraflow.evaluation.metric_modules import LOWER_IS_BETTER
from loraflow.evaluation.pairing import require_same_tokens, scores
from loraflow.evaluation.values import Decision, WorseRow, WorseRows

if TYPE_CHECKING:
    import pandas as pd

LISTED = 20  # rows of each rule and model, the worst first
_SHOWN = 200  # characters of a question or an answer
_ROUNDING = 1e-9  # a drop of 0.9 - 0.4 counts as 0.5


class WorseLimit(NamedTuple):
    """How many rows may lose at least `drop` points; the number is `rows`, or this share of the rows."""

    drop: float
    rows: int | None = None
    share: float | None = None

    def of(self, total: int) -> int:
        """Return the number of rows that may get worse, of this many."""
        return self.rows if self.rows is not None else int((self.share or 0.0) * total + _ROUNDING)


def find_worse(
    challenger: pd.DataFrame,
    others: Mapping[str, pd.DataFrame],
    limits: Mapping[str, WorseLimit],
    lower_is_better: Collection[str] = (),
) -> tuple[WorseRows, ...]:
    """Return for each metric and model the rows that got worse by at least the limit's drop.

    Args:
        challenger: a score table; see `decide`.
        others: {"base": table, "champion": table}, of the same rows.
        limits: of each metric.
        lower_is_better: metrics, in addition to loraflow's own, where lower is better.

    Raises:
        BadData: a score is not a finite number.
        BadConfig: there is no score of this name, or it is a loss per token of different tokens.
    """
    ours = challenger.set_index("id").sort_index()
    return tuple(
        _worse(ours, other.set_index("id").sort_index(), name, metric, limit, metric in lower_is_better)
        for name, other in others.items()
        for metric, limit in limits.items()
    )


def with_worse_rows(decision: Decision, found: tuple[WorseRows, ...]) -> Decision:
    """Return the decision with these rows. Too many of them reject the challenger."""
    failed = [rows.reason for rows in found if not rows.holds]
    return replace(decision.rejected_for(failed), worse=found)


def _worse(
    ours: pd.DataFrame, theirs: pd.DataFrame, name: str, metric: str, limit: WorseLimit, is_lower_better: bool
) -> WorseRows:
    sign = -1.0 if is_lower_better or metric in LOWER_IS_BETTER else 1.0
    mine, other = scores(ours, metric, "challenger"), scores(theirs, metric, name)
    if metric == "token_loss":
        require_same_tokens(ours, theirs, name)
    drops = sign * (other - mine)
    order = np.argsort(-drops, kind="stable")
    count = int((drops >= limit.drop - _ROUNDING).sum())
    allowed = limit.of(len(ours))
    worst = [
        WorseRow(
            str(ours.index[i]),
            float(mine[i]),
            float(other[i]),
            question(_text(ours, "prompt", int(i))),
            cut(_text(ours, "answer", int(i))),
        )
        for i in order[: min(count, LISTED)]
    ]
    reason = (
        f"{metric} against {name}: {count} of {len(ours)} rows got worse by {limit.drop:g} or more, {allowed} allowed"
        f"{'' if count <= allowed else ': ' + ', '.join(row.id for row in worst[:5])}"
    )
    return WorseRows(name, metric, limit.drop, count, allowed, reason, tuple(worst))


def question(prompt: str) -> str:
    """Return the last message of a prompt, which is a JSON list of messages; cut."""
    try:
        return cut(str(json.loads(prompt)[-1]["content"]))
    except (ValueError, TypeError, KeyError, IndexError):
        return cut(prompt)


def cut(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _text(table: pd.DataFrame, column: str, row: int) -> str:
    return str(table[column].iloc[row]) if column in table else ""
