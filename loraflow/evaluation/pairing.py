"""Pair two score tables row by row, and group the rows that are not independent of each other.

The difference of a pair of tables is the difference of the two numbers that the report shows: the mean over rows, or for
`token_loss` the sum over all tokens by their number.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loraflow.evaluation.evidence import Evidence
from loraflow.evaluation.groups import group_labels
from loraflow.evaluation.intervals import is_binary
from loraflow.evaluation.metric_modules import LOWER_IS_BETTER
from loraflow.evaluation.values import BINARY, LARGEST_VOCABULARY, RANGES
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    import pandas as pd


class Pair(NamedTuple):
    """The challenger against another model by one metric."""

    evidence: Evidence
    reported: float  # the difference of the reported values; another one than the estimate if losses were capped


def pair(
    ours: pd.DataFrame,
    theirs: pd.DataFrame,
    metric: str,
    name: str,
    *,
    lower_is_better: Collection[str] = (),
    vocabulary: int | None = None,
) -> Pair:
    """Return the paired differences of a metric, positive where the challenger is better.

    Args:
        ours: the challenger's table, with its ids as the index.
        theirs: the other model's table, with the same index.
        metric: a column of both, or `stops`.
        name: of the other model, for messages.
        lower_is_better: metrics, in addition to loraflow's own, where lower is better.
        vocabulary: the number of tokens; a loss counts at most its logarithm, in nats per token.

    Raises:
        BadData: a score is not a finite number.
        BadConfig: there is no score of this name.
    """
    labels = group_labels(ours)
    mine, other = scores(ours, metric, "challenger"), scores(theirs, metric, name)
    if metric == "token_loss":
        return _pair_of_losses(mine, other, _tokens(ours, "challenger"), _tokens(theirs, name), labels, vocabulary)
    sign = -1.0 if metric in LOWER_IS_BETTER | set(lower_is_better) else 1.0
    differences = sign * (mine - other)
    evidence = _grouped(differences, np.ones(len(differences)), labels, _reach(metric, mine, other))
    if (metric in BINARY or metric not in RANGES) and is_binary(mine) and is_binary(other):
        independent = evidence.groups == evidence.rows
        evidence = Evidence(evidence.gains, evidence.weights, 1.0, independent, evidence.rows, evidence.spread)
    return Pair(evidence, float(differences.mean()))


def _reach(metric: str, mine: np.ndarray, other: np.ndarray) -> float | None:
    reach = RANGES.get(metric)
    if reach is None or min(mine.min(), other.min()) < 0 or max(mine.max(), other.max()) > reach * (1 + 1e-9):
        return None
    return reach


def _pair_of_losses(
    mine: np.ndarray,
    other: np.ndarray,
    tokens: np.ndarray,
    other_tokens: np.ndarray,
    labels: np.ndarray,
    vocabulary: int | None,
) -> Pair:
    """Pair losses in nats per token [rows]. Only sums over rows are stored, so the cap is for each row's mean."""
    cap = math.log(vocabulary or LARGEST_VOCABULARY)
    total, other_total = float(tokens.sum()), float(other_tokens.sum())
    reported = float((other * other_tokens).sum() / other_total - (mine * tokens).sum() / total)
    mine, other = np.minimum(mine, cap), np.minimum(other, cap)
    loss, other_loss = float((mine * tokens).sum() / total), float((other * other_tokens).sum() / other_total)
    # Linearised, so that rows count by their tokens; with equal tokens it is the plain difference of the sums.
    residuals = (other - other_loss) * other_tokens * (total / other_total) - (mine - loss) * tokens
    gains = residuals + (other_loss - loss) * tokens
    return Pair(_grouped(gains, tokens, labels, cap), reported)


def _grouped(gains: np.ndarray, weights: np.ndarray, labels: np.ndarray, reach: float | None) -> Evidence:
    groups = int(labels.max()) + 1
    residuals = gains - float(gains.sum() / weights.sum()) * weights
    return Evidence(
        np.bincount(labels, gains, groups) if groups < len(gains) else gains,
        np.bincount(labels, weights, groups) if groups < len(gains) else weights,
        reach,
        rows=len(gains),
        spread=float(residuals @ residuals),
    )


def _tokens(table: pd.DataFrame, where: str) -> np.ndarray:
    """Return the numbers of tokens by which a table's losses are weighted in the report [rows]."""
    if "reference_tokens" not in table:
        return np.ones(len(table))
    tokens = scores(table, "reference_tokens", where)
    if tokens.min() < 0 or tokens.sum() <= 0:
        raise refusal("A number of tokens is not positive.", where, "tokens in every row", f"{tokens.min():g}")
    return tokens


def scores(table: pd.DataFrame, metric: str, where: str) -> np.ndarray:
    """Return the scores of a metric [rows]. `stops` is 1 where an answer ended with a stop token.

    Raises:
        BadData: a score is not a finite number.
        BadConfig: there is no score of this name.
    """
    if metric == "stops" and metric not in table and "finish" in table:
        stopped: np.ndarray = (table["finish"] == "stop").to_numpy(dtype=float)
        return stopped
    if metric not in table:
        raise _no_such_score(table, metric)
    column = table[metric]
    if column.dtype.kind not in "biuf":
        raise refusal("A score is not a number.", f"{metric} of {where}", "numbers", f"a column of {column.dtype}")
    values: np.ndarray = column.to_numpy(dtype=float, na_value=np.nan)
    bad = ~np.isfinite(values)
    if bad.any():
        got = f"{values[bad][0]} in {bad.sum()} of {len(values)} rows, the first of them {table.index[bad][0]}"
        raise refusal("A score is not a finite number.", f"{metric} of {where}", "finite numbers", got)
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
