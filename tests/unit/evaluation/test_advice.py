"""The next steps that a report names after `undecided`, by the comparisons that were inconclusive."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from loraflow.evaluation.gate import decide
from loraflow.evaluation.guards import GeneralGuard
from loraflow.evaluation.power import HeldoutRows, advice
from loraflow.evaluation.values import Decision


def table(right, n, group=None):
    return pd.DataFrame(
        {"id": [f"r{i}" for i in range(n)], "exact_match": (np.arange(n) < right).astype(float)}
        | ({} if group is None else {"group": [f"g{i // group}" for i in range(n)]})
    )


def decided(challenger, base, **rules):
    given = {"primary": "exact_match", "min_gain": 0.0, "guards": {}, "confidence": 0.95, **rules}
    return decide(challenger, {"base": base}, **given)


def said(decision, available=100, deals_rows=False):
    assert decision.verdict == "undecided", decision.reasons
    return advice(decision, HeldoutRows(available, deals_rows))


SMALL_GAIN = decided(table(52, 100), table(50, 100))


def test_too_few_rows_ask_for_more_of_them_where_they_are():
    (scored,) = said(SMALL_GAIN, available=400)
    assert scored.startswith("raise evaluation.max_rows (about 200 are needed, 100 were scored)")
    (few,) = said(SMALL_GAIN, available=150)
    assert few.startswith(
        "raise evaluation.max_rows, and add held-out rows (about 200 are needed, 100 were scored): there are 150"
    )
    assert said(SMALL_GAIN) == ["add held-out rows (about 200 are needed, 100 were scored)"]
    (dealt,) = said(SMALL_GAIN, available=400, deals_rows=True)
    assert "data.heldout_reserve" in dealt and "max_rows" not in dealt


def test_two_claims_that_need_rows_ask_for_the_larger_number_once():
    gain, guard = SMALL_GAIN.comparisons[0], replace(SMALL_GAIN.comparisons[0], kind="guard", rows_needed=130)
    for claims in ([gain, guard], [guard, gain]):
        both = replace(SMALL_GAIN, comparisons=claims)
        assert said(both) == ["add held-out rows (about 200 are needed, 100 were scored)"]
        (step,) = said(both, available=150)
        assert step.startswith("raise evaluation.max_rows, and add held-out rows (about 200 are needed")


def test_scoring_more_rows_is_not_advised_for_a_model_that_is_not_better():
    (step,) = said(decided(table(50, 100), table(50, 100)))
    assert step.startswith("more rows like these would not confirm exact_match: train a better model")


def test_a_look_without_error_asks_for_rows_that_were_never_scored():
    (step,) = said(decided(table(90, 100), table(50, 100), level=0.0))
    assert "never scored" in step


def test_a_guard_that_rows_would_confirm_asks_for_rows_although_no_error_is_left():
    gain, guard = said(decided(table(50, 100), table(50, 100), level=0.0, guards={"exact_match": 0.01}))
    assert "never scored" in gain and guard.startswith("add held-out rows")


def test_rows_of_few_groups_ask_for_other_groups():
    (step,) = said(decided(table(90, 100, group=10), table(50, 100, group=10)))
    assert step == (
        "add held-out rows of other groups (of near-duplicates, or of data.group): these belong to 10, and 20 are needed"
    )


def test_general_rows_are_asked_for_in_their_own_file():
    def loss(n):
        return table(0, n).assign(accuracy=1.0)

    guard = GeneralGuard("general_accuracy", "accuracy", 0.02, loss(50), {"base": loss(50)})
    (step,) = said(decided(table(90, 100), table(50, 100), general=[guard]))
    assert step.startswith("add rows to the file of evaluation.general (about ") and "50 were scored" in step


def test_another_promotion_asks_to_run_again_and_a_worse_seed_for_another_training():
    confirmed = decided(table(90, 100), table(50, 100))
    assert said(confirmed.overruled("undecided", "another run promoted a model")) == [
        "run again: the stages are cached, and the gate compares with the new champion"
    ]
    seeds = Decision("undecided", ("exact_match against base: -0.01 for the model of seed 1", "the mean of 3 models"), confirmed.comparisons)  # fmt: skip
    assert "another training" in said(seeds)[0]


@pytest.mark.parametrize("verdict", ["promote", "reject", "unchanged"])
def test_other_verdicts_need_no_advice(verdict):
    assert advice(SMALL_GAIN.overruled(verdict, "x"), HeldoutRows(100)) == []
