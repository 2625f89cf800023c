import hashlib

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loraflow.evaluation.gate import decide, heldout_rows
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


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA, pd.NaT])
def test_a_row_whose_id_is_null_in_both_tables_is_refused(nothing):
    """A join would pair the two nulls with each other."""
    ids = [f"r{i}" for i in range(99)] + [nothing]
    ours, theirs = table(exact_match=ones).assign(id=ids), table(exact_match=zeros).assign(id=ids)
    with pytest.raises(BadData, match=r"no valid `id`(.|\n)*in 1 of 100 rows(.|\n)*--force evaluate"):
        gate(ours, theirs)


HARMS = {
    "null in one table": lambda t: t.assign(id=[None, *t["id"][1:]]),
    "a number as id": lambda t: t.assign(id=[7, *t["id"][1:]]),
    "numbers as ids": lambda t: t.assign(id=range(len(t))),
    "no id column": lambda t: t.drop(columns="id"),
    "a duplicated id": lambda t: t.assign(id=["r1", *t["id"][1:]]),
    "another id": lambda t: t.assign(id=["other", *t["id"][1:]]),
    "one row less": lambda t: t.iloc[1:],
    "one row more": lambda t: pd.concat([t, t.iloc[:1].assign(id="more")]),
    "no rows": lambda t: t.iloc[:0],
    "a score that is null": lambda t: t.assign(exact_match=[None, *t["exact_match"][1:]]).astype({"exact_match": "Float64"}),
    "a score that is NaN": lambda t: t.assign(exact_match=[np.nan, *t["exact_match"][1:]]),
    "an infinite score": lambda t: t.assign(exact_match=[np.inf, *t["exact_match"][1:]]),
    "scores as texts": lambda t: t.assign(exact_match="1.0"),
    "scores as objects": lambda t: t.assign(exact_match=pd.Series(t["exact_match"], dtype=object)),
    "scores as complex numbers": lambda t: t.assign(exact_match=t["exact_match"].astype(complex)),
    "another set": lambda t: t.assign(set=["hard", *t["set"][1:]]),
    "a duplicated column": lambda t: pd.concat([t, t[["exact_match"]]], axis=1),
}  # fmt: skip


@pytest.mark.parametrize("both", [False, True], ids=["one table", "both tables"])
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_score_table_is_refused_with_one_message(harm, both):
    if both and harm in ("another id", "one row less", "one row more", "another set"):
        return  # then the tables agree
    good, base = table(exact_match=ones, set="heldout"), table(exact_match=zeros, set="heldout")
    assert gate(good, base).verdict == "promote"
    others = HARMS[harm](base) if both else base
    for ours, theirs in [(HARMS[harm](good), others), *([] if both else [(good, HARMS[harm](base))])]:
        with pytest.raises(BadData) as refusal:
            gate(ours, theirs)
        assert refusal.value.where and refusal.value.got and "--force evaluate" in refusal.value.next_step


@pytest.mark.parametrize("sets", [["heldout", None], ["heldout", 1], ["hard", "hard"], []])
def test_rows_without_a_valid_set_are_refused_instead_of_left_out(sets):
    with pytest.raises(BadData, match="set"):
        heldout_rows(pd.DataFrame({"id": [f"r{i}" for i in range(len(sets))], "set": sets}), "the scores")
    with pytest.raises(BadData, match="no column `set`"):
        heldout_rows(table(exact_match=ones), "the scores")


def test_rows_are_paired_in_the_order_of_their_ids():
    """Bootstrap bounds depend on the order, so it must not change."""
    rng = np.random.default_rng(0)
    ids = [hashlib.sha256(bytes([i])).hexdigest() for i in range(50)]
    ours = pd.DataFrame({"id": ids, "f1": rng.random(50)})
    theirs = pd.DataFrame({"id": ids[::-1], "f1": rng.random(50)})
    pairs = ours.merge(theirs, on="id", how="outer", suffixes=("", "_other"))
    bounds = difference_bounds((pairs["f1"] - pairs["f1_other"]).to_numpy(), 0.95, 0)
    compared = gate(ours, theirs, primary="f1").comparisons[0]
    assert (compared.difference, compared.lower, compared.upper) == tuple(bounds)
