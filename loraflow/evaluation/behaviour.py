"""Rules about single answers: what they must look like (`gate.behaviour`), and how many may get much worse (`gate.worst`).

A share of a set's rows must contain a text, match, be JSON with fields, or refuse. With `consistent`, rows of one group
(data.group) are paraphrases, and must have the same answer. And a mean can improve while a few answers become useless, so
`gate.worst` limits the number of these, and the report lists them.

Both read the score tables, so a new rule scores nothing again. They are about the rows that were scored, and need no level.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from loraflow.data.checks.findings import refuses
from loraflow.data.checks.split import CLUSTER
from loraflow.evaluation.gate import paired_rows
from loraflow.evaluation.label_scores import label
from loraflow.evaluation.pairing import gains, refusal, require_same_tokens, scores
from loraflow.evaluation.slices import last_message
from loraflow.evaluation.values import BehaviourResult, Decision, FailedRow, WorseRow, WorseRows
from loraflow.failures import BadConfig

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class BehaviourRule:
    """One condition on the answers of a set, of which a share must meet it. Exactly one condition is set."""

    set: str
    share: float
    contains: Sequence[str] | None = None
    matches: str | None = None
    json_fields: Sequence[str] | None = None
    refuses: bool | None = None
    consistent: bool | None = None

    def met_by(self, rows: pd.DataFrame) -> list[bool]:
        """Tell for each row of a set whether its answer meets the condition."""
        answers: list[str] = list(rows["answer"])
        if not self.consistent:
            return list(map(self.condition, answers))
        groups: list[str] = list(rows["group"])
        given: dict[str, set[str]] = {group: set() for group in groups}
        for group, answer in zip(groups, answers, strict=True):
            given[group].add(label(answer))
        return [len(given[group]) == 1 for group in groups]

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
        if self.consistent:
            return "are the same for all paraphrases"
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
        others: {"base": table, "champion": table}.

    Raises:
        BadConfig: a set has no rows.
        BadData: the table has no answers.
    """
    return tuple(_check(name, rule, challenger, others) for name, rule in rules.items())


def with_behaviour(decision: Decision, found: tuple[BehaviourResult, ...]) -> Decision:
    """Return the decision with these results. A result that does not hold rejects the challenger."""
    failed = [result.reason for result in found if not result.holds]
    return replace(decision.rejected_for(failed), behaviour=found)


def _check(
    name: str, rule: BehaviourRule, challenger: pd.DataFrame, others: Mapping[str, pd.DataFrame]
) -> BehaviourResult:
    rows = _rows_of(challenger, rule, name, "challenger")
    failed = [
        FailedRow(str(rows["id"].iloc[i]), question(text_of(rows, "prompt", i)), cut(text_of(rows, "answer", i)))
        for i, meets in enumerate(rule.met_by(rows))
        if not meets
    ]
    passed, total = len(rows) - len(failed), len(rows)
    counts = {other: sum(rule.met_by(_rows_of(table, rule, name, other))) for other, table in others.items()}
    beside = "".join(f", {other} {count}" for other, count in counts.items())
    reason = (
        f"behaviour {name}: {passed} of {total} answers of {rule.set} {rule}{beside}; a share of {rule.share:.4g} must"
    )
    return BehaviourResult(name, rule.set, passed, total, rule.share, reason, tuple(failed[:LISTED]))


def _rows_of(table: pd.DataFrame, rule: BehaviourRule, check: str, where: str) -> pd.DataFrame:
    if "answer" not in table:
        raise refusal(
            "A score table has no answers.", where, "a column `answer`, for gate.behaviour", ", ".join(table.columns)
        )
    rows = table[table["set"] == rule.set]
    if rows.empty:
        raise BadConfig(
            "A behaviour check names a set that has no rows.",
            where=f"gate.behaviour.{check}.set",
            expected=f"one of {', '.join(sorted(set(table['set'])))}",
            got=rule.set,
            next_step="name `heldout`, or a set of data.extra_heldout",
        )
    return _paraphrases(rows, check) if rule.consistent else rows


def _paraphrases(rows: pd.DataFrame, check: str) -> pd.DataFrame:
    """Return the rows of groups with several rows, sorted by group."""
    groups: list[object] = list(rows["group"]) if "group" in rows else []
    named = [
        (group, number)
        for number, group in enumerate(groups)
        if isinstance(group, str) and not group.startswith(CLUSTER)
    ]
    sizes = Counter(group for group, _ in named)
    found = [number for group, number in sorted(named) if sizes[group] > 1]
    if not found:
        raise BadConfig(
            "A behaviour check compares answers to paraphrases, but no two rows are paraphrases.",
            where=f"gate.behaviour.{check}.consistent",
            expected="rows with the same value of the field that data.group names",
            got="no two rows of a group" if groups else "rows without a group",
            next_step="set data.group to a field that is the same in all paraphrases of a question, and remove "
            "evaluation.max_rows: a sample may have only one row of a group",
        )
    return rows.iloc[found]


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN or Infinity, which Python reads and other parsers of JSON do not


def _has_fields(answer: str, fields: Sequence[str]) -> bool:
    try:
        value = json.loads(answer, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and all(field in value for field in fields)


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
        others: {"base": table, "champion": table}, of the same rows.

    Raises:
        BadData: a score is not a finite number.
        BadConfig: there is no score of this name, or it is a loss per token of different tokens.
    """
    return tuple(
        _worse(rows, other_rows, name, metric, limit, lower_is_better)
        for name, rows, other_rows in paired_rows(challenger, others)
        for metric, limit in limits.items()
    )


def with_worse_rows(decision: Decision, found: tuple[WorseRows, ...]) -> Decision:
    """Return the decision with these rows. Too many of them reject the challenger."""
    failed = [rows.reason for rows in found if not rows.holds]
    return replace(decision.rejected_for(failed), worse=found)


def _worse(
    challenger_rows: pd.DataFrame,
    other_rows: pd.DataFrame,
    name: str,
    metric: str,
    limit: WorseLimit,
    lower_is_better: Collection[str],
) -> WorseRows:
    mine, other = scores(challenger_rows, metric, "challenger"), scores(other_rows, metric, name)
    if metric == "token_loss":
        require_same_tokens(challenger_rows, other_rows, name)
    drops = gains(other, mine, metric, lower_is_better)
    order = np.argsort(-drops, kind="stable")
    count = int((drops >= limit.drop - _ROUNDING).sum())
    allowed = limit.of(len(challenger_rows))
    worst = [
        WorseRow(
            str(challenger_rows.index[i]),
            float(mine[i]),
            float(other[i]),
            question(text_of(challenger_rows, "prompt", int(i))),
            cut(text_of(challenger_rows, "answer", int(i))),
        )
        for i in order[: min(count, LISTED)]
    ]
    reason = (
        f"{metric} against {name}: {count} of {len(challenger_rows)} rows got worse by {limit.drop:g} or more, {allowed} "
        "allowed"
        f"{'' if count <= allowed else ': ' + ', '.join(row.id for row in worst[:5])}"
    )
    return WorseRows(name, metric, limit.drop, count, allowed, reason, tuple(worst))


def question(prompt: str) -> str:
    """Return the last message of a prompt, which is a JSON list of messages; cut."""
    return cut(last_message(prompt))


def cut(text: str) -> str:
    """Return the beginning of a text."""
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def text_of(table: pd.DataFrame, column: str, row: int) -> str:
    """Return a text of a row by its position; nothing if there is no such column."""
    return str(table[column].iloc[row]) if column in table else ""
