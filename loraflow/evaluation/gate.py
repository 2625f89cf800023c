"""The gate: decide from per-example scores whether the challenger is promoted or rejected, with reasons.

A model is promoted if, against both base and champion, the primary metric improves by more than `min_gain` and no guard
metric gets worse by more than its margin. Both are tested with one-sided confidence bounds. If a test clearly fails, the
model is rejected. If the data cannot decide, the verdict is undecided.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from loraflow.data.chats import GATE_SET
from loraflow.evaluation.intervals import Bounds, difference_bounds
from loraflow.evaluation.metric_modules import LOWER_IS_BETTER
from loraflow.evaluation.values import Comparison, Decision
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class _Rule:
    """A test of one metric's paired differences: a gain must be above `bound`; a guard must not fall below it."""

    metric: str
    bound: float
    kind: Literal["gain", "guard"]

    def state(self, found: Bounds) -> Literal["passed", "failed", "open"]:
        # If all rows differ by the same amount, the mean and both bounds are that number. A guard's margin is inclusive:
        # a drop of exactly the margin passes. A gain of exactly `min_gain` does not.
        is_exactly_at_bound = found.lower >= self.bound and self.bound == found.mean
        if found.lower > self.bound or (self.kind == "guard" and is_exactly_at_bound):
            return "passed"
        if found.upper < self.bound or (self.kind == "gain" and found.upper <= self.bound):
            return "failed"
        return "open"

    def __str__(self) -> str:
        return f"gain over {self.bound:g}" if self.kind == "gain" else f"drop within {-self.bound:g}"


def decide(
    challenger: pd.DataFrame,
    others: Mapping[str, pd.DataFrame],
    *,
    primary: str,
    min_gain: float,
    guards: Mapping[str, float],
    confidence: float,
    seed: int = 0,
    lower_is_better: Collection[str] | None = None,
) -> Decision:
    """Compare score tables of one set, row by row.

    Args:
        challenger: a table with columns id and metrics.
        others: {"base": table, "champion": table}; a champion may be missing.
        primary: the metric that must gain by more than `min_gain`.
        guards: {metric: the largest drop that is accepted}.
        confidence: one-sided level of the bounds.
        seed: of the bootstrap.
        lower_is_better: metrics, in addition to loraflow's own, where lower is better.

    Raises:
        BadData: an id is missing, duplicated or not a text, the tables have different rows, or a score is not a finite
            number. Such scores are never compared in part.
        BadConfig: there is no score of this name.
    """
    rules = [_Rule(primary, min_gain, "gain"), *(_Rule(metric, -margin, "guard") for metric, margin in guards.items())]
    inverted = LOWER_IS_BETTER | set(lower_is_better or ())
    ours, comparisons = _by_id(challenger, "challenger"), []
    for name, other in others.items():
        theirs = _by_id(other, name)
        _require_same_rows(ours, theirs, name)
        for rule in rules:
            differences = _differences(ours, theirs, rule.metric, name, inverted)
            comparisons.append(_compare(rule, name, difference_bounds(differences, confidence, seed), len(ours)))
    states = {comparison.state for comparison in comparisons}
    decisive = [comparison for comparison in comparisons if comparison.state != "passed"] or comparisons
    return Decision(
        verdict="reject" if "failed" in states else "undecided" if "open" in states else "promote",
        reasons=tuple(comparison.reason for comparison in decisive),
        comparisons=tuple(comparisons),
    )


def heldout_rows(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the rows of a score table that the gate compares.

    Raises:
        BadData: a row's set is missing or not a text, or there are no such rows.
    """
    _require_texts(table, "set", where)
    rows = table[table["set"] == GATE_SET]
    if rows.empty:
        found = ", ".join(sorted(set(table["set"]))) or "no rows"
        raise _refusal("A score table has no rows that the gate compares.", where, f"rows of the set {GATE_SET}", found)
    return rows


def _by_id(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return a score table with its ids as the index, sorted."""
    if not table.columns.is_unique:
        repeated = ", ".join(sorted(set(table.columns[table.columns.duplicated()])))
        raise _refusal("A column is duplicated in a score table.", where, "each column once", repeated)
    _require_texts(table, "id", where)
    if table.empty:
        raise _refusal("A score table has no rows.", where, "a row for each held-out example", "no rows")
    repeated_ids = table["id"][table["id"].duplicated()]
    if len(repeated_ids):
        raise _refusal("An example is duplicated in a score table.", where, "each id once", str(repeated_ids.iloc[0]))
    return table.set_index("id").sort_index()


def _require_texts(table: pd.DataFrame, column: str, where: str) -> None:
    """Refuse a table with a missing or other value in a column of texts: such rows would be dropped, or join each other."""
    if column not in table:
        raise _refusal(
            f"A score table has no column `{column}`.", where, f"a column `{column}`", ", ".join(table.columns)
        )
    others = [value for value in table[column] if not isinstance(value, str)]
    if others:
        got = f"{others[0]!r} in {len(others)} of {len(table)} rows"
        raise _refusal(f"A row of a score table has no valid `{column}`.", where, "a text in every row", got)


def _require_same_rows(ours: pd.DataFrame, theirs: pd.DataFrame, name: str) -> None:
    common = ours.index.intersection(theirs.index)
    if not len(ours) == len(theirs) == len(common):
        raise _refusal(
            "Challenger and other model were not scored on the same examples.",
            name,
            f"{len(ours)} examples in common",
            str(len(common)),
        )
    if "set" in ours and "set" in theirs and not (ours["set"] == theirs["set"]).all():
        raise _refusal(
            "Challenger and other model have an example in different sets.", name, "equal sets", "other ones"
        )


def _refusal(what: str, where: str, expected: str, got: str) -> BadData:
    step = "score them again with one protocol: `loraflow run RECIPE --force evaluate`"
    return BadData(what, where=where, expected=expected, got=got, next_step=step)


def _differences(
    ours: pd.DataFrame, theirs: pd.DataFrame, metric: str, name: str, inverted: Collection[str]
) -> np.ndarray:
    """Return the paired differences [rows], positive where the challenger is better."""
    if metric not in ours or metric not in theirs:
        from loraflow.evaluation.score import score_columns

        scored = [column for column in score_columns(ours) if column in theirs]
        raise BadConfig(
            "The gate names a score that does not exist.",
            where="gate",
            expected=f"one of {', '.join(scored)}",
            got=metric,
            next_step="correct gate.primary or gate.guards, or add the metric that gives this score to evaluation.metrics",
        )
    sign = -1.0 if metric in inverted else 1.0
    differences: np.ndarray = sign * (_scores(ours, metric, "challenger") - _scores(theirs, metric, name))
    return differences


def _scores(table: pd.DataFrame, metric: str, where: str) -> np.ndarray:
    """Return the scores of a metric [rows]."""
    column = table[metric]
    if column.dtype.kind not in "biuf":
        raise _refusal("A score is not a number.", f"{metric} of {where}", "numbers", f"a column of {column.dtype}")
    scores: np.ndarray = column.to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(scores)
    if bad.any():
        got = f"{scores[bad][0]} in {bad.sum()} of {len(scores)} rows, the first of them {table.index[bad][0]}"
        raise _refusal("A score is not a finite number.", f"{metric} of {where}", "finite numbers", got)
    return scores


def _compare(rule: _Rule, name: str, found: Bounds, rows: int) -> Comparison:
    state = rule.state(found)
    outcome = {"passed": "confirmed", "failed": "refuted", "open": f"inconclusive with {rows} rows"}[state]
    return Comparison(
        against=name,
        metric=rule.metric,
        kind=rule.kind,
        difference=found.mean,
        lower=found.lower,
        upper=found.upper,
        n=rows,
        state=state,
        reason=f"{rule.metric} against {name}: {found.mean:+.4f} [{found.lower:+.4f}, {found.upper:+.4f}], "
        f"{rule} {outcome}",
    )
