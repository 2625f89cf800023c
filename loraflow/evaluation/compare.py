"""Compare two score tables for a person: paired differences, and the rows on which the models differ most."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loraflow.evaluation.behaviour import text_of
from loraflow.evaluation.intervals import Bounds, Interval
from loraflow.evaluation.pairing import NO_RANGES, gains, pair, rows_with_other_tokens, scores, token_weights
from loraflow.evaluation.score import score_columns
from loraflow.evaluation.slices import last_message
from loraflow.evaluation.values import LARGEST_VOCABULARY
from loraflow.failures import BadData

if TYPE_CHECKING:
    import pandas as pd

_LISTED = 10  # rows of each metric


@dataclass(frozen=True)
class ChangedRow:
    """A row on which two models have different scores."""

    id: str
    metric: str
    first: float
    second: float
    question: str
    reference: str
    first_answer: str
    second_answer: str


@dataclass(frozen=True)
class Difference:
    """Two models by one metric, on the rows that both were scored on."""

    metric: str
    first: float
    second: float
    interval: Interval  # the second model against the first, positive where the second is better; two-sided
    bounds: Bounds  # each one-sided, as the gate's
    # The difference of the two reported scores; `bounds.mean` has losses capped.
    uncapped: float
    better: tuple[ChangedRow, ...]  # the rows on which the second is better, those that changed most first
    worse: tuple[ChangedRow, ...]
    better_rows: int
    worse_rows: int


@dataclass(frozen=True)
class TableComparison:
    """Two score tables of one set of rows."""

    rows: int  # in both
    only_first: int
    only_second: int
    differences: tuple[Difference, ...]
    left_out: tuple[str, ...] = ()  # metrics that cannot be compared: losses per token of different tokens
    out_of_range: tuple[str, ...] = ()  # metrics with values outside of their range, which is not used
    vocabulary: int = LARGEST_VOCABULARY  # a loss counts at most its logarithm


def compare_tables(
    first: pd.DataFrame,
    second: pd.DataFrame,
    *,
    confidence: float = 0.95,
    lower_is_better: Collection[str] = (),
    ranges: Mapping[str, tuple[float, float]] = NO_RANGES,
    vocabulary: int = LARGEST_VOCABULARY,
) -> TableComparison:
    """Compare two score tables on the rows that both have.

    Args:
        first: a table with columns id, prompt and metrics, of one set.
        confidence: of the intervals, and of each bound.
        ranges: the smallest and the largest value of scores of the user's metrics. Unlike the gate, a comparison does
            not use a range that a score is outside of.
        vocabulary: number of tokens of the models, as for the gate.

    Raises:
        BadData: they have no row in common, or a score is not a finite number.
    """
    first_rows, second_rows = (table.drop_duplicates("id").set_index("id").sort_index() for table in (first, second))
    common = first_rows.index.intersection(second_rows.index)
    if "prompt" in first_rows and "prompt" in second_rows:  # an id that was given to another row
        common = common[(first_rows.loc[common, "prompt"] == second_rows.loc[common, "prompt"]).to_numpy()]
    if common.empty:
        raise BadData(
            "These models were not scored on a common row.",
            where="loraflow compare",
            expected="rows with the same id and prompt",
            next_step="score one on the other's rows: `loraflow evaluate MODEL RECIPE`, or run both recipes on one dataset",
        )
    only = len(first_rows) - len(common), len(second_rows) - len(common)
    first_rows, second_rows = first_rows.loc[common], second_rows.loc[common]
    metrics = [name for name in score_columns(first_rows) if name in score_columns(second_rows)]
    metrics += ["stops"] if "finish" in first_rows and "finish" in second_rows else []
    left_out = (
        ("token_loss",)
        if "token_loss" in metrics and rows_with_other_tokens(first_rows, second_rows, "the second model")
        else ()
    )
    outside = tuple(
        metric
        for metric in metrics
        if metric in ranges and _is_outside((first_rows, second_rows), metric, ranges[metric])
    )
    known = {metric: ends for metric, ends in ranges.items() if metric not in outside}
    found = tuple(
        _difference(first_rows, second_rows, metric, confidence, lower_is_better, known, vocabulary)
        for metric in metrics
        if metric not in left_out
    )
    return TableComparison(len(common), *only, found, left_out, outside, vocabulary)


def _is_outside(tables: Iterable[pd.DataFrame], metric: str, ends: tuple[float, float]) -> bool:
    values = np.concatenate([scores(table, metric, "a model") for table in tables])
    return bool(values.min() < ends[0] or values.max() > ends[1])


def _difference(
    first: pd.DataFrame,
    second: pd.DataFrame,
    metric: str,
    confidence: float,
    lower: Collection[str],
    ranges: Mapping[str, tuple[float, float]],
    vocabulary: int,
) -> Difference:
    evidence, reported = pair(
        second, first, metric, "the first model", lower_is_better=lower, vocabulary=vocabulary, ranges=ranges
    )
    before, after = scores(first, metric, "the first model"), scores(second, metric, "the second model")
    gained = gains(after, before, metric, lower)
    order = np.argsort(-gained, kind="stable")
    better = [int(i) for i in order[:_LISTED] if gained[i] > 0]
    worse = [int(i) for i in order[::-1][:_LISTED] if gained[i] < 0]
    return Difference(
        metric,
        _mean(first, metric, before),
        _mean(second, metric, after),
        evidence.interval(confidence),
        evidence.bounds(confidence),
        reported,
        tuple(_row(first, second, metric, before, after, i) for i in better),
        tuple(_row(first, second, metric, before, after, i) for i in worse),
        int((gained > 0).sum()),
        int((gained < 0).sum()),
    )


def _mean(table: pd.DataFrame, metric: str, values: np.ndarray) -> float:
    return float(np.average(values, weights=token_weights(table, "a model") if metric == "token_loss" else None))


def _row(
    first: pd.DataFrame, second: pd.DataFrame, metric: str, before: np.ndarray, after: np.ndarray, i: int
) -> ChangedRow:
    return ChangedRow(
        str(first.index[i]),
        metric,
        float(before[i]),
        float(after[i]),
        last_message(text_of(first, "prompt", i)),
        text_of(first, "reference", i),
        text_of(first, "answer", i),
        text_of(second, "answer", i),
    )
