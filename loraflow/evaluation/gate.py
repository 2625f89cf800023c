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
        BadData: rows are missing or duplicated, or a score is not finite. Such scores are never compared in part.
        BadConfig: there is no score of this name.
    """
    rules = [_Rule(primary, min_gain, "gain"), *(_Rule(metric, -margin, "guard") for metric, margin in guards.items())]
    inverted = LOWER_IS_BETTER | set(lower_is_better or ())
    comparisons = []
    for name, other in others.items():
        pairs = _join(challenger, other, name)
        for rule in rules:
            differences = _differences(pairs, rule.metric, name, inverted)
            comparisons.append(_compare(rule, name, difference_bounds(differences, confidence, seed), len(pairs)))
    states = {comparison.state for comparison in comparisons}
    decisive = [comparison for comparison in comparisons if comparison.state != "passed"] or comparisons
    return Decision(
        verdict="reject" if "failed" in states else "undecided" if "open" in states else "promote",
        reasons=tuple(comparison.reason for comparison in decisive),
        comparisons=tuple(comparisons),
    )


def _join(challenger: pd.DataFrame, other: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return a table with a row per example; the other model's columns end in `_other`."""
    for label, table in (("challenger", challenger), (name, other)):
        if table["id"].duplicated().any():
            raise BadData("An example is duplicated in a score table.", where=label)
    pairs = challenger.merge(other, on="id", how="outer", suffixes=("", "_other"), indicator=True)
    unmatched = pairs[pairs["_merge"] != "both"]
    if len(unmatched) or not len(pairs):
        raise BadData(
            "Challenger and other model were not scored on the same examples.",
            where=name,
            expected=f"{len(challenger)} examples in common",
            got=f"{len(pairs) - len(unmatched)}",
            next_step="score them again with one protocol: `loraflow run --force evaluate`",
        )
    return pairs


def _differences(pairs: pd.DataFrame, metric: str, name: str, inverted: Collection[str]) -> np.ndarray:
    """Return the paired differences [rows], positive where the challenger is better."""
    if metric not in pairs or f"{metric}_other" not in pairs:
        from loraflow.evaluation.score import score_columns

        scored = [column for column in score_columns(pairs) if f"{column}_other" in pairs]
        raise BadConfig(
            "The gate names a score that does not exist.",
            where="gate",
            expected=f"one of {', '.join(scored)}",
            got=metric,
            next_step="correct gate.primary or gate.guards, or add the metric that gives this score to evaluation.metrics",
        )
    sign = -1.0 if metric in inverted else 1.0
    differences: np.ndarray = sign * (
        pairs[metric].to_numpy(dtype=float) - pairs[f"{metric}_other"].to_numpy(dtype=float)
    )
    if not np.isfinite(differences).all():
        raise BadData("A score is not a finite number.", where=f"{metric} of {name}")
    return differences


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
