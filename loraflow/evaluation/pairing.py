"""Pair two score tables row by row, and group the rows that are not independent of each other.

The difference of a pair of tables is the difference of the two numbers that the report shows: the mean over rows, or for
`token_loss` the sum over all tokens by their number.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loraflow.config.evaluation import BINARY, LOWER_IS_BETTER, RANGES, ROW_COLUMNS
from loraflow.evaluation.evidence import Evidence
from loraflow.evaluation.intervals import group_labels, is_binary
from loraflow.evaluation.values import LARGEST_SCORE, LARGEST_VOCABULARY
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    import pandas as pd


NO_RANGES: Mapping[str, tuple[float, float]] = MappingProxyType({})


class Pair(NamedTuple):
    """The challenger against another model by one metric."""

    evidence: Evidence
    reported: float  # the difference of the reported values; another one than the estimate if losses were capped


def pair(
    challenger_rows: pd.DataFrame,
    other_rows: pd.DataFrame,
    metric: str,
    name: str,
    *,
    lower_is_better: Collection[str] = (),
    vocabulary: int | None = None,
    ranges: Mapping[str, tuple[float, float]] = NO_RANGES,
) -> Pair:
    """Return the paired differences of a metric, positive where the challenger is better.

    Args:
        challenger_rows: the challenger's table, with its ids as the index.
        other_rows: the other model's table, with the same index.
        metric: a column of both, or `stops`.
        vocabulary: the number of tokens; a loss counts at most its logarithm, in nats per token.

    Raises:
        BadData: a score is not a finite number, too large to compute with, or outside of its range.
        BadConfig: there is no score of this name, or it is a loss per token of different tokens.
    """
    labels = group_labels(challenger_rows)
    mine, other = scores(challenger_rows, metric, "challenger"), scores(other_rows, metric, name)
    if metric == "token_loss":
        require_same_tokens(challenger_rows, other_rows, name)
        return _pair_of_losses(mine, other, token_weights(challenger_rows, "challenger"), labels, vocabulary)
    differences = gains(mine, other, metric, lower_is_better)
    if metric in ranges:
        require_in_range(challenger_rows, ranges[metric], metric, "challenger")
        require_in_range(other_rows, ranges[metric], metric, name)
        reach: float | None = ranges[metric][1] - ranges[metric][0]
    else:
        reach = _reach(metric, mine, other)
    evidence = _grouped(differences, np.ones(len(differences)), labels, reach)
    if (metric in BINARY or metric not in {*RANGES, *ranges}) and is_binary(mine) and is_binary(other):
        independent = evidence.groups == evidence.rows
        evidence = replace(evidence, reach=1.0, binary=independent, is_assumed=metric not in BINARY)
    return Pair(evidence, float(differences.mean()))


def gains(mine: np.ndarray, other: np.ndarray, metric: str, lower_is_better: Collection[str]) -> np.ndarray:
    """Return how much better the first scores are than the others [rows]; `lower_is_better` are the user's metrics."""
    found: np.ndarray = other - mine if metric in LOWER_IS_BETTER | set(lower_is_better) else mine - other
    return found


def require_in_range(table: pd.DataFrame, ends: tuple[float, float], metric: str, where: str) -> None:
    """Refuse a score outside of the range that the recipe says it has.

    Raises:
        BadData: there is one.
    """
    values = scores(table, metric, where)
    outside = (values < ends[0]) | (values > ends[1])
    if outside.any():
        first = table.index[outside][0]
        raise BadData(
            "A score is outside of the range that the recipe says it has.",
            where=f"gate.ranges: {metric} of {where}",
            expected=f"values from {ends[0]:g} to {ends[1]:g}",
            got=f"{values[outside][0]:g} in {outside.sum()} of {len(values)} rows, the first of them {first}",
            next_step="correct gate.ranges, or limit the score in its metric's module",
        )


def _reach(metric: str, mine: np.ndarray, other: np.ndarray) -> float | None:
    reach = RANGES.get(metric)
    if reach is None or min(mine.min(), other.min()) < 0 or max(mine.max(), other.max()) > reach * (1 + 1e-9):
        return None
    return reach


def _pair_of_losses(
    mine: np.ndarray, other: np.ndarray, tokens: np.ndarray, labels: np.ndarray, vocabulary: int | None
) -> Pair:
    """Pair losses in nats per token [rows]. Only sums over rows are stored, so the cap is for each row's mean."""
    cap = math.log(vocabulary or LARGEST_VOCABULARY)
    total = float(tokens.sum())
    reported = float((other * tokens).sum() / total - (mine * tokens).sum() / total)
    capped = (np.minimum(other, cap) - np.minimum(mine, cap)) * tokens
    return Pair(_grouped(capped, tokens, labels, cap), reported)


def _grouped(sums: np.ndarray, weights: np.ndarray, labels: np.ndarray, reach: float | None) -> Evidence:
    groups = int(labels.max()) + 1
    residuals = sums - float(sums.sum() / weights.sum()) * weights
    return Evidence(
        np.bincount(labels, sums, groups) if groups < len(sums) else sums,
        np.bincount(labels, weights, groups) if groups < len(sums) else weights,
        reach,
        rows=len(sums),
        spread=float(residuals @ residuals),
    )


def token_weights(table: pd.DataFrame, where: str) -> np.ndarray:
    """Return the numbers of tokens by which a table's losses are weighted in the report [rows]."""
    if "reference_tokens" not in table:
        return np.ones(len(table))
    tokens = _numbers(table, "reference_tokens", where)
    if tokens.min() < 0 or tokens.sum() <= 0:
        raise refusal("A number of tokens is not positive.", where, "tokens in every row", f"{tokens.min():g}")
    return tokens


def require_same_tokens(challenger_rows: pd.DataFrame, other_rows: pd.DataFrame, name: str) -> None:
    """Refuse to compare losses per token if the models split the references into different tokens.

    With half as many tokens, the same likelihood of a text is twice the loss per token. A champion can be from another base
    model than the challenger, or have another chat template, which ends an answer with other tokens.

    Raises:
        BadConfig: a reference has another number of tokens.
    """
    differs = rows_with_other_tokens(challenger_rows, other_rows, name)
    if differs:
        mine, other = (
            float(_numbers(table, "reference_tokens", name).sum()) for table in (challenger_rows, other_rows)
        )
        raise BadConfig(
            "The models split the reference answers into different tokens (another tokenizer or chat template), so their "
            "losses per token cannot be compared.",
            where=f"token_loss of challenger and {name}",
            expected="the same number of tokens in each reference answer",
            got=f"other numbers in {differs} of {len(challenger_rows)} rows; {mine:.0f} and {other:.0f} tokens in all",
            next_step="compare answers: in `gate`, name scores such as exact_match or token_f1 instead of token_loss, and "
            "accuracy instead of loss in gate.forgetting (the training stays cached). Or give models with these tokens a "
            "name of their own: register.model",
        )


def rows_with_other_tokens(challenger_rows: pd.DataFrame, other_rows: pd.DataFrame, name: str) -> int:
    """Return in how many rows two tables with the same index have another number of tokens in the reference."""
    if "reference_tokens" not in challenger_rows or "reference_tokens" not in other_rows:
        return 0
    mine, other = (
        _numbers(challenger_rows, "reference_tokens", "challenger"),
        _numbers(other_rows, "reference_tokens", name),
    )
    return int((mine != other).sum())


def scores(table: pd.DataFrame, metric: str, where: str) -> np.ndarray:
    """Return the scores of a metric [rows]. `stops` is 1 where an answer ended with a stop token.

    Raises:
        BadData: a score is not a finite number, or too large to compute with.
        BadConfig: there is no score of this name.
    """
    if metric == "stops" and metric not in table and "finish" in table:
        stopped: np.ndarray = (table["finish"] == "stop").to_numpy(dtype=float)
        return stopped
    if metric not in table or metric in ROW_COLUMNS:
        raise _no_such_score(table, metric)
    values = _numbers(table, metric, where)
    if metric == "token_loss" and values.min(initial=0) < -0.01:  # rounding gives less
        raise refusal("A loss is negative.", f"{metric} of {where}", "at least 0 nats per token", f"{values.min():g}")
    return values


def _numbers(table: pd.DataFrame, metric: str, where: str) -> np.ndarray:
    column = table[metric]
    if column.dtype.kind not in "biuf":
        raise refusal("A score is not a number.", f"{metric} of {where}", "numbers", f"a column of {column.dtype}")
    values: np.ndarray = column.to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        got = f"{values[bad][0]} in {bad.sum()} of {len(values)} rows, the first of them {table.index[bad][0]}"
        raise refusal("A score is not a finite number.", f"{metric} of {where}", "finite numbers", got)
    if (np.abs(values) > LARGEST_SCORE).any():
        largest = int(np.abs(values).argmax())
        raise BadData(
            "A score is too large to compute with.",
            where=f"{metric} of {where}",
            expected=f"scores of at most {LARGEST_SCORE:g}",
            got=f"{values[largest]:g} in row {table.index[largest]}",
            next_step="limit the score in its metric's module",
        )
    return values


def _no_such_score(table: pd.DataFrame, metric: str) -> BadConfig:
    from loraflow.evaluation.score import score_columns

    scored = [*score_columns(table), *(["stops"] if "finish" in table else [])]
    return BadConfig(
        "The gate names a score that does not exist.",
        where="gate",
        expected=f"one of {', '.join(scored)}",
        got=metric,
        next_step="correct the name in `gate`, or add the metric that gives this score to evaluation.metrics",
    )


def refusal(what: str, where: str, expected: str, got: str) -> BadData:
    """Return the failure for score tables that cannot be compared."""
    step = "score them again with one protocol: `loraflow run RECIPE --force evaluate`"
    return BadData(what, where=where, expected=expected, got=got, next_step=step)
