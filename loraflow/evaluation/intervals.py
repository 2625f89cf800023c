"""Confidence intervals of a mean over rows, and Tango's bound of the difference between two models on the same rows.

Binary scores use Wilson's interval for a share, and Tango's score bound (1998) for a paired difference: where models
rarely disagree, the error rate of a percentile bootstrap is four times the nominal rate. Graded scores use a bootstrap
interval, but never one that is narrower than the t interval. A mean that is weighted by tokens, and rows in groups, use
the jackknife's standard error; positive means on the scale of their logarithm, because they are skewed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import optimize, stats

if TYPE_CHECKING:
    import pandas as pd


RESAMPLES = 4000


class Interval(NamedTuple):
    """A mean with its two-sided interval."""

    value: float
    low: float
    high: float


class Bounds(NamedTuple):
    """A mean difference with a lower and an upper bound, each one-sided."""

    mean: float
    lower: float
    upper: float


def is_binary(scores: np.ndarray) -> bool:
    """Tell whether all scores are zero or one."""
    return bool(np.isin(scores, (0.0, 1.0)).all())


def mean_interval(
    scores: np.ndarray,
    confidence: float,
    seed: int,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    largest: float = 1.0,
) -> Interval:
    """Return the mean of scores [rows] with its interval.

    Args:
        scores: the scores of the rows.
        confidence: the two-sided level.
        seed: the seed of the bootstrap.
        weights: the numbers of tokens of the rows.
        groups: a number for each row; rows with the same number are not independent.
        largest: the score's largest possible value, 100 for chrf. If every score is 0 or this, the mean is a share of it.
    """
    if groups is not None and len(np.unique(groups)) == len(scores):
        groups = None
    if weights is None and groups is None and is_binary(scores / largest):
        hits = int(np.count_nonzero(scores))
        interval = stats.binomtest(hits, len(scores)).proportion_ci(confidence, method="wilson")
        return Interval(float(scores.mean()), largest * float(interval.low), largest * float(interval.high))
    if weights is not None or groups is not None:
        return _jackknife_interval(scores, confidence, weights, groups)
    value, n = float(scores.mean()), len(scores)
    if n < 2:
        return Interval(value, -np.inf, np.inf)
    low, high = np.quantile(_resampled(scores, seed), [(1 - confidence) / 2, (1 + confidence) / 2])
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * float(scores.std(ddof=1)) / np.sqrt(n)
    return Interval(value, min(float(low), value - half), max(float(high), value + half))


def _jackknife_interval(
    scores: np.ndarray, confidence: float, weights: np.ndarray | None, groups: np.ndarray | None
) -> Interval:
    """Return the interval of a ratio of sums over independent groups, by leaving out one group after the other."""
    weights = np.ones(len(scores)) if weights is None else weights
    labels = np.arange(len(scores)) if groups is None else groups
    share = np.bincount(labels, weights) / weights.sum()
    value = float((weights * scores).sum() / weights.sum())
    n = len(share)
    if n < 2 or share.max() >= 1:
        return Interval(value, -np.inf, np.inf)
    moved = np.bincount(labels, weights * (scores - value)) / weights.sum() / (1 - share)
    effective = 1 / float(share @ share)  # groups of equal weight with the same variance
    half = float(stats.t.ppf((1 + confidence) / 2, effective - 1)) * float(np.sqrt((moved**2).sum() * n / (n - 1)))
    if value > 0 and scores.min() >= 0:
        low, high = value * np.exp(-half / value), value * np.exp(half / value)
        return Interval(value, float(low), min(float(high), 1.0) if is_binary(scores) else float(high))
    return Interval(value, value - half, value + half)


def _resampled(values: np.ndarray, seed: int) -> np.ndarray:
    """Return the means of bootstrap resamples, in batches: all at once would be gigabytes."""
    rng, n = np.random.default_rng(seed), len(values)
    batch = max(1, 4_000_000 // n)
    means = []
    for first in range(0, RESAMPLES, batch):
        means.append(values[rng.integers(0, n, (min(batch, RESAMPLES - first), n))].mean(1))
    return np.concatenate(means)


def tango_bound(wins: int, losses: int, n: int, confidence: float) -> float:
    """Return the lower score bound of (wins - losses) / n, for n pairs of binary scores.

    The bound is the difference d0 at which z = (d - d0) / sqrt((p - d0²) / n) reaches the quantile, where p, the rate
    of disagreement, is its maximum likelihood estimate under d0. Tango 1998, Statistics in Medicine 17:891.
    """
    z = float(stats.norm.ppf(confidence))
    d = (wins - losses) / n

    def excess(d0: float) -> float:
        # The rate of losses under d0 solves 2n·q² + b·q + c = 0.
        b = -wins - losses + (2 * n - wins + losses) * d0
        c = -losses * d0 * (1 - d0)
        q = (np.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = max((2 * q + d0 * (1 - d0)) / n, 1e-300)
        return float((d - d0) / np.sqrt(variance) - z)

    if excess(-1 + 1e-12) <= 0:
        return -1.0
    return float(optimize.brentq(excess, -1 + 1e-12, d, xtol=1e-10)) if d > -1 else -1.0


def group_labels(table: pd.DataFrame) -> np.ndarray:
    """Return a number for each row [rows]: rows with the same `group`, or with the same prompt, have the same number.

    The numbers are in the order of the groups' first rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    n = len(table)
    keys: dict[tuple[str, str], int] = {}
    edges = [
        (row, n + keys.setdefault((column, value), len(keys)))
        for column in ("group", "prompt")
        if column in table
        for row, value in enumerate(table[column])
        if isinstance(value, str) and value
    ]
    if len(keys) == len(edges):  # all are different
        return np.arange(n)
    graph = coo_array((np.ones(len(edges)), tuple(zip(*edges, strict=True))), shape=(n + len(keys),) * 2)
    _, labels = connected_components(graph, directed=False)
    _, first, compact = np.unique(labels[:n], return_index=True, return_inverse=True)
    numbers: np.ndarray = np.argsort(np.argsort(first))[compact]
    return numbers
