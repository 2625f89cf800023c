import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loraflow.evaluation.gate import decide
from loraflow.evaluation.intervals import difference_bounds, mean_interval, tango_bound
from loraflow.failures import BadConfig, BadData


def table(**columns):
    n = len(next(iter(columns.values())))
    return pd.DataFrame({"id": [f"r{i}" for i in range(n)], **columns})


def gate(challenger, base, champion=None, **rules):
    others = {"base": base} | ({"champion": champion} if champion is not None else {})
    rules = {"primary": "exact_match", "min_gain": 0.0, "guards": {}, "confidence": 0.95} | rules
    return decide(challenger, others, **rules)


ones, zeros = np.ones(100), np.zeros(100)


def test_a_clear_gain_is_promoted():
    assert gate(table(exact_match=ones), table(exact_match=zeros)).verdict == "promote"


def test_a_clear_drop_is_rejected():
    decision = gate(table(exact_match=zeros), table(exact_match=ones))
    assert decision.verdict == "reject"
    assert "exact_match against base: -1.0000" in decision.reasons[0]


def test_equal_scores_are_not_a_gain():
    scores = np.tile([0.0, 1.0], 50)
    assert gate(table(exact_match=scores), table(exact_match=scores)).verdict != "promote"


def test_a_small_gain_on_few_rows_is_undecided():
    assert (
        gate(table(exact_match=np.array([1.0, 1, 0, 1])), table(exact_match=np.array([1.0, 0, 0, 1]))).verdict
        == "undecided"
    )


def test_better_than_base_but_worse_than_champion_is_rejected():
    half = np.tile([0.0, 1.0], 50)
    assert gate(table(exact_match=half), table(exact_match=zeros), table(exact_match=ones)).verdict == "reject"


def test_a_guard_that_drops_by_more_than_its_margin_prevents_promotion():
    ours, theirs = table(exact_match=ones, f1=ones * 0.5), table(exact_match=zeros, f1=ones * 0.9)
    assert gate(ours, theirs, guards={"f1": 0.01}).verdict == "reject"
    assert gate(ours, theirs, guards={"f1": 0.5}).verdict == "promote"


def test_lower_is_better_for_a_loss():
    rng = np.random.default_rng(0)
    ours, theirs = table(token_loss=rng.uniform(0, 1, 100)), table(token_loss=rng.uniform(2, 3, 100))
    assert gate(ours, theirs, primary="token_loss").verdict == "promote"
    assert gate(theirs, ours, primary="token_loss").verdict == "reject"


@pytest.mark.parametrize("harm", ["missing", "twice", "nan", "metric"])
def test_incomplete_scores_are_refused(harm):
    ours, theirs = table(exact_match=ones.copy()), table(exact_match=zeros)
    if harm == "missing":
        ours = ours.iloc[1:]
    elif harm == "twice":
        ours = pd.concat([ours, ours.iloc[:1]])
    elif harm == "nan":
        ours.loc[0, "exact_match"] = np.nan
    else:
        with pytest.raises(BadConfig, match=r"does not exist(.|\n)*one of exact_match"):
            gate(ours, theirs, primary="bleu")
        return
    with pytest.raises(BadData):
        gate(ours, theirs)


def test_rows_are_joined_by_id_not_by_order():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, 100).astype(float)
    ours, theirs = table(exact_match=scores), table(exact_match=scores)
    shuffled = gate(ours, theirs.sample(frac=1, random_state=0))
    assert shuffled.comparisons[0].lower == gate(ours, theirs).comparisons[0].lower


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


@pytest.mark.parametrize(("n", "discordance"), [(50, 0.04), (100, 0.1), (300, 0.2)])
def test_an_equal_model_is_promoted_in_five_percent_of_cases(n, discordance):
    rng = np.random.default_rng(1)
    promoted = sum(
        difference_bounds(
            rng.choice([-1.0, 0.0, 1.0], n, p=[discordance / 2, 1 - discordance, discordance / 2]), 0.95, 0
        )[1]
        > 0
        for _ in range(2000)
    )
    assert promoted / 2000 <= 0.065


def test_an_equal_model_is_rarely_promoted_by_graded_scores():
    rng = np.random.default_rng(2)
    promoted = sum(difference_bounds(rng.normal(0, 0.2, 60), 0.95, seed)[1] > 0 for seed in range(400))
    assert promoted / 400 <= 0.075


def test_the_interval_of_a_mean_is_wilsons_or_weighted():
    value, low, high = mean_interval(np.array([1.0, 0, 1, 1]), 0.95, 0)
    assert (value, round(low, 4), round(high, 4)) == (0.75, 0.3006, 0.9544)  # Wilson 1927
    scores, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0])
    assert mean_interval(scores, 0.95, 0, weights)[0] == pytest.approx(11 / 4)
