"""The p-values of the gate against other ways to compute them, and the gain that is large enough to be shown."""

import bisect

import numpy as np
import pytest
from scipy import stats

from loraflow.evaluation.evidence import Evidence, exact_p_value, gaffke_p_value
from loraflow.evaluation.power import smallest_gain


def rows(values, reach=1.0, binary=False):
    values = np.asarray(values, dtype=float)
    return Evidence(values, np.ones(len(values)), reach, binary, len(values))


@pytest.mark.parametrize(("wins", "losses", "n"), [(3, 0, 12), (6, 1, 12), (8, 2, 14), (4, 3, 12), (12, 0, 12)])
@pytest.mark.parametrize("bound", [0.0, 0.1])
def test_the_exact_p_value_is_the_largest_probability_of_a_score_at_least_as_large(wins, losses, n, bound):
    """Against all outcomes of a small trial, with a score that is maximised on a grid, and scipy's multinomial."""

    def score(w, loss):
        q = np.linspace(1e-9, (1 - bound) / 2, 4001)
        p = q + bound
        rest = np.clip(1 - p - q, 1e-300, None)
        best = (w * np.log(p) + loss * np.log(q) + (n - w - loss) * np.log(rest)).argmax()
        return ((w - loss) / n - bound) / np.sqrt(max((p[best] + q[best] - bound**2) / n, 1e-12))

    seen = score(wins, losses)
    if seen <= 0:
        assert exact_p_value(wins, losses, n, bound, 0.05) == 1
        return
    outcomes = [(w, lost, n - w - lost) for w in range(n + 1) for lost in range(n + 1 - w)]
    extreme = [outcome for outcome in outcomes if score(*outcome[:2]) >= seen - 1e-6]
    level = 0.05
    m = wins + losses  # the rates of disagreement that are plausible: Clopper and Pearson
    low = stats.beta.ppf(0.01 * level, m, n - m + 1) if m else 0.0
    high = stats.beta.ppf(1 - 0.01 * level, m + 1, n - m) if m < n else 1.0
    largest = 0.0
    for rate in np.linspace(max(low, bound), max(high, bound), 60):
        q = (rate - bound) / 2
        largest = max(largest, stats.multinomial.pmf(extreme, n, [q + bound, q, 1 - 2 * q - bound]).sum())
    assert exact_p_value(wins, losses, n, bound, level) == pytest.approx(largest + 0.02 * level, abs=2e-3 * level)


@pytest.mark.parametrize("level", [0.025, 0.025 / 364])
@pytest.mark.parametrize(("n", "rate"), [(40, 0.1), (100, 0.02), (100, 0.3), (300, 0.1)])
def test_the_exact_test_promotes_an_equal_model_at_most_at_its_level(n, rate, level):
    """The exact probability, summed over all numbers of disagreements."""
    size = 0.0
    for m in range(int(stats.binom.isf(1e-9, n, rate)) + 1):
        wins = range(m // 2, m + 1)
        fewest = bisect.bisect_left(wins, True, key=lambda w: exact_p_value(w, m - w, n, 0.0, level) <= level)
        if fewest < len(wins):
            size += stats.binom.pmf(m, n, rate) * stats.binom.sf(wins[fewest] - 1, m, 0.5)
    assert size <= level


@pytest.mark.parametrize(("right", "n", "rate"), [(15, 20, 0.5), (60, 100, 0.5), (99, 100, 0.9), (30, 500, 0.04)])
def test_for_scores_of_0_and_1_gaffkes_p_value_is_clopper_and_pearsons(right, n, rate):
    scores = np.r_[np.ones(right), np.zeros(n - right)]
    p = stats.binomtest(right, n, rate, alternative="greater").pvalue
    assert gaffke_p_value(scores - rate, -rate) == pytest.approx(p, rel=0.01)


def test_gaffkes_p_value_is_the_probability_of_a_weighted_sum():
    rng = np.random.default_rng(0)
    values = rng.normal(0.1, 0.3, 40)
    weights = rng.exponential(size=(400_000, 41))
    drawn = (weights @ np.append(values, -1.1) <= 0).mean()
    assert gaffke_p_value(values, -1.1) == pytest.approx(drawn, rel=0.03)
    assert gaffke_p_value(values, -1.1, times=3) == pytest.approx(gaffke_p_value(np.tile(values, 3), -1.1))


def test_the_plan_names_the_gain_that_can_be_shown():
    gain = smallest_gain(500, 0.025, 0.0, "token_f1", 1.0)
    assert (
        rows(np.full(500, gain * 1.01)).p_above(0, 0.025) <= 0.025 < rows(np.full(500, gain * 0.99)).p_above(0, 0.025)
    )
    gain, rng = smallest_gain(500, 0.025, 0.0, "exact_match", 1.0), np.random.default_rng(6)
    counts = rng.multinomial(500, [(0.1 + gain) / 2, (0.1 - gain) / 2, 0.9], 400)
    assert 0.74 < np.mean([exact_p_value(int(w), int(lost), 500, 0.0, 0.025) <= 0.025 for w, lost, _ in counts]) < 0.86
