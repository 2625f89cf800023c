"""Checks of what answers look like: a share of a set's rows must contain a text, match, be JSON with fields, or refuse.

They read the answers of the score tables, so a new check scores nothing again. Like `gate.worst` they are about the rows
that were scored, and need no level.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraflow.data.refusals import refuses
from loraflow.evaluation.pairing import refusal
from loraflow.evaluation.values import BehaviourResult, Decision, FailedRow
from loraflow.evaluation.worst import LISTED, cut, question
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class BehaviourRule:
    """One condition on the answers of a set, of which a share must meet it. Exactly one condition is set."""

    set: str
    share: float
    contains: tuple[str, ...] | None = None
    matches: str | None = None
    json_fields: tuple[str, ...] | None = None
    refuses: bool | None = None

    @property
    def condition(self) -> Callable[[str], bool]:
        """Tell whether an answer meets the condition."""
        if self.contains is not None:
            texts = [text.casefold() for text in self.contains]
            return lambda answer: all(text in answer.casefold() for text in texts)
        if self.matches is not None:
            pattern = re.compile(self.matches)
            return lambda answer: pattern.search(answer) is not None
        if self.json_fields is not None:
            fields = self.json_fields
            return lambda answer: _has_fields(answer, fields)
        wanted = bool(self.refuses)
        return lambda answer: refuses(answer) == wanted

    def __str__(self) -> str:
        if self.contains is not None:
            return f"contain {', '.join(map(repr, self.contains))}"
        if self.matches is not None:
            return f"match {self.matches!r}"
        if self.json_fields is not None:
            fields = ", ".join(self.json_fields)
            return f"are a JSON object with {fields}" if fields else "are a JSON object"
        return "refuse" if self.refuses else "do not refuse"


def check_behaviour(
    challenger: pd.DataFrame, others: Mapping[str, pd.DataFrame], rules: Mapping[str, BehaviourRule]
) -> tuple[BehaviourResult, ...]:
    """Check the challenger's answers; those of the other models are counted beside them.

    Args:
        challenger: a score table of all sets.
        others: {"base": table, "champion": table}.
        rules: by their names in the recipe.

    Raises:
        BadConfig: a set has no rows.
        BadData: the table has no answers.
    """
    return tuple(_check(name, rule, challenger, others) for name, rule in rules.items())


def with_behaviour(decision: Decision, found: tuple[BehaviourResult, ...]) -> Decision:
    """Return the decision with these results. One that does not hold rejects the challenger."""
    failed = tuple(one.reason for one in found if not one.holds)
    if not failed:
        return replace(decision, behaviour=found)
    others = () if decision.verdict == "promote" else decision.reasons
    return replace(decision, verdict="reject", reasons=(*failed, *others), behaviour=found)


def _check(
    name: str, rule: BehaviourRule, challenger: pd.DataFrame, others: Mapping[str, pd.DataFrame]
) -> BehaviourResult:
    meets = rule.condition
    rows = _rows_of(challenger, rule.set, name, "challenger")
    failed = [
        FailedRow(str(row_id), question(str(prompt)), cut(answer))
        for row_id, prompt, answer in zip(rows["id"], _prompts(rows), rows["answer"], strict=True)
        if not meets(answer)
    ]
    passed, total = len(rows) - len(failed), len(rows)
    counts = {
        other: int(sum(meets(answer) for answer in _rows_of(table, rule.set, name, other)["answer"]))
        for other, table in others.items()
    }
    beside = "".join(f", {other} {count}" for other, count in counts.items())
    reason = (
        f"behaviour {name}: {passed} of {total} answers of {rule.set} {rule}{beside}; a share of {rule.share:.4g} must"
    )
    return BehaviourResult(name, rule.set, passed, total, rule.share, reason, tuple(failed[:LISTED]))


def _rows_of(table: pd.DataFrame, name: str, check: str, where: str) -> pd.DataFrame:
    if "answer" not in table:
        raise refusal(
            "A score table has no answers.", where, "a column `answer`, for gate.behaviour", ", ".join(table.columns)
        )
    rows = table[table["set"] == name]
    if rows.empty:
        raise BadConfig(
            "A behaviour check names a set that has no rows.",
            where=f"gate.behaviour.{check}.set",
            expected=f"one of {', '.join(sorted(set(table['set'])))}",
            got=name,
            next_step="name `heldout`, or a set of data.extra_heldout",
        )
    return rows


def _prompts(rows: pd.DataFrame) -> list[str]:
    return [str(prompt) for prompt in rows["prompt"]] if "prompt" in rows else [""] * len(rows)


def _has_fields(answer: str, fields: tuple[str, ...]) -> bool:
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(field in value for field in fields)
