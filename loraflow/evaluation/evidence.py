"""Tests and one-sided bounds for the difference between two models on the same rows, and the interval of a model's mean.

The gate needs tests that hold at levels such as 0.00007, for few rows, heavy tails and rows in groups. A normal score
bound or 4,000 bootstrap resamples are not valid there.

- Scores of 0 and 1, independent rows: an exact unconditional test, ordered by Tango's score (Suissa and Shuster 1991;
  Tango 1998), over the plausible rates of disagreement (Berger and Boos 1994). Reported bounds are Tango's.
- All others: Gaffke's bound (2005; Learned-Miller and Thomas 2019, https://arxiv.org/abs/1905.06208). Give each group of
  rows a random weight, Exp(1), and add one group with the worst possible difference. The p-value of "the mean is at most
  c" is the probability that the weighted sum of differences from c is not positive. For scores of 0 and 1 this is Clopper
  and Pearson's exact test. The probability comes from a saddle point, not from resampling.
- Rows in groups: the larger p-value of the same test on sums over groups and a t test of these sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import scipy

from loraflow.evaluation.intervals import (
    SKEWNESS,
    Bounds,
    Interval,
    is_binary,
    ratio_interval,
    tango_bound,
    tango_score,
)

_NUISANCE_POINTS = 60  # rates of disagreement at which the exact test is evaluated; 200 change no p-value by 1 %
_FEWEST_DIFFERENT = 4  # groups that differ from the others, so that their spread says something
_NUISANCE_SHARE = 0.02  # of the level: the probability that the rate is outside of them


@dataclass(frozen=True)
class Evidence:
    """Paired differences in groups of rows that are independent of each other; positive where the challenger is better.

    The estimate is sum(gains) / sum(weights): the mean over rows, or nats per token for a loss.
    """

    gains: np.ndarray  # [groups] sums of differences
    weights: np.ndarray  # [groups] rows, or tokens
    reach: float | None  # the largest possible difference per unit of weight; None if it is not known
    binary: bool = False  # each group is one row, and scores are 0 or 1
    rows: int = 0
    spread: float = 0.0  # sum over rows of squared residuals, for the effective number of rows
    is_assumed: bool = False  # the reach: all scores of a metric of the user's own are 0 or 1 in these rows

    @property
    def estimate(self) -> float:
        """The difference that is reported."""
        return float(self.gains.sum() / self.weights.sum())

    @property
    def has_known_range(self) -> bool:
        """Whether the largest possible difference is known. Otherwise bounds only allow for differences that were seen."""
        return self.reach is not None and not self.is_assumed

    @property
    def groups(self) -> int:
        """The number of independent groups."""
        return len(self.gains)

    @property
    def effective_rows(self) -> float:
        """The number of independent rows that would give the same standard error."""
        residuals = self.gains - self.estimate * self.weights
        variance = float(residuals @ residuals)
        if self.groups == self.rows or variance <= 0:
            return float(self.groups)
        return float(min(max(self.rows * self.spread / variance, 1.0), self.rows))

    def flipped(self) -> Evidence:
        """Return the same differences from the other model's side."""
        return replace(self, gains=-self.gains)

    def p_above(self, bound: float, level: float, times: int = 1) -> float:
        """Return the p-value of "the difference is at most `bound`" at `level`, if each group were there so many times."""
        if self.binary:
            wins, losses = int((self.gains == 1).sum()), int((self.gains == -1).sum())
            return exact_p_value(wins * times, losses * times, self.groups * times, bound, level)
        return self._p_of_mean(bound, times)

    def bounds(self, confidence: float) -> Bounds:
        """Return the estimate with a lower and an upper bound, each one-sided at `confidence`."""
        return Bounds(self.estimate, self.lower_bound(confidence), -self.flipped().lower_bound(confidence))

    def interval(self, confidence: float) -> Interval:
        """Return the estimate with its two-sided interval, which `loraflow compare` shows. The gate does not use it.

        docs/trust.md says how often it covers. The ends are infinite without a range, if the differences are equal or few.
        """
        level, reach = (1 + confidence) / 2, np.inf if self.reach is None else self.reach
        different = _different(self.gains, self.weights)
        if self.reach is None and (not different or np.isinf(self.lower_bound(level))):
            return Interval(self.estimate, -reach, reach)
        if self.binary or different < _FEWEST_DIFFERENT:
            return Interval(*self.bounds(level))
        value, low, high = ratio_interval(self.gains, self.weights, confidence)
        return Interval(value, max(low, -reach), min(high, reach))

    def lower_bound(self, confidence: float, times: int = 1) -> float:
        """Return the lower bound; `times` as for `p_above`, for scores of 0 and 1 only."""
        if self.binary:
            wins, losses = int((self.gains == 1).sum()), int((self.gains == -1).sum())
            return tango_bound(wins * times, losses * times, self.groups * times, confidence)
        return self._lower(confidence)

    def _lower(self, confidence: float) -> float:
        """Return the value below which the p-value is less than 1 - confidence."""
        error, estimate = 1 - confidence, self.estimate
        if self.reach is not None:
            scale, low = self.reach, -self.reach
        else:
            scale = float(np.abs(self.gains).max()) or 1.0
            distances = (scale * 2.0**k for k in range(-20, 21))
            low = next((estimate - far for far in distances if self._p_of_mean(estimate - far) < error), -np.inf)
        if not np.isfinite(low) or self._p_of_mean(low) >= error:
            return low
        if self._p_of_mean(estimate) <= error:  # all groups differ by the same amount
            return estimate
        root = scipy.optimize.brentq(
            lambda c: self._p_of_mean(c) - error, low, estimate, xtol=max(1e-7 * scale, 1e-300)
        )
        return float(root)

    @property
    def _weight_of_worst(self) -> float:
        """The weight of a group that has not been seen: of the group that a random row, or token, is in."""
        return float(self.weights @ self.weights) / float(self.weights.sum())

    def _p_of_mean(self, bound: float, times: int = 1) -> float:
        centred = self.gains - bound * self.weights
        if self.reach is None:  # the best guess is what was seen
            worst = -float(np.abs(centred).max())
        else:
            worst = -(self.reach + bound) * self._weight_of_worst
        p = gaffke_p_value(centred, worst, times)
        if self.reach is None or self.groups < self.rows:
            p = max(p, _t_p_value(centred, times))
        return p


def mean_interval(
    scores: np.ndarray,
    confidence: float,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    largest: float | None = None,
) -> Interval:
    """Return the mean of scores [rows] with its interval.

    If fewer than four groups differ from the others, the ends are the gate's bounds. Equal scores without a range have no
    interval.

    Args:
        weights: the numbers of tokens of the rows; the scores are losses.
        groups: a number for each row; rows with the same number are not independent.
        largest: the largest possible value of a score that is at least 0, 100 for chrf. The interval is within this
            range. If every score is 0 or this, the mean is a share of it.
    """
    if groups is not None and len(np.unique(groups)) == len(scores):
        groups = None
    if largest is None and weights is None and is_binary(scores):
        largest = 1.0
    is_plain = weights is None and groups is None
    if is_plain and largest is not None and is_binary(scores / largest) and scores.min() < scores.max():
        hits = int(np.count_nonzero(scores))
        share = scipy.stats.binomtest(hits, len(scores)).proportion_ci(confidence, method="wilson")
        return Interval(float(scores.mean()), largest * float(share.low), largest * float(share.high))
    smallest = -np.inf if weights is None else 0.0
    weights = np.ones(len(scores)) if weights is None else weights
    labels = np.arange(len(scores)) if groups is None else groups
    sums, weights = np.bincount(labels, weights * scores), np.bincount(labels, weights)
    value, low, high = ratio_interval(sums, weights, confidence, skewness=SKEWNESS if is_plain else 0.0)
    few = _different(sums, weights) < _FEWEST_DIFFERENT
    if few and largest is None:
        _, low, high = Evidence(sums, weights, None, rows=len(scores)).interval(confidence)
        low = max(low, smallest) if np.isfinite(low) else low
    elif few and largest is not None:
        middle = largest / 2  # scores are at most this far from it
        found = Evidence(sums - middle * weights, weights, middle, rows=len(scores)).bounds((1 + confidence) / 2)
        low, high = found.lower + middle, found.upper + middle
    elif not is_plain and value > 0 and scores.min() >= 0 and np.isfinite(low):
        low, high = (float(value * np.exp(end / value - 1)) for end in (low, high))
    return Interval(value, low, high) if largest is None else Interval(value, max(low, 0.0), min(high, largest))


def _different(sums: np.ndarray, weights: np.ndarray) -> int:
    """Return how many groups have another mean than most."""
    each = sums[weights > 0] / weights[weights > 0]
    return int(np.count_nonzero(np.abs(each - np.median(each)) > 1e-9 * np.abs(each).max()))


def _t_p_value(values: np.ndarray, times: int) -> float:
    n = len(values) * times
    if n < 2:
        return 1.0
    values = values / (float(np.abs(values).max()) or 1.0)  # squares of very small differences would be 0
    mean, error = float(values.mean()), float(values.std()) / np.sqrt(n - 1)
    if error <= 1e-14 * abs(mean):
        return 0.0 if mean > 0 else 1.0
    return float(scipy.special.stdtr(n - 1, -mean / error)) if error else 1.0


def gaffke_p_value(values: np.ndarray, worst: float, times: int = 1) -> float:
    """Return the p-value of "the mean of the values is at most 0"; no value can be below `worst`.

    It is P(sum of E_i·y_i <= 0) over the values, each taken `times` times, and `worst`, with E_i exponential of mean 1.
    The probability is Lugannani and Rice's (1980).
    """
    if worst >= 0:
        return 0.0
    y = np.append(values, worst)
    y = y / np.abs(y).max()
    if y.max() <= 0:
        return 1.0
    number = np.full(len(y), float(times))
    number[-1] = 1
    t = _saddle_point(y, number)
    r = float(np.sign(t) * np.sqrt(max(2 * float(number @ np.log1p(-t * y)), 0.0)))
    if abs(r) < 1e-3:  # the formula's limit at the mean
        k2, k3 = float(number @ y**2), 2 * float(number @ y**3)
        p = 0.5 - (float(number @ y) / np.sqrt(k2) - k3 / (6 * k2**1.5)) / np.sqrt(2 * np.pi)
    else:
        u = t * np.sqrt(float(number @ (y / (1 - t * y)) ** 2))
        p = scipy.special.ndtr(r) + np.exp(-r * r / 2) / np.sqrt(2 * np.pi) * (1 / r - 1 / u)
    return float(min(max(p, 0.0), 1.0))


def _saddle_point(y: np.ndarray, number: np.ndarray) -> float:
    """Return the t at which the derivative of -sum(number·log(1 - t·y)) is zero; it increases with t."""
    low, high = 1 / float(y.min()) * (1 - 1e-13), 1 / float(y.max()) * (1 - 1e-13)
    t = 0.0
    for _ in range(200):  # Newton's method, with a bisection where it leaves the interval
        ratio = y / (1 - t * y)
        slope, curve = float(number @ ratio), float(number @ (ratio * ratio))
        if slope > 0:
            high = t
        else:
            low = t
        step = t - slope / curve
        new = step if low < step < high else (low + high) / 2
        if abs(new - t) <= 1e-13 * abs(new) or slope == 0:
            return t if slope == 0 else new
        t = new
    return t


@lru_cache(maxsize=100_000)
def exact_p_value(wins: int, losses: int, n: int, bound: float, level: float) -> float:
    """Return the exact p-value of "the rate of wins minus the rate of losses is at most `bound`", for n pairs.

    It is the largest probability, over the rates of disagreement that are plausible, of a score that is at least as large
    as the one observed; plus the probability that the rate is not among them.
    """
    observed = float(tango_score(np.array([wins]), np.array([losses]), n, bound)[0])
    if observed <= 0:
        return 1.0
    outside = level * _NUISANCE_SHARE
    seen = wins + losses
    low = float(scipy.special.betaincinv(seen, n - seen + 1, outside / 2)) if seen else 0.0
    high = float(scipy.special.betaincinv(seen + 1, n - seen, 1 - outside / 2)) if seen < n else 1.0
    rates = np.linspace(max(low, abs(bound)), max(high, abs(bound)), _NUISANCE_POINTS)
    lose = np.clip((rates - bound) / 2, 0.0, 1.0)  # at the border of the hypothesis: wins - losses = bound
    win = np.clip(lose + bound, 0.0, 1.0)
    most = int(min(n, scipy.stats.binom.isf(outside * 1e-3, n, float(lose.max())))) if lose.max() < 1 else n
    lost = np.arange(most + 1)
    enough = _fewest_wins(lost, n, bound, observed)
    chance = scipy.stats.binom.pmf(lost[:, None], n, lose[None, :])
    share = np.divide(win, 1 - lose, out=np.ones_like(win), where=lose < 1)
    tail = scipy.stats.binom.sf(enough[:, None] - 1, (n - lost)[:, None], np.clip(share, 0, 1)[None, :])
    return float(min((chance * tail).sum(0).max() + outside * 1e-3 + outside, 1.0))


def _fewest_wins(lost: np.ndarray, n: int, bound: float, score: float) -> np.ndarray:
    """Return for each number of losses the smallest number of wins with at least this score; n + 1 if there is none."""
    low, high = np.zeros_like(lost), n - lost + 1
    while (low < high).any():
        middle = (low + high) // 2
        reached = tango_score(np.minimum(middle, n - lost), lost, n, bound) >= score - 1e-9
        open_ = low < high
        high = np.where(open_ & reached, middle, high)
        low = np.where(open_ & ~reached, middle + 1, low)
    return np.where(low > n - lost, n + 1, low)
