"""The verdict of the gate: paired scores of the challenger against the base and the champion."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from loraflow.config.evaluation import SCORES
from loraflow.evaluation.behaviour import WorseLimit, find_worse
from loraflow.evaluation.gate import decide, heldout_rows, require_comparable
from loraflow.evaluation.power import HeldoutRows, advice, margin_of_unchanged, rows_for_margin
from loraflow.evaluation.score import summarise
from loraflow.evaluation.values import Decision, MetricValue
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
    challenger, other = table(exact_match=ones, field_f1=ones * 0.5), table(exact_match=zeros, field_f1=ones * 0.9)
    assert gate(challenger, other, guards={"field_f1": 0.01}).verdict == "reject"
    assert gate(challenger, other, guards={"field_f1": 0.5}).verdict == "promote"


def test_lower_is_better_for_a_loss():
    rng = np.random.default_rng(0)
    challenger, other = table(token_loss=rng.uniform(0, 1, 100)), table(token_loss=rng.uniform(2, 3, 100))
    assert gate(challenger, other, primary="token_loss").verdict == "promote"
    assert gate(other, challenger, primary="token_loss").verdict == "reject"


@pytest.mark.parametrize("harm", ["missing", "twice", "nan", "metric"])
def test_incomplete_scores_are_refused(harm):
    challenger, other = table(exact_match=ones.copy()), table(exact_match=zeros)
    if harm == "missing":
        challenger = challenger.iloc[1:]
    elif harm == "twice":
        challenger = pd.concat([challenger, challenger.iloc[:1]])
    elif harm == "nan":
        challenger.loc[0, "exact_match"] = np.nan
    else:
        with pytest.raises(BadConfig, match=r"does not exist(.|\n)*one of exact_match"):
            gate(challenger, other, primary="bleu")
        return
    with pytest.raises(BadData):
        gate(challenger, other)


def test_rows_are_joined_by_id_not_by_order():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, 100).astype(float)
    challenger, other = table(exact_match=scores), table(exact_match=scores)
    shuffled = gate(challenger, other.sample(frac=1, random_state=0))
    assert shuffled.comparisons[0].lower == gate(challenger, other).comparisons[0].lower


@pytest.mark.parametrize("nothing", [None, np.nan, pd.NA, pd.NaT])
def test_a_row_whose_id_is_null_in_both_tables_is_refused(nothing):
    """A join would pair the two nulls with each other."""
    ids = [f"r{i}" for i in range(99)] + [nothing]
    challenger, other = table(exact_match=ones).assign(id=ids), table(exact_match=zeros).assign(id=ids)
    with pytest.raises(BadData, match=r"no valid `id`(.|\n)*in 1 of 100 rows(.|\n)*--force evaluate"):
        gate(challenger, other)


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
def test_a_damaged_score_table_is_refused_with_one_message(harm, both):
    if both and harm in ("another id", "one row less", "one row more", "another set"):
        return  # then the tables agree
    good, base = table(exact_match=ones, set="heldout"), table(exact_match=zeros, set="heldout")
    assert gate(good, base).verdict == "promote"
    others = HARMS[harm](base) if both else base
    for challenger, other in [(HARMS[harm](good), others), *([] if both else [(good, HARMS[harm](base))])]:
        with pytest.raises(BadData) as refusal:
            gate(challenger, other)
        assert refusal.value.where and refusal.value.got and "--force evaluate" in refusal.value.next_step


@pytest.mark.parametrize("who", ["challenger", "base", "champion"])
def test_a_negative_loss_is_refused_but_for_rounding(who):
    """No probability is above 1, so no mean of negative logarithms is below 0. Such a challenger was promoted."""
    losses = {"challenger": ones * 0.5, "base": ones, "champion": ones}
    rounded = {name: table(token_loss=np.where(np.arange(100) == 7, -1e-6, loss)) for name, loss in losses.items()}
    tables = {name: table(token_loss=loss) for name, loss in losses.items()}
    for found in (tables, rounded):
        assert gate(found["challenger"], found["base"], found["champion"], primary="token_loss").verdict == "promote"
    tables[who].loc[7, "token_loss"] = -3.0
    for use in (lambda *given: gate(*given, primary="token_loss"),
                lambda mine, base, champion: require_comparable(mine, {"base": base, "champion": champion}, ["token_loss"])):  # fmt: skip
        with pytest.raises(
            BadData, match=rf"loss is negative(.|\n)*token_loss of {who}(.|\n)*-3(.|\n)*--force evaluate"
        ):
            use(tables["challenger"], tables["base"], tables["champion"])


@pytest.mark.parametrize("sets", [["heldout", None], ["heldout", 1], ["hard", "hard"], []])
def test_rows_without_a_valid_set_are_refused_instead_of_left_out(sets):
    with pytest.raises(BadData, match="set"):
        heldout_rows(pd.DataFrame({"id": [f"r{i}" for i in range(len(sets))], "set": sets}), "the scores")
    with pytest.raises(BadData, match="no column `set`"):
        heldout_rows(table(exact_match=ones), "the scores")


def test_rows_are_paired_by_their_ids():
    rng = np.random.default_rng(0)
    ids = [hashlib.sha256(bytes([i])).hexdigest() for i in range(50)]
    challenger = pd.DataFrame({"id": ids, "f1": rng.random(50)})
    other = pd.DataFrame({"id": ids[::-1], "f1": rng.random(50)})
    pairs = challenger.merge(other, on="id", how="outer", suffixes=("", "_other"))
    compared = gate(challenger, other, primary="f1").comparisons[0]
    assert compared.difference == pytest.approx((pairs["f1"] - pairs["f1_other"]).mean())


def test_a_gain_on_every_row_is_not_shown_where_a_catastrophe_may_be_unseen():
    """With one catastrophe in a hundred rows, 37 of 100 samples of 100 rows have none."""
    for metric, gain in (("token_f1", 0.01), ("token_loss", -0.1)):
        challenger, other = table(**{metric: np.full(100, 0.5 + gain)}), table(**{metric: np.full(100, 0.5)})
        assert gate(challenger, other, primary=metric).verdict == "undecided"


@pytest.mark.parametrize("n", [2, 10, 19])
@pytest.mark.parametrize("metric", ["token_f1", "exact_match", "mine"])
def test_few_rows_are_undecided_whatever_their_scores(metric, n):
    best, worst = table(**{metric: np.ones(n)}), table(**{metric: np.zeros(n)})
    for challenger, other in ((best, worst), (worst, best)):
        decision = gate(challenger, other, primary=metric)
        assert decision.verdict == "undecided" and "20 independent rows" in decision.reasons[0]


@pytest.mark.parametrize(
    ("metric", "column"), [("exact_match", "prompt"), ("token_f1", "group"), ("mine", "prompt"), ("mine", "group")]
)
def test_equal_models_on_rows_in_groups_are_rarely_promoted(metric, column):
    rng = np.random.default_rng(4)
    promoted = 0
    for _ in range(60):
        challenger, other = (np.repeat(rng.integers(0, 2, 60).astype(float), 5) for _ in range(2))
        names = np.repeat([f"g{i}" for i in range(60)], 5)
        decision = gate(
            table(**{metric: challenger, column: names}), table(**{metric: other, column: names}), primary=metric
        )
        promoted += decision.verdict == "promote"
        assert decision.comparisons[0].groups == 60
        assert decision.comparisons[0].effective_rows == pytest.approx(60, rel=0.01)
    assert promoted <= 8, "the 99th percentile of 60 gates at 5 %; rows as if independent give 13"


@pytest.mark.parametrize("metric", [*sorted(set().union(*SCORES.values())), "stops", "mine"])
def test_a_model_that_the_report_shows_as_worse_is_never_promoted(metric):
    """Whatever the rows look like: lengths, losses above the cap, groups."""
    rng = np.random.default_rng(5)
    for attempt in range(12):
        n = 60
        tokens = np.ceil(rng.lognormal(3, 1.5, n))

        tables = []
        for _ in range(2):
            loss = rng.lognormal(0, 1.5, n) * tokens ** rng.choice([-0.5, 0.5])
            own = {} if metric == "stops" else {metric: loss if metric == "token_loss" else rng.beta(0.3, 0.3, n)}
            tables.append(table(**own, finish=rng.choice(["stop", "length"], n), reference_tokens=tokens))
        challenger, other = tables
        if attempt % 2 and metric != "stops":  # better in most rows, much worse in a long one
            better = other[metric] * 0.5 if metric == "token_loss" else other[metric] * 0.5 + 0.5
            challenger = other.assign(**{metric: better})
            challenger.loc[tokens.argmax(), metric] = 600.0 if metric == "token_loss" else 0.0
        reported = [summarise(part, 0.95)[metric].value for part in (challenger, other)]
        worse = reported[0] >= reported[1] if metric == "token_loss" else reported[0] <= reported[1]
        decision = gate(challenger, other, primary=metric, level=0.5)
        assert not (worse and decision.verdict == "promote"), (reported, decision)
        sign = -1 if metric == "token_loss" else 1
        if "capped" not in decision.comparisons[0].reason:
            assert decision.comparisons[0].difference == pytest.approx(sign * (reported[0] - reported[1]))


def test_the_loss_is_weighted_by_tokens_as_in_the_report():
    """The mean of rows improves, the loss of all tokens gets worse."""
    tokens = np.r_[np.full(90, 1.0), np.full(10, 100.0)]
    other = table(token_loss=np.ones(100), reference_tokens=tokens)
    challenger = table(token_loss=np.r_[np.full(90, 0.5), np.full(10, 1.5)], reference_tokens=tokens)
    decision = gate(challenger, other, primary="token_loss")
    assert decision.verdict != "promote" and decision.comparisons[0].difference < -0.4


def test_a_loss_counts_at_most_the_logarithm_of_the_vocabulary():
    other = table(token_loss=np.full(400, 3.0), reference_tokens=np.full(400, 10))
    challenger = other.assign(token_loss=np.r_[np.full(399, 2.0), 40.0])
    found = gate(challenger, other, primary="token_loss", vocabulary=1000).comparisons[0]
    assert found.difference == pytest.approx((399 - (np.log(1000) - 3)) / 400)
    assert "losses capped; uncapped +0.9050" in found.reason and found.state == "passed"
    challenger.loc[399, "token_loss"] = 1000.0  # now the reported loss is worse
    assert gate(challenger, other, primary="token_loss", vocabulary=1000).verdict != "promote"


def test_losses_per_token_of_different_tokenizers_are_not_compared():
    """The challenger's tokenizer writes twice the tokens: the same likelihood of each text is half the loss per token."""
    other = table(token_loss=np.full(400, 2.0), reference_tokens=np.full(400, 10), exact_match=np.zeros(400))
    challenger = table(token_loss=np.full(400, 1.0), reference_tokens=np.full(400, 20), exact_match=np.ones(400))
    for rules in ({"primary": "token_loss"}, {"guards": {"token_loss": 0.1}}):
        with pytest.raises(BadConfig, match=r"different tokens(.|\n)*400 of 400 rows; 8000 and 4000 tokens"):
            gate(challenger, other, **rules)
    with pytest.raises(BadConfig, match=r"different tokens \(another tokenizer or chat template\)"):
        require_comparable(challenger.assign(set="heldout"), {"champion": other.assign(set="heldout")}, {"token_loss"})
    with pytest.raises(BadConfig, match=r"different tokens \(another tokenizer or chat template\)"):
        find_worse(challenger, {"champion": other}, {"token_loss": WorseLimit(0.5, 1)})
    assert gate(challenger, other).verdict == "promote", "answers can be compared"


@pytest.mark.parametrize("column", ["nll", "reference_tokens", "answer_tokens"])
def test_a_column_that_is_no_score_decides_nothing(column):
    """The report does not show it, and a higher `nll` would be taken for a better one."""
    with pytest.raises(BadConfig, match="does not exist"):
        gate(table(**{column: ones}), table(**{column: zeros}), primary=column)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e99])
def test_scores_of_any_size_are_decided_alike(scale):
    rng = np.random.default_rng(0)
    gains = rng.normal(0.2, 1, (3, 60))
    for values in gains:
        found, expected = (gate(table(mine=values * by), table(mine=zeros[:60]), primary="mine") for by in (scale, 1.0))
        assert found.verdict == expected.verdict
        tolerance = 1e-3 if scale < 1e-300 else 1e-9  # such small numbers have few digits
        assert found.comparisons[0].p_value == pytest.approx(expected.comparisons[0].p_value, rel=tolerance)
    with pytest.raises(BadData, match=r"too large(.|\n)*1e\+308 in row r0"):
        gate(table(mine=np.r_[1e308, values]), table(mine=np.zeros(61)), primary="mine")


@pytest.mark.parametrize("groups", [None, 50])
@pytest.mark.parametrize("scale", [1.0, 0.9])
def test_a_score_without_a_known_range_confirms_nothing(groups, scale):
    """A row in a hundred with -9 is missing in a third of samples of 100 rows, also if all others are 0 or 1."""
    group = {} if groups is None else {"group": [f"g{i % groups}" for i in range(len(ones))]}
    challenger, other = (table(mine=scale * scores, exact_match=scores, **group) for scores in (ones, zeros))
    reason = "the range of mine is not known, so no claim about it is confirmed: set gate.ranges"
    gained = gate(challenger, other, primary="mine")
    assert gained.verdict == "undecided" and reason in gained.reasons[0] and gained.comparisons[0].rows_needed is None
    guarded = gate(challenger, other, primary="exact_match", guards={"mine": 0.5})
    assert [comparison.state for comparison in guarded.comparisons] == ["passed", "open"] and reason in guarded.reasons[
        0
    ]
    assert advice(guarded, HeldoutRows(1000)) == [
        "set gate.ranges: the smallest and largest value of mine (the training stays cached)"
    ]
    refuted = gate(other, challenger, primary="mine")
    assert refuted.verdict == "reject" and reason not in str(refuted.reasons), "what was seen is enough"
    known = gate(challenger, other, primary="mine", ranges={"mine": (0.0, 1.0)})
    assert known.verdict == "promote" and "gate.ranges" not in str(known.reasons)


def test_bounds_that_do_not_exist_are_null_in_json_with_a_reason_and_earlier_documents_are_read():
    decision = gate(table(mine=np.arange(3.0)), table(mine=np.zeros(3)), primary="mine")
    assert decision.comparisons[0].upper == np.inf and "no bound from 3 independent rows" in decision.reasons[0]
    written = json.dumps(decision.to_dict(), allow_nan=False)
    assert json.loads(written)["comparisons"][0]["upper"] is None
    assert Decision.from_dict(json.loads(written)) == decision
    earlier = json.loads(written.replace("null", "Infinity"))
    earlier["comparisons"][0]["lower"] = -np.inf
    assert Decision.from_dict(earlier) == decision
    value = MetricValue(value=0.5, low=-np.inf, high=np.inf, n=1)
    assert json.loads(json.dumps(value.model_dump(), allow_nan=False)) == {
        "value": 0.5,
        "low": None,
        "high": None,
        "n": 1,
    }
    assert MetricValue.model_validate(value.model_dump()) == value
    assert MetricValue.model_validate_json('{"value": 0.5, "low": -Infinity, "high": Infinity, "n": 1}') == value


def test_a_range_that_the_recipe_says_allows_for_failures_that_no_row_shows():
    """A gain on 50 rows of 50 by 0.1 of 1: if one row in a hundred loses 1, it is seen in 39 % of samples only."""
    challenger, other = table(mine=np.full(50, 0.91) + np.arange(50) * 1e-4), table(mine=np.full(50, 0.9))
    ranged = gate(challenger, other, primary="mine", ranges={"mine": (0.0, 1.0)}).comparisons[0]
    assert ranged.state == "open" and "gate.ranges" not in ranged.reason
    like = gate(
        challenger.rename(columns={"mine": "token_f1"}), other.rename(columns={"mine": "token_f1"}), primary="token_f1"
    )
    assert ranged.lower == like.comparisons[0].lower, "as a built-in score between 0 and 1"
    moved = {"mine": (-50.0, 50.0)}
    wide = gate(
        challenger.assign(mine=100 * challenger["mine"] - 50),
        other.assign(mine=100 * other["mine"] - 50),
        primary="mine",
        ranges=moved,
    )
    assert wide.comparisons[0].p_value == pytest.approx(ranged.p_value)
    two = gate(table(mine=ones), table(mine=zeros), primary="mine", ranges={"mine": (-100.0, 1.0)})
    assert two.verdict != "promote", "0 and 1 in these rows only"
    for where, tables in {
        "challenger": (challenger.assign(mine=2.0), other),
        "base": (challenger, other.assign(mine=-1.0)),
    }.items():
        with pytest.raises(BadData, match=rf"outside of the range(.|\n)*mine of {where}(.|\n)*in 50 of 50 rows"):
            require_comparable(tables[0], {"base": tables[1]}, {"mine"}, {"mine": (0.0, 1.0)})


@pytest.mark.parametrize(("scale", "shown"), [(1.0, "+0.5000 ["), (1e-5, "+5e-06 ["), (1e9, "+5e+08 [")])
def test_a_difference_is_shown_with_its_digits_whatever_its_size(scale, shown):
    challenger, other = table(mine=scale * (0.5 + 0.1 * (np.arange(100) % 2))), table(mine=np.full(100, scale * 0.05))
    assert f"mine against base: {shown}" in gate(challenger, other, primary="mine").reasons[0]


def test_the_reason_that_trust_md_explains_is_one_that_the_gate_gives():
    """37 rows are won and 12 lost of 500."""
    text = (Path(__file__).parents[3] / "docs" / "trust.md").read_text()
    challenger = table(exact_match=np.r_[np.ones(37), np.zeros(463)])
    other = table(exact_match=np.r_[np.zeros(37), np.ones(12), np.zeros(451)])
    [reason] = gate(challenger, other, level=0.025, look="look 1 of 365").reasons
    assert f"\n{reason}\n" in text
    for part in re.findall(r"[+][0-9.]+ |\[.*?\]|p [0-9.]+|0[.]025 allowed|look 1 of 365", reason):
        assert f"| `{part.strip()}` |" in text


def test_stops_can_be_a_guard():
    challenger, other = table(exact_match=ones, finish="length"), table(exact_match=zeros, finish="stop")
    assert gate(challenger, other, guards={"stops": 0.05}).verdict == "reject"
    assert gate(challenger.assign(finish="stop"), other, guards={"stops": 0.05}).verdict == "promote"


@pytest.mark.parametrize("metric", ["exact_match", "token_f1", "chrf"])
@pytest.mark.parametrize("margin", [0.01, 0.03])
def test_unchanged_outputs_pass_a_guard_from_the_number_of_rows_that_the_plan_names(metric, margin):
    margin = margin * 100 if metric == "chrf" else margin
    enough, known = rows_for_margin(margin, 0.95, metric), {"mine": (0.0, 1.0)}
    for n, verdict in ((enough, "promote"), (enough - 2, "undecided")):
        same = table(**{metric: np.zeros(n), "mine": np.zeros(n)})
        assert (
            gate(same.assign(mine=1.0), same, primary="mine", guards={metric: margin}, ranges=known).verdict == verdict
        )
    assert margin_of_unchanged(enough, 0.95, metric) < margin


def test_undecided_names_the_rows_that_would_be_enough():
    other = table(exact_match=np.r_[np.zeros(60), np.ones(40)])
    challenger = other.assign(exact_match=np.r_[np.ones(5), np.zeros(55), np.ones(39), 0])
    decision = gate(challenger, other, level=0.025)
    assert decision.verdict == "undecided" and "about 200 such rows would be enough" in decision.reasons[0]
    twice = [pd.concat([t, t.assign(id=t["id"] + "x")]) for t in (challenger, other)]
    assert gate(*twice, level=0.025).verdict == "promote"


def test_a_look_without_error_left_promotes_nothing():
    decision = gate(table(exact_match=ones), table(exact_match=zeros), level=0.0, look="look 366 of 365")
    assert decision.verdict == "undecided" and "gate.error is used up at look 366 of 365" in decision.reasons[0]


def test_one_of_many_guards_is_refuted_only_beyond_chance():
    """Holm: with ten claims, a p-value of 0.02 that one is wrong is no reason to reject."""
    guards = {f"g{i}": 0.0 for i in range(9)}
    columns = {name: np.tile([0.0, 1.0], 50) for name in guards}
    other = table(exact_match=zeros, **columns)
    challenger = other.assign(exact_match=1.0)
    challenger.loc[[1, 3, 5, 7, 9], "g0"] = 0.0  # five losses, no win: p about 0.01
    assert gate(challenger, other, guards={"g0": 0.0}).verdict == "reject"
    assert gate(challenger, other, guards=guards).verdict == "undecided"
