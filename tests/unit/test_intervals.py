"""Confidence intervals of differences and means, against other ways to compute them."""

import numpy as np
import pytest
from scipy import stats

from loraflow.evaluation.intervals import mean_interval, tango_bound


@pytest.mark.parametrize(
    ("wins", "losses", "n"), [(0, 0, 30), (5, 5, 50), (9, 1, 40), (1, 9, 40), (40, 0, 40), (0, 1, 100)]
)
def test_tangos_bound_is_where_the_score_test_changes_its_verdict(wins, losses, n):
    """Against a slow, obvious version: walk along the differences and maximise the likelihood on a grid."""

    def z(d0):
        rates = np.linspace(1e-9, (1 - abs(d0)) / 2, 40001)  # the smaller of the two rates of disagreement
        p_win, p_loss = (rates + max(d0, 0), rates + max(-d0, 0))
        rest = np.clip(1 - p_win - p_loss, 1e-300, None)
        likelihood = (
            wins * np.log(p_win + 1e-300) + losses * np.log(p_loss + 1e-300) + (n - wins - losses) * np.log(rest)
        )
        best = likelihood.argmax()
        variance = (p_win[best] + p_loss[best] - d0 * d0) / n
        return ((wins - losses) / n - d0) / np.sqrt(variance)

    bound = tango_bound(wins, losses, n, 0.95)
    assert z(bound - 0.004) > stats.norm.ppf(0.95) > z(bound + 0.004)


def test_the_interval_of_a_mean_is_wilsons_or_weighted():
    value, low, high = mean_interval(np.array([1.0, 0, 1, 1]), 0.95, 0)
    assert (value, round(low, 4), round(high, 4)) == (0.75, 0.3006, 0.9544)  # Wilson 1927
    scores, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert mean_interval(scores, 0.95, 0, weights)[0] == pytest.approx(11 / 4)


def test_a_score_up_to_100_that_is_zero_in_every_row_has_a_share_of_100_as_its_bound():
    zeros = np.zeros(50)
    share, of_hundred = mean_interval(zeros, 0.95, 0), mean_interval(zeros, 0.95, 0, largest=100.0)
    assert of_hundred.high == pytest.approx(100 * share.high) and of_hundred.high > 5
    ones = mean_interval(np.ones(50), 0.95, 0, largest=100.0)
    assert ones.high == pytest.approx(1.0), "a graded score of 1 in every row is no hit"


def test_an_interval_of_a_weighted_mean_is_the_jackknifes_on_a_logarithmic_scale():
    rng = np.random.default_rng(7)
    scores, weights = rng.lognormal(0, 0.5, 30), rng.integers(1, 50, 30).astype(float)
    value, low, high = mean_interval(scores, 0.95, 0, weights)
    left_out = [np.average(np.delete(scores, i), weights=np.delete(weights, i)) for i in range(30)]
    error = np.sqrt(30 / 29 * ((np.array(left_out) - value) ** 2).sum())
    freedom = weights.sum() ** 2 / (weights**2).sum() - 1
    expected = value * np.exp(np.r_[-1, 1] * stats.t.ppf(0.975, freedom) * error / value)
    assert (low, high) == pytest.approx(expected, rel=1e-6)


def test_an_interval_of_rows_in_groups_is_as_wide_as_that_of_the_groups():
    rng = np.random.default_rng(8)
    scores, groups = rng.random(200), np.repeat(np.arange(200), 5)
    once, often = mean_interval(scores, 0.95, 0), mean_interval(np.repeat(scores, 5), 0.95, 0, groups=groups)
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.03)
    assert often.value == pytest.approx(once.value)
