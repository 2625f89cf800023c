"""Parts of the gate's rows, such as short and long answers or the values of one of their fields, and their scores.

The scores describe, and decide nothing: with many parts some differ by chance, and each has few rows, so the intervals are
wide and not corrected. `guards.py` has the rules that decide.
"""

from __future__ import annotations

import bisect
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loraflow.data.checks.broken_text import script
from loraflow.data.checks.heldout_fields import NO_VALUE, FieldValues
from loraflow.evaluation.score import summarise
from loraflow.evaluation.values import MetricValue, Slice

if TYPE_CHECKING:
    import pandas as pd

NO_FIELDS: FieldValues = MappingProxyType({})
QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")


def last_message(prompt: str) -> str:
    """Return the last message of a prompt, which is a JSON list of messages."""
    try:
        return str(json.loads(prompt)[-1]["content"])
    except (ValueError, TypeError, KeyError, IndexError):
        return prompt


class Part(NamedTuple):
    """Some of the rows."""

    by: str  # length, script, or a field
    name: str
    ids: frozenset[str]

    def __str__(self) -> str:
        return f"{self.by} {self.name}"


def divide(table: pd.DataFrame, by: str, fields: FieldValues = NO_FIELDS) -> list[Part]:
    """Return the parts of a table's rows.

    Args:
        fields: the values of fields; rows that it lacks have no value.
    """
    ids: list[str] = list(table["id"])
    if by == "length":
        names = _lengths(table)
    elif by == "script":
        names = _scripts(table)
    else:
        names = [fields.get(row, {}).get(by, NO_VALUE) for row in ids]
    return [
        Part(by, name, frozenset(row for row, part in zip(ids, names, strict=True) if part == name))
        for name in _order(by, names)
    ]


def slice_scores(
    tables: Mapping[str, pd.DataFrame],
    by: Sequence[str],
    metrics: Sequence[str],
    *,
    confidence: float,
    fields: FieldValues = NO_FIELDS,
) -> list[Slice]:
    """Return the scores of each slice of the rows.

    Args:
        tables: {model: score table of the gate's set}; the slices are those of the first one, by row ids.
        by: what the rows are divided by: `length`, `script`, or a field.
    """
    first = next(iter(tables.values()))
    found: list[Slice] = []
    for kind in by:
        for part in divide(first, kind, fields):
            rows = {model: table[table["id"].isin(part.ids)] for model, table in tables.items()}
            values = {model: _chosen(summarise(table, confidence), metrics) for model, table in rows.items()}
            found.append(Slice(by=kind, name=part.name, rows=len(part.ids), values=values))
    return found


def _chosen(scores: Mapping[str, MetricValue], metrics: Sequence[str]) -> dict[str, MetricValue]:
    return {name: scores[name] for name in metrics if name in scores}


def _order(kind: str, names: Sequence[str]) -> list[str]:
    """Return the parts that have rows: quarters by length, others by their number of rows."""
    if kind == "length":
        return [name for name in QUARTERS if name in names]
    return [name for name, _ in sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))]


def _lengths(table: pd.DataFrame) -> list[str]:
    """Return for each row its quarter, by the reference's tokens; by its characters if tokens were not counted.

    Rows of equal length are in the same quarter, so quarters may differ in size.
    """
    tokens: list[int] = list(table["reference_tokens"])
    texts: list[str] = list(table["reference"])
    sizes = tokens if any(tokens) else [len(text) for text in texts]
    limits: list[float] = np.quantile(sizes, (0.25, 0.5, 0.75)).tolist()
    return [QUARTERS[bisect.bisect_left(limits, size)] for size in sizes]


def _scripts(table: pd.DataFrame) -> list[str]:
    return [script(last_message(prompt), min_letters=1) or "no letters" for prompt in table["prompt"]]
