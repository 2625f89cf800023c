"""The gate: per-example scores of base, champion and challenger → promote, reject or undecided, with reasons.

The primary metric must gain, each guard must not lose more than its margin, against base and champion. A claim
counts when its one-sided bound says so: "not proven worse" is no reason to promote.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from loraflow.evaluation.intervals import difference_bounds
from loraflow.evaluation.metric_modules import LOWER_IS_BETTER
from loraflow.evaluation.values import Decision
from loraflow.failures import BadConfig, BadData


def decide(
    challenger: Any,
    others: dict[str, Any],
    *,
    primary: str,
    min_gain: float,
    guards: dict[str, float],
    confidence: float,
    seed: int = 0,
    lower_is_better: list[str] | None = None,
) -> Decision:
    """Compare score tables of one set, row by row.

    Args:
        challenger: a table with columns id and metrics.
        others: {"base": table, "champion": table}; a champion may be missing.
        primary: the metric that must gain by more than `min_gain`.
        guards: {metric: the loss it may show}.
        confidence: one-sided level of the bounds.
        seed: of the bootstrap.
        lower_is_better: metrics, beside ours, of which less is better.

    Raises:
        BadData: rows are missing, stand twice, or a score is no number: nothing is decided on a part.
        BadConfig: a metric was not scored.
    """
    rows, states = [], []
    for name, other in others.items():
        pairs = _join(challenger, other, name)
        for metric, bound, kind in [
            (primary, min_gain, "gain"),
            *((m, -margin, "guard") for m, margin in guards.items()),
        ]:
            row = _compare(
                pairs, metric, bound, kind, name, confidence, seed, LOWER_IS_BETTER | set(lower_is_better or [])
            )
            rows.append(row)
            states.append(row["state"])
    reasons = [row["reason"] for row in rows if row["state"] != "passed"] or [row["reason"] for row in rows]
    if "failed" in states:
        return Decision("reject", reasons, rows)
    return Decision("undecided" if "open" in states else "promote", reasons, rows)


def _join(challenger: Any, other: Any, name: str) -> Any:
    for label, table in (("challenger", challenger), (name, other)):
        if table["id"].duplicated().any():
            raise BadData("An example stands twice in a score table.", where=label)
    pairs = challenger.merge(other, on="id", how="outer", suffixes=("", "_other"), indicator=True)
    lost = pairs[pairs["_merge"] != "both"]
    if len(lost) or not len(pairs):
        raise BadData(
            "Challenger and other were not scored on the same examples.",
            where=name,
            expected=f"{len(challenger)} examples in common",
            got=f"{len(pairs) - len(lost)}",
            next_step="score them again with one protocol: `loraflow run --force evaluate`",
        )
    return pairs


def _compare(
    pairs: Any, metric: str, bound: float, kind: str, name: str, confidence: float, seed: int, lower_is_better: set[str]
) -> dict[str, Any]:
    if metric not in pairs or f"{metric}_other" not in pairs:
        raise BadConfig(
            "The gate names a metric that was not scored.",
            where="gate",
            expected="a metric of evaluation.metrics",
            got=metric,
            next_step="add its module to evaluation.metrics",
        )
    sign = -1.0 if metric in lower_is_better else 1.0
    differences = sign * (pairs[metric].to_numpy(dtype=float) - pairs[f"{metric}_other"].to_numpy(dtype=float))
    if not np.isfinite(differences).all():
        raise BadData("A score is no number.", where=f"{metric} of {name}")
    mean, lower, upper = difference_bounds(differences, confidence, seed)
    # A guard passes when its loss is surely within the margin, the primary when its gain is surely above the bound.
    passed = lower > bound or (kind == "guard" and lower >= bound and bound == mean)
    state = "passed" if passed else "failed" if upper < bound or (kind == "gain" and upper <= bound) else "open"
    what = f"gain over {bound:g}" if kind == "gain" else f"loss within {-bound:g}"
    said = {"passed": "shown", "failed": "ruled out", "open": f"not shown with {len(pairs)} rows"}[state]
    return {
        "against": name,
        "metric": metric,
        "kind": kind,
        "difference": mean,
        "lower": lower,
        "upper": upper,
        "n": len(pairs),
        "state": state,
        "reason": f"{metric} against {name}: {mean:+.4f} [{lower:+.4f}, {upper:+.4f}], {what} {said}",
    }
