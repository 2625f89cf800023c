"""Guards for parts of the held-out rows (`gate.slices`) and for general rows (`gate.forgetting`).

No part, and no score of general rows, may get worse by more than its margin.

All parts must hold, so they need no correction, as other guards. A part with few rows leaves the decision open, and the
reason names the rows that it would need: a part that is too small to compare is not known to be as good as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from loraflow.evaluation.general import CHATS, CHOICES
from loraflow.evaluation.intervals import group_labels
from loraflow.evaluation.power import (
    MINIMUM_ROWS,
    PREFIX,
    is_too_strict,
    margin_of_unchanged,
    not_passed,
    rows_for_margin,
)
from loraflow.evaluation.slices import NO_FIELDS, Part, divide

if TYPE_CHECKING:
    import pandas as pd

    from loraflow.data.checks.heldout_fields import FieldValues


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
