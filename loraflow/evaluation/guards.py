"""Guards for parts of the held-out rows (`gate.slices`) and for general rows (`gate.forgetting`).

No part, and no score of general rows, may get worse by more than its margin. `advice` says what a person can do after the
verdict `undecided`.

All parts must hold, so they need no correction, as other guards. A part with few rows leaves the decision open, and the
reason names the rows that it would need: a part that is too small to compare is not known to be as good as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loraflow.evaluation.general import CHATS, CHOICES
from loraflow.evaluation.intervals import group_labels
from loraflow.evaluation.power import MINIMUM_ROWS, is_too_strict, margin_of_unchanged, not_passed, rows_for_margin
from loraflow.evaluation.slices import NO_FIELDS, Part, divide
from loraflow.evaluation.values import Comparison, Decision

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.data.heldout_fields import FieldValues


class SliceGuard(NamedTuple):
    """The largest drop of a metric that is accepted on a part of the rows."""

    part: Part
    metric: str
    margin: float


def slice_guards(
    table: pd.DataFrame, rules: Mapping[str, Mapping[str, float]], fields: FieldValues = NO_FIELDS
) -> list[SliceGuard]:
    """Return the guards of each part of the rows.

    Args:
        rules: {`length`, `script` or a field: {metric: margin}}.
    """
    return [
        SliceGuard(part, metric, margin)
        for by, margins in rules.items()
        for part in divide(table, by, fields)
        for metric, margin in margins.items()
    ]


def unscored_parts(everything: pd.DataFrame, scored: Set[str], by: Iterable[str], fields: FieldValues) -> list[str]:
    """Return the parts of the held-out rows of which no row was scored, by evaluation.max_rows or data.heldout_reserve.

    Quarters by length are quarters of the scored rows, so none of them is missing.

    Args:
        everything: id and prompt of all held-out rows of the gate's set.
    """
    return [
        f"{part} ({len(part.ids)} held-out row{'s' if len(part.ids) > 1 else ''})"
        for name in by
        if name != "length"
        for part in divide(everything, name, fields)
        if part.ids.isdisjoint(scored)
    ]


def partition_of(guards: Iterable[SliceGuard]) -> list[list[str]]:
    """Return the parts with their rows, as JSON values: a decision depends on them."""
    parts = {(guard.part.by, guard.part.name): guard.part.ids for guard in guards}
    return [[by, name, *sorted(ids)] for (by, name), ids in sorted(parts.items())]


def power_lines(
    parts: Mapping[str, Sequence[int]],
    margins: Mapping[str, float],
    confidence: float,
    reaches: Mapping[str, float],
) -> list[str]:
    """Return for people which guards even unchanged outputs do not pass, before anything is trained.

    Args:
        parts: {name of a part: rows of each of its groups}.
        reaches: the largest difference of each score that has one.
    """
    lines = []
    for name, sizes in parts.items():
        for metric, margin in margins.items():
            reach = reaches.get(metric)
            kind = "" if max(sizes, default=1) > 1 else metric
            needed = max(rows_for_margin(margin, confidence, kind, reach) or 0, MINIMUM_ROWS)
            unchanged = margin_of_unchanged(len(sizes), confidence, metric, reach, sizes)
            if len(sizes) < needed or is_too_strict(margin, unchanged):
                lines.append(not_passed(metric, f" on {name}", margin, needed, unchanged, sizes))
    return lines


# The set of rows of each score, and its column there.
SCORES = {
    "loss": (CHATS, "token_loss"),
    "accuracy": (CHOICES, "accuracy"),
    "accuracy_norm": (CHOICES, "accuracy_norm"),
}
PREFIX = "general_"  # these scores' names begin with it in the gate's reasons
Tables = Mapping[str, "pd.DataFrame"]  # one model's tables, by the name of the set


@dataclass(frozen=True)
class GeneralGuard:
    """A score on general rows that may get worse by at most `margin`."""

    name: str  # in reasons
    metric: str  # a column of the tables
    margin: float
    challenger: pd.DataFrame
    others: Mapping[str, pd.DataFrame]


def general_guards(
    margins: Mapping[str, float], challenger: Tables, others: Mapping[str, Tables]
) -> list[GeneralGuard]:
    """Return the guards of gate.forgetting.

    Args:
        margins: {score: how much worse it may get}.
    """
    found = []
    for score, margin in margins.items():
        rows, column = SCORES[score]
        tables = {name: tables[rows] for name, tables in others.items()}
        found.append(GeneralGuard(f"{PREFIX}{score}", column, margin, challenger[rows], tables))
    return found


def why_not_promoted(
    table: pd.DataFrame,
    parts: Sequence[SliceGuard],
    general: Sequence[GeneralGuard],
    unscored: Sequence[str],
) -> list[str]:
    """Return before a look why no scores of these rows can promote the challenger; nothing if some can.

    Only numbers of rows count here. A reason that depends on scores or answers, such as a check of behaviour that fails,
    uses a look: if only comparisons that may still promote did, their promotions would be wrong more often than
    `gate.error` says.
    """
    tables = {"held-out rows": table}
    tables |= {f"rows of {guard.part}": table[table["id"].isin(guard.part.ids)] for guard in parts}
    tables |= {f"rows of {guard.name}": guard.challenger for guard in general}
    independent = {name: len(set(group_labels(rows))) for name, rows in tables.items()}
    few = [
        f"{name}: {count} independent, and {MINIMUM_ROWS} are needed"
        for name, count in independent.items()
        if count < MINIMUM_ROWS
    ]
    return [*few, *(f"no row of {part} was scored" for part in unscored)]


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
            "on average, the models of all seeds are better, but the one that would be registered is not: train again, such "
            "as with another training_config.seed, which is a new look"
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
        return f"set gate.ranges: the smallest and largest value of {comparison.metric} (the training stays cached)"
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
