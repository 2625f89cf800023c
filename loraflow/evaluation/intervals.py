"""Confidence intervals of a mean over rows, and bounds of the difference between two models on the same rows.

Binary scores use Wilson's interval for a share, and Tango's score bound (1998) for a paired difference: where models
rarely disagree, the error rate of a percentile bootstrap is four times the nominal rate. Graded scores use a bootstrap
interval, but never one that is narrower than the t interval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

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


def mean_interval(scores: np.ndarray, confidence: float, seed: int, weights: np.ndarray | None = None) -> Interval:
    """Return the mean of scores [rows] with its interval; `weights` are the numbers of tokens of the rows."""
    if weights is None and is_binary(scores):
        interval = stats.binomtest(int(scores.sum()), len(scores)).proportion_ci(confidence, method="wilson")
        return Interval(float(scores.mean()), float(interval.low), float(interval.high))
    weights = np.ones(len(scores)) if weights is None else weights
    value, n = float(np.average(scores, weights=weights)), len(scores)
    if n < 2:
        return Interval(value, -np.inf, np.inf)
    means = _resampled(scores * weights, weights, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    error = np.sqrt(((weights * (scores - value)) ** 2).sum() * n / (n - 1)) / weights.sum()
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * error)
    return Interval(value, min(float(low), value - half), max(float(high), value + half))


def _resampled(values: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Return the weighted means of bootstrap resamples, in batches: all at once would be gigabytes."""
    rng, n = np.random.default_rng(seed), len(values)
    batch = max(1, 4_000_000 // n)
    means = []
    for first in range(0, RESAMPLES, batch):
        picks = rng.integers(0, n, (min(batch, RESAMPLES - first), n))
        means.append(values[picks].sum(1) / weights[picks].sum(1))
    return np.concatenate(means)


def difference_bounds(differences: np.ndarray, confidence: float, seed: int) -> Bounds:
    """Return the mean of paired differences [rows] with its bounds, one-sided at `confidence`."""
    n = len(differences)
    mean = float(differences.mean())
    if n < 2:
        return Bounds(mean, -np.inf, np.inf)
    if np.isin(differences, (-1.0, 0.0, 1.0)).all():
        wins, losses = int((differences == 1).sum()), int((differences == -1).sum())
        return Bounds(mean, tango_bound(wins, losses, n, confidence), -tango_bound(losses, wins, n, confidence))
    spread = float(differences.std(ddof=1))
    if spread == 0 and mean == 0:
        return Bounds(mean, mean, mean)  # the same model, row by row
    half = float(stats.t.ppf(confidence, n - 1)) * spread / np.sqrt(n)
    means = _resampled(differences, np.ones(n), seed)
    low, high = np.quantile(means, [1 - confidence, confidence])
    return Bounds(mean, min(mean - half, float(low)), max(mean + half, float(high)))


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
