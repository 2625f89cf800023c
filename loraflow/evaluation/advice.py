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
    unsure = [one for one in decision.comparisons if one.state == "open"]
    most: dict[str, Comparison] = {}  # the same step for two claims: the one that needs more rows
    for one in unsure:
        step = _step(one, rows).replace(_about(one), "").replace(MORE, "")
        if step not in most or (one.rows_needed or 0) > (most[step].rows_needed or 0):
            most[step] = one
    for one in most.values():
        yield _step(one, rows)
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


def _step(one: Comparison, rows: HeldoutRows) -> str:
    independent = one.n if one.groups is None else one.groups
    if one.metric.startswith(PREFIX):
        margin = f"or raise its margin in gate.forgetting, {one.metric.removeprefix(PREFIX)}"
        if one.rows_needed is None and independent >= MINIMUM_ROWS:
            return f"more rows would not confirm {one.metric}: train a model that forgets less, {margin}"
        return f"add rows to the file of evaluation.general{_about(one)}, {margin}"
    if one.level == 0:
        return "add held-out rows that were never scored: after the last look they get a new budget of error"
    if independent < MINIMUM_ROWS <= one.n:
        return f"add held-out rows of other groups: these are of {independent}, and {MINIMUM_ROWS} are the least"
    if one.rows_needed is None and independent >= MINIMUM_ROWS:
        rule = "a smaller gate.min_gain" if one.kind == "gain" else f"a larger margin of {one.metric}"
        return f"more rows like these would not confirm {one.metric}: train a better model, or set {rule}"
    if one.part is not None:
        return f"add held-out rows of {one.part}{_about(one)}"
    if rows.deals_rows:
        return f"score more rows in each look{_about(one)}: a smaller data.heldout_reserve, or more held-out rows"
    if rows.available > one.n:
        more = "" if rows.available >= (one.rows_needed or 0) else MORE
        return f"raise evaluation.max_rows{more}{_about(one)}: there are {rows.available:,} held-out rows"
    return f"add held-out rows{_about(one)}"


def _about(one: Comparison) -> str:
    needed = max(one.rows_needed or 0, MINIMUM_ROWS)
    return f" (about {needed:,} are needed, {one.n:,} were scored)" if needed > one.n else ""
