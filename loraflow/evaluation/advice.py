"""What a person can do after the verdict `undecided`, by the claims that were inconclusive."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loraflow.evaluation.forgetting import PREFIX
from loraflow.evaluation.power import MINIMUM_ROWS
from loraflow.evaluation.values import Comparison, Decision

MORE = ", and add held-out rows"


@dataclass(frozen=True)
class HeldoutRows:
    """The held-out rows of a run."""

    available: int  # in the gate's set
    deals_rows: bool = False  # by data.heldout_reserve


def advice(decision: Decision, rows: HeldoutRows) -> list[str]:
    """Return what would decide, each step once; nothing for another verdict."""
    return list(dict.fromkeys(_steps(decision, rows))) if decision.verdict == "undecided" else []


def _steps(decision: Decision, rows: HeldoutRows) -> Iterator[str]:
    unsure = [comparison for comparison in decision.comparisons if comparison.state == "open"]
    most: dict[str, Comparison] = {}  # the same step for two claims: the one that needs more rows
    for comparison in unsure:
        step = _step(comparison, rows).replace(_about(comparison), "").replace(MORE, "")
        if step not in most or (comparison.rows_needed or 0) > (most[step].rows_needed or 0):
            most[step] = comparison
    for comparison in most.values():
        yield _step(comparison, rows)
    if decision.unscored:
        how = "a smaller data.heldout_reserve" if rows.deals_rows else "a larger evaluation.max_rows"
        yield f"score rows of {', '.join(decision.unscored)}: {how}, or more such rows"
    elif not unsure and len(decision.reasons) > 1:  # by gate.seeds
        yield (
            "the models of all seeds are better on average, but not the one that would be registered: another training, "
            "such as with another training_config.seed, is a new look"
        )
    elif not unsure:
        yield "run again: the stages are cached, and the gate compares with the new champion"


def _step(comparison: Comparison, rows: HeldoutRows) -> str:
    independent = comparison.n if comparison.groups is None else comparison.groups
    if comparison.metric.startswith(PREFIX):
        margin = f"or raise its margin in gate.forgetting, {comparison.metric.removeprefix(PREFIX)}"
        if comparison.rows_needed is None and independent >= MINIMUM_ROWS:
            return f"more rows would not confirm {comparison.metric}: train a model that forgets less, {margin}"
        return f"add rows to the file of evaluation.general{_about(comparison)}, {margin}"
    if comparison.level == 0:
        return "add held-out rows that were never scored: after the last look they get a new budget of error"
    if not comparison.has_known_range:
        return f"say between which numbers {comparison.metric} is: gate.ranges (the training stays cached)"
    if independent < MINIMUM_ROWS <= comparison.n:
        groups = f"these belong to {independent}, and {MINIMUM_ROWS} are needed"
        return f"add held-out rows of other groups (of near-duplicates, or of data.group): {groups}"
    if comparison.rows_needed is None and independent >= MINIMUM_ROWS:
        rule = "a smaller gate.min_gain" if comparison.kind == "gain" else f"a larger margin of {comparison.metric}"
        return f"more rows like these would not confirm {comparison.metric}: train a better model, or set {rule}"
    if comparison.part is not None:
        return f"add held-out rows of {comparison.part}{_about(comparison)}"
    if rows.deals_rows:
        return (
            f"score more rows in each look{_about(comparison)}: a smaller data.heldout_reserve, or more held-out rows"
        )
    if rows.available > comparison.n:
        more = "" if rows.available >= (comparison.rows_needed or 0) else MORE
        return f"raise evaluation.max_rows{more}{_about(comparison)}: there are {rows.available:,} held-out rows"
    return f"add held-out rows{_about(comparison)}"


def _about(comparison: Comparison) -> str:
    needed = max(comparison.rows_needed or 0, MINIMUM_ROWS)
    return f" (about {needed:,} are needed, {comparison.n:,} were scored)" if needed > comparison.n else ""
