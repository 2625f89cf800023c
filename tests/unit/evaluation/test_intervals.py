"""The intervals of scores and of differences: they cover what they promise."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats

from loraflow.evaluation.evidence import Evidence, mean_interval
from loraflow.evaluation.intervals import ratio_interval, tango_bound
from loraflow.evaluation.score import summarise

FILE = Path(__file__).parents[3] / "benchmarks" / "gate_intervals.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("gate_intervals", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of(differences, **settings):
    values = np.asarray(differences, float)
    return Evidence(values, np.ones(len(values)), settings.pop("reach", 1.0), rows=len(values), **settings)


def test_intervals_of_graded_scores_cover_their_mean(benchmark):
    """The percentile interval with the t interval, as before, covered 91 % where 95 of 100 scores are 1."""
    rng = np.random.default_rng(0)
    for name, draw in benchmark.SCORES.items():
        truth = float(np.mean([draw(rng, 100_000).mean() for _ in range(10)]))
        found = [benchmark.covers(benchmark.Sample(draw(rng, 100), truth)) for _ in range(500)]
        assert np.mean(found) >= 0.93, name


@pytest.mark.parametrize(
    "name", ["normal, spread 0.2", "F1 of two models", "90 % are 0", "95 % are 0", "failures in 3 %"]
)
def test_intervals_of_differences_cover_the_true_difference(benchmark, name):
    rng, draw = np.random.default_rng(1), benchmark.DIFFERENCES[name]
    truth = float(np.mean([draw(rng, 100_000).mean() for _ in range(10)]))
    found = [of(draw(rng, 100)).interval(0.95) for _ in range(300)]
    assert 0.92 <= np.mean([low <= truth <= high for _, low, high in found]) <= 0.99


def test_the_interval_of_macro_f1_covers_the_value_of_very_many_rows(benchmark):
    """A percentile bootstrap covered 87 to 90 %, in a short run of `benchmarks/gate_intervals.py`."""
    rng = np.random.default_rng(2)
    assert np.mean([benchmark.macro_f1_covers(rng, 200) for _ in range(500)]) >= 0.925


def test_an_interval_of_values_without_skewness_is_the_t_interval_with_the_correction_for_few_groups():
    values = np.array([-3.0, -1.0, 0.0, 1.0, 3.0]) + 10
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    ends = [10 + (end - 10) * 5 / 4 for end in expected]
    assert mean_interval(values, 0.9)[1:] == pytest.approx(ends)


def test_the_correction_is_a_third_of_halls():
    """Hall's interval by its definition: the transformed t value has a t distribution."""
    values = np.random.default_rng(3).exponential(1.0, 40)
    n, mean, spread = 40, values.mean(), values.std(ddof=1) * 40 / 39
    skew = float(((values - mean) ** 3).mean()) / float(values.std()) ** 3 / np.sqrt(n)

    def transformed(true):
        t = (mean - true) / (spread / np.sqrt(n))
        return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6

    t = float(stats.t.ppf(0.975, n - 1))
    hall = [optimize.brentq(lambda m, e=end: transformed(m) - e, mean - 3, mean + 3) for end in (t, -t)]
    plain = [mean - t * spread / np.sqrt(n), mean + t * spread / np.sqrt(n)]
    assert ratio_interval(values, np.ones(n), 0.95, skewness=1.0).high == pytest.approx(hall[1])
    _, low, high = ratio_interval(values, np.ones(n), 0.95)
    assert low == pytest.approx(min(plain[0], plain[0] + (hall[0] - plain[0]) / 3))
    assert high == pytest.approx(plain[1] + (hall[1] - plain[1]) / 3)


@pytest.mark.parametrize("factor", [1e-90, 1e-3, 1e60, 1e99])
def test_an_interval_scales_with_the_values(factor):
    values = np.random.default_rng(4).beta(0.5, 2, 30)
    assert ratio_interval(values * factor, np.ones(30), 0.95) == pytest.approx(
        [end * factor for end in ratio_interval(values, np.ones(30), 0.95)]
    )


def test_with_few_rows_that_differ_the_interval_is_between_the_gates_bounds():
    """Three changed rows of a hundred say little about the spread; the t interval would cover 86 %."""
    few, none = of([0.5] * 3 + [0.0] * 97), of([0.0] * 100)
    assert few.interval(0.95)[1:] == pytest.approx(few.bounds(0.975)[1:])
    assert -0.05 < none.interval(0.95).low < -0.03, "1 - 0.025 ** (1 / 100): a failure that no row shows"
    wins = of([1.0] * 20 + [-1.0] * 5 + [0.0] * 75, binary=True).interval(0.95)
    assert wins[1:] == pytest.approx([tango_bound(20, 5, 100, 0.975), -tango_bound(5, 20, 100, 0.975)])


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_few_rows_that_differ_are_counted_where_weights_are_unequal(share):
    """Each row's difference times its tokens is another number, so sums of rows say nothing about how many differ."""
    rng, covered = np.random.default_rng(5), []
    for _ in range(300):
        tokens = np.ceil(rng.lognormal(3.5, 0.8, 100))
        values = np.where(rng.random(100) < share, -0.5, 0.01)
        _, low, high = Evidence(values * tokens, tokens, 1.0, rows=100).interval(0.95)
        covered.append(low <= 0.01 - 0.51 * share <= high)
    assert np.mean(covered) >= 0.97
    values, tokens = np.r_[[-0.5] * 3, [0.01] * 97], np.arange(1.0, 101.0)
    few = Evidence(values * tokens, tokens, 1.0, rows=100)
    assert few.interval(0.95) == few.bounds(0.975)
    nothing = Evidence(np.r_[values * tokens, 0.0], np.r_[tokens, 0.0], 1.0, rows=101)
    assert nothing.interval(0.95) == nothing.bounds(0.975), "a row without tokens is no row that differs"


@pytest.mark.parametrize(
    "values", [[0.5] * 50, [0.0] * 50, [0.1, 0.2, 0.4, 0.8], [0.1, 0.3]], ids=["equal", "zero", "four", "two"]
)
def test_without_a_range_an_interval_that_says_nothing_is_infinite(values):
    unknown, known = of(values, reach=None), of(values)
    assert unknown.interval(0.95)[1:] == (-np.inf, np.inf)
    assert np.isfinite(known.interval(0.95)).all()


def test_without_a_range_an_interval_of_rows_that_differ_is_that_of_the_values():
    values = np.random.default_rng(6).normal(0.1, 1.0, 50)
    assert of(values, reach=None).interval(0.95) == of(values, reach=10.0).interval(0.95)


def test_an_interval_stays_within_the_scores_range():
    assert mean_interval(np.array([0.9, 1, 1]), 0.95).high > 1, "a score of one's own without a range"
    several = np.array([0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1])
    assert mean_interval(several, 0.95).high > 1 == mean_interval(several, 0.95, largest=1.0).high
    assert mean_interval(np.array([0.9, 1, 1]), 0.95, largest=1.0).high < 1, "Gaffke's bound"
    assert 0 <= mean_interval(np.array([0, 0, 20.0]), 0.95, largest=100.0).low < 1
    table = pd.DataFrame({"id": list("abcdefgh"), "token_f1": several, "chrf": 100 * several, "finish": ["stop"] * 8})
    found = summarise(table, 0.95)
    assert (found["token_f1"].high, found["chrf"].high) == (1.0, 100.0)


@pytest.mark.filterwarnings("error")
def test_an_interval_of_rows_of_which_one_has_nearly_all_of_the_weight_has_no_ends():
    losses, tokens = np.array([1.0, 2.0, 3.0, 4.0]), np.array([97.0, 1.0, 1.0, 1.0])
    assert mean_interval(losses, 0.95, tokens) == pytest.approx((1.06, -np.inf, np.inf))
    groups = np.repeat([0, 1, 2, 3], [97, 1, 1, 1])
    assert mean_interval(np.linspace(0, 1, 100), 0.95, groups=groups, largest=1.0)[1:] == (0.0, 1.0)
    assert np.isfinite(mean_interval(losses, 0.95, np.ones(4))).all(), "rows of equal weight"


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
    value, low, high = mean_interval(np.array([1.0, 0, 1, 1]), 0.95)
    assert (value, round(low, 4), round(high, 4)) == (0.75, 0.3006, 0.9544)  # Wilson 1927
    scores, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert mean_interval(scores, 0.95, weights)[0] == pytest.approx(11 / 4)


@pytest.mark.parametrize("largest", [1.0, 100.0])
@pytest.mark.parametrize("groups", [None, np.arange(50) // 2])
def test_an_interval_of_scores_that_are_all_0_or_all_as_large_as_possible_is_clopper_and_pearsons(largest, groups):
    """No bound that holds for scores between 0 and `largest` is closer: they may be a rare success, or a rare failure."""
    independent = 50 if groups is None else 25
    for score in (0.0, largest):
        exact = stats.binomtest(independent if score else 0, independent).proportion_ci(0.95, method="exact")
        found = mean_interval(np.full(50, score), 0.95, groups=groups, largest=largest)
        assert found == pytest.approx((score, largest * exact.low, largest * exact.high), rel=5e-3)


def test_an_interval_of_equal_graded_scores_allows_for_other_scores_that_no_row_shows():
    value, low, high = mean_interval(np.full(50, 40.0), 0.95, largest=100.0)
    weights = np.random.default_rng(3).exponential(size=(200_000, 51))  # Gaffke's, with a row of 0, or of 100
    drawn = [weights[:, :50].sum(1) * 40 + weights[:, 50] * unseen for unseen in (0, 100)]
    ends = [np.quantile(mean / weights.sum(1), at) for mean, at in zip(drawn, (0.025, 0.975), strict=True)]
    assert value == 40 and (low, high) == pytest.approx(ends, abs=0.1) and low < 38 and high > 43
    ones = mean_interval(np.ones(50), 0.95, largest=100.0)
    assert 0.9 < ones.low < 1 and 7 < ones.high < 9, "a graded score of 1 in every row is no hit"
    nearly = mean_interval(np.array([0.0] * 49 + [1.0]), 0.95, largest=100.0)
    assert nearly.high > 7, "one row that differs says nothing about larger scores"


@pytest.mark.parametrize(("score", "rows"), [(7.0, 50), (0.35, 21), (2.3456, 21), (3.8368, 242), (0.1, 3)])
def test_equal_scores_without_a_known_range_have_no_interval(score, rows):
    """Sums of rounded numbers differ by 1e-16, which is no spread."""
    scores, tokens = np.full(rows, score), np.random.default_rng(0).integers(1, 60, rows).astype(float)
    for weights in (None, tokens):
        for groups in (None, np.arange(rows) // 3):
            value, low, high = mean_interval(scores, 0.95, weights, groups)
            assert value == pytest.approx(score) and (low, high) == (-np.inf, np.inf)
    table = pd.DataFrame({"id": range(rows), "brevity": scores, "token_loss": scores, "reference_tokens": tokens})
    found = summarise(table.assign(finish="stop"), 0.95)
    assert str(found["brevity"]) == str(found["token_loss"]) == f"{score:.3f} (no interval)"
    assert str(found["perplexity"]) == f"{np.exp(score):.3f} (no interval)"


def test_equal_losses_of_0_have_no_interval():
    assert mean_interval(np.zeros(50), 0.95, np.arange(1.0, 51))[1:] == (-np.inf, np.inf)


@pytest.mark.parametrize("different", [1, 3])
def test_few_scores_that_differ_without_a_known_range_have_the_bounds_of_compare(different):
    """Against a model that scores 0 everywhere, the difference is the score."""
    scores, tokens = np.r_[np.linspace(5, 9, different), np.full(60, 0.5)], np.arange(60.0 + different, 0, -1)
    own, same = mean_interval(scores, 0.95), of(scores, reach=None).interval(0.95)
    assert own == pytest.approx(same) and own.low < 0.5 < own.value < own.high
    loss = mean_interval(scores, 0.95, tokens)
    same = Evidence(scores * tokens, tokens, None, rows=len(scores)).interval(0.95)
    assert loss == pytest.approx((same.value, 0.0, same.high)) and same.low < 0, "a loss is not negative"


@pytest.mark.parametrize("share", [0.9, 0.95, 0.97, 0.98, 0.99])
def test_an_interval_of_graded_scores_of_which_few_differ_covers_their_mean(share):
    """The t interval with Hall's correction covered 80 to 93 % of these."""
    rng = np.random.default_rng(4)
    drawn = np.where(rng.random((300, 100)) < share, 0.0, rng.beta(0.5, 5, (300, 100)))
    found = [mean_interval(scores, 0.95, largest=1.0) for scores in drawn]
    assert np.mean([low <= (1 - share) / 11 <= high for _, low, high in found]) >= 0.92


def test_an_interval_of_a_weighted_mean_is_the_jackknifes_on_a_logarithmic_scale():
    rng = np.random.default_rng(7)
    scores, weights = rng.lognormal(0, 0.5, 30), rng.integers(1, 50, 30).astype(float)
    value, low, high = mean_interval(scores, 0.95, weights)
    left_out = [np.average(np.delete(scores, i), weights=np.delete(weights, i)) for i in range(30)]
    error = np.sqrt(30 / 29 * ((np.array(left_out) - value) ** 2).sum())
    freedom = weights.sum() ** 2 / (weights**2).sum() - 1
    expected = value * np.exp(np.r_[-1, 1] * stats.t.ppf(0.975, freedom) * error / value)
    assert (low, high) == pytest.approx(expected, rel=1e-6)


def test_an_interval_of_rows_in_groups_is_as_wide_as_that_of_the_groups():
    rng = np.random.default_rng(8)
    scores, groups = rng.random(200), np.repeat(np.arange(200), 5)
    once, often = mean_interval(scores, 0.95), mean_interval(np.repeat(scores, 5), 0.95, groups=groups)
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=0.03)
    assert often.value == pytest.approx(once.value)


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
def test_the_interval_of_a_rare_score_of_rows_in_groups_covers_it(share):
    rng = np.random.default_rng(0)
    drawn = np.repeat(rng.random((400, 20)) < share, 2, axis=1).astype(float)  # two equal rows in each group
    found = [mean_interval(scores, 0.95, groups=np.arange(40) // 2) for scores in drawn]
    assert np.mean([low <= share <= high for _, low, high in found]) >= 0.925  # 0.25 if no hit had no width
