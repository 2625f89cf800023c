"""Scores of parts of the gate's rows, such as short and long answers: they describe, and decide nothing.

With many slices some differ by chance, and each has few rows, so the intervals are wide and not corrected.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from pydantic import JsonValue, TypeAdapter

from loraflow.data.broken_text import script
from loraflow.evaluation.score import summarise
from loraflow.evaluation.values import MetricValue
from loraflow.frozen import StoredModel

if TYPE_CHECKING:
    import pandas as pd

SliceBy = Literal["length", "script"]
QUARTERS = ("shortest quarter", "second quarter", "third quarter", "longest quarter")


class _Message(StoredModel):
    content: JsonValue = ""  # as check_dataset wrote it


_PROMPT = TypeAdapter(list[_Message])


class Slice(NamedTuple):
    """The scores of some rows."""

    by: SliceBy
    name: str
    rows: int
    values: Mapping[str, Mapping[str, MetricValue]]  # model → metric → value


def slice_scores(
    tables: Mapping[str, pd.DataFrame],
    by: Sequence[SliceBy],
    metrics: Sequence[str],
    *,
    confidence: float,
    seed: int,
) -> list[Slice]:
    """Return the scores of each slice of the rows.

    Args:
        tables: {model: score table of the gate's set}; the slices are those of the first one, by row ids.
        by: what the rows are divided by.
        metrics: the scores that are returned, where a table has them.
        confidence: of the intervals, two-sided.
        seed: of the bootstrap.
    """
    first = next(iter(tables.values()))
    rows: list[str] = list(first["id"])
    found: list[Slice] = []
    for kind in by:
        names = _lengths(first) if kind == "length" else _scripts(first)
        for name in _order(kind, names):
            ids = {row for row, one in zip(rows, names, strict=True) if one == name}
            parts = {model: table[table["id"].isin(ids)] for model, table in tables.items()}
            values = {model: _chosen(summarise(part, confidence, seed), metrics) for model, part in parts.items()}
            found.append(Slice(kind, name, len(ids), values))
    return found


def _chosen(scores: Mapping[str, MetricValue], metrics: Sequence[str]) -> dict[str, MetricValue]:
    return {name: scores[name] for name in metrics if name in scores}


def _order(kind: SliceBy, names: Sequence[str]) -> list[str]:
    """Return the slices that have rows: quarters by length, scripts by their number of rows."""
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
    prompts: list[str] = list(table["prompt"])
    questions = [str(_PROMPT.validate_json(prompt)[-1].content) for prompt in prompts]
    return [script(question, min_letters=1) or "no letters" for question in questions]
