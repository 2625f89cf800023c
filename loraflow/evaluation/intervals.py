"""Confidence intervals of a mean over rows, and Tango's bound of the difference between two models on the same rows.

Binary scores use Wilson's interval for a share, and Tango's score bound (1998) for a paired difference: where models
rarely disagree, the error rate of a percentile bootstrap is four times the nominal rate. All others use the jackknife's
standard error: graded scores and their paired differences with a correction for skewness, and positive means that are
weighted by tokens, or of rows in groups, on the scale of their logarithm. `evidence.mean_interval` chooses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy  # imports its parts when they are used first: scipy.stats takes a second, and a cached run has no use for it

if TYPE_CHECKING:
    import pandas as pd

# The part of Hall's correction. All of it covers 0.99 where 9 of 10 scores are 1 (benchmarks/gate_intervals.py).
SKEWNESS = 1 / 3
_FEWEST_GROUPS = 1.9  # of equal weight; with fewer, the t quantile says nothing


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


def ratio_interval(sums: np.ndarray, weights: np.ndarray, confidence: float, *, skewness: float = SKEWNESS) -> Interval:
    """Return the interval of sum(sums) / sum(weights) over independent groups, by leaving out one group after the other.

    It is the t interval, with the part `skewness` of what Hall's (1992, JRSS B 54:221) adds to each end. The error is
    n / (n - 1) times the jackknife's, for few groups.

    Args:
        sums: [groups].
        weights: rows, or tokens [groups].
        skewness: between 0 and 1.
    """
    total, n = float(weights.sum()), len(sums)
    value, share = float(sums.sum()) / total, weights / total
    effective = 1 / float(share @ share)  # groups of equal weight with the same variance
    if effective < _FEWEST_GROUPS:
        return Interval(value, -np.inf, np.inf)
    moved = (sums - value * weights) / total / (1 - share)
    scale = float(np.abs(moved).max())
    if not scale:
        return Interval(value, value, value)
    moved /= scale  # powers of very small or large numbers
    variance = float(moved @ moved)
    t = float(scipy.special.stdtrit(effective - 1, (1 + confidence) / 2))
    skew = float((moved**3).sum()) / variance**1.5  # of the value
    error = scale * float(np.sqrt(variance * n / (n - 1)))
    ends = np.array([t, -t])
    hall = 3 / skew * (np.cbrt(1 + skew * (ends - skew / 6)) - 1) if abs(skew) > 1e-6 else ends
    further = np.maximum(np.abs(hall) - t, 0.0) * skewness
    return Interval(value, value - error * (t + further[0]), value + error * (t + further[1]))


def tango_bound(wins: int, losses: int, n: int, confidence: float) -> float:
    """Return the lower score bound of (wins - losses) / n, for n pairs of binary scores.

    The bound is the difference d0 at which z = (d - d0) / sqrt((p - d0²) / n) reaches the quantile, where p, the rate
    of disagreement, is its maximum likelihood estimate under d0. Tango 1998, Statistics in Medicine 17:891.
    """
    z, d = float(scipy.special.ndtri(confidence)), (wins - losses) / n

    def excess(d0: float) -> float:
        return float(tango_score(wins, losses, n, d0)) - z

    if excess(-1 + 1e-12) <= 0:
        return -1.0
    return float(scipy.optimize.brentq(excess, -1 + 1e-12, d, xtol=1e-10)) if d > -1 else -1.0


def tango_score(wins: np.ndarray | int, losses: np.ndarray | int, n: int, bound: float) -> np.ndarray:
    """Return Tango's score of each outcome: (d - bound) over its standard error under the hypothesis d = bound."""
    # The rate of losses under it solves 2n·q² + b·q + c = 0.
    b = -wins - losses + (2 * n - wins + losses) * bound
    c = -losses * bound * (1 - bound)
    q = (np.sqrt(np.maximum(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
    variance = np.maximum((2 * q + bound * (1 - bound)) / n, 1e-300)
    score: np.ndarray = ((wins - losses) / n - bound) / np.sqrt(variance)
    return score


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
