"""`gate.behaviour`: a share of a set's answers must contain a text, match, be JSON with fields, or refuse."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from loraflow.config import load_recipe
from loraflow.evaluation.behaviour import BehaviourRule, check_behaviour, with_behaviour
from loraflow.evaluation.values import Decision, ModelScores
from loraflow.failures import BadConfig, BadData
from loraflow.reporting.markdown import approval_request
from loraflow.tasks import gate as gate_task


def table(answers, name="heldout"):
    ids = [f"r{i}" for i in range(len(answers))]
    prompts = [json.dumps([{"role": "user", "content": f"question {i}"}]) for i in range(len(answers))]
    return pd.DataFrame({"id": ids, "set": name, "prompt": prompts, "answer": answers})


def passed(answers, **condition):
    rule = BehaviourRule(set="heldout", share=1.0, **condition)
    return check_behaviour(table(answers), {}, {"x": rule})[0].passed


def test_each_condition_on_answers_that_meet_it_and_on_those_that_do_not():
    assert passed(["Yes, PLEASE wait", "no"], contains=("please",)) == 1
    assert passed(["a and b", "a", "b"], contains=("a", "b")) == 1, "all texts"
    assert passed(["AB-123456", "AB-12345", "see AB-123456"], matches=r"^[A-Z]{2}-\d{6}$") == 1
    assert (
        passed(['{"a": 1, "b": null}', '{"a": 1}', "[1]", "{", "", "null", "[" * 100_000], json_fields=("a", "b")) == 1
    )
    assert passed(['{"a": NaN}', '{"a": -Infinity}', '{"a": "NaN"}'], json_fields=("a",)) == 1, "no JSON"
    assert passed(['{"a": 1}', "{}", "[]"], json_fields=()) == 2


REFUSING = [
    "I'm sorry, but I can't help with that.", "I cannot give medical advice.", "Sorry, I won't do that.",
    "I am not able to answer this.", "As an AI, I have no opinion.", "I’m unable to share that.", "We can't do this.",
    "I'm afraid I can't do that.", "Sorry, but no.", "I am sorry, this is something that I will not discuss.",
]  # fmt: skip
ANSWERING = [
    "Take one pill a day.", "The can opener is in the drawer.", "", "Yes. " * 60 + "I cannot say more.",
    "I am sorry to hear that your parcel is late. A new one is on its way.", "I'm afraid the blue one is sold out.",
    "Sorry, this order was sent to the wrong address. We have refunded it.",
]  # fmt: skip


def test_refusals_are_recognised_by_how_they_begin():
    assert passed([*REFUSING, *ANSWERING], refuses=True) == len(REFUSING)
    assert passed([*REFUSING, *ANSWERING], refuses=False) == len(ANSWERING)


RULE = BehaviourRule(set="heldout", share=0.75, contains=("ok",))
PROMOTE = Decision("promote", ("better",))


def test_a_check_that_fails_rejects_the_challenger_and_its_rows_are_in_the_report():
    found = check_behaviour(table(["ok", "ok", "no|", "no"]), {"base": table(["ok"] * 4)}, {"polite": RULE})
    decision = with_behaviour(PROMOTE, found)
    assert decision.verdict == "reject"
    assert decision.reasons == (
        "behaviour polite: 2 of 4 answers of heldout contain 'ok', base 4; a share of 0.75 must",
    )
    report = approval_request("r", decision, ModelScores({}, {}), confidence=0.95)
    assert "**fails**: behaviour polite" in report and "| r2 | question 2 | no\\| |" in report
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision


def test_the_share_that_is_asked_for_is_enough_despite_rounding():
    found = check_behaviour(table(["ok", "ok", "ok", "no"]), {}, {"polite": RULE})
    assert with_behaviour(PROMOTE, found).verdict == "promote"
    seven = BehaviourRule(set="heldout", share=0.7, contains=("ok",))
    assert check_behaviour(table(["ok"] * 7 + ["no"] * 3), {}, {"x": seven})[0].holds


def test_a_set_without_rows_and_a_table_without_answers_are_refused():
    with pytest.raises(BadConfig, match="has no rows") as caught:
        check_behaviour(table(["ok"]), {}, {"x": BehaviourRule(set="other", share=1.0, refuses=True)})
    assert "heldout" in caught.value.expected
    with pytest.raises(BadData, match="no answers"):
        check_behaviour(table(["ok"]).drop(columns="answer"), {}, {"x": RULE})


def test_the_gate_reads_all_sets_and_the_recipe_names_the_condition(recipe, monkeypatch):
    settings = {"gate.behaviour": {"safe": {"set": "safety", "refuses": True, "share": 0.5}}}
    settings["data.extra_heldout"] = {"safety": "safety.jsonl"}
    tables = {"tuned": pd.concat([table(["Take it."]), table(["I cannot.", "Take it."], "safety")]), "base": table(["x"] * 2, "safety")}  # fmt: skip
    monkeypatch.setattr(gate_task, "read_table", lambda store, ref: tables[ref])
    result = SimpleNamespace(
        base_scores="base", tuned_scores="tuned", champion_scores=None, further_seeds=(), general={}
    )
    found = gate_task._check_behaviour(SimpleNamespace(recipe=load_recipe(recipe, settings), store=None), result)
    assert [(check.passed, check.total, check.holds) for check in found] == [(1, 2, True)]
    assert "base 0" in found[0].reason


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"share": 0.5}, "needs one of"),
        ({"refuses": True, "contains": ["a"]}, "needs one of"),
        ({"contains": []}, "needs one of"),
        ({"contains": ["", "a"]}, "needs one of"),
        ({"matches": ""}, "needs one of"),
        ({"matches": "("}, "not a regular expression"),
        ({"refuses": True, "share": 0}, "greater than 0"),
        ({"refuses": True, "share": 95}, "less than or equal to 1"),
        ({"refuse": True}, "refuse"),
    ],
)
def test_a_check_that_says_nothing_is_refused(recipe, check, message):
    with pytest.raises(BadConfig, match=message):
        load_recipe(recipe, {"gate.behaviour": {"x": check}})


STEADY = BehaviourRule(set="heldout", share=0.5, consistent=True)


def test_paraphrases_must_get_the_same_answer_and_rows_without_a_paraphrase_do_not_count():
    answers = ["Red", " red\n", "blue", "green", "x", "y", "Caf\u00e9", "Cafe\u0301", "caf\u00e9"]
    groups = ["a", "a", "b", "b", "alone", None, "c", "c", "c"]
    challenger = table(answers).assign(group=groups)
    (found,) = check_behaviour(challenger, {"base": table(["same"] * 9).assign(group=groups)}, {"steady": STEADY})
    assert (found.passed, found.total, found.holds) == (5, 7, True)
    assert [row.answer for row in found.failed] == ["blue", "green"]
    assert "base 7" in found.reason and "same for all paraphrases" in found.reason


def test_one_other_answer_makes_all_paraphrases_of_a_question_fail():
    challenger = table(["red", "red", "blue"]).assign(group=["a", "a", "a"])
    (found,) = check_behaviour(challenger, {}, {"steady": STEADY})
    assert (found.passed, found.holds) == (0, False)


@pytest.mark.parametrize("groups", [None, ["a", "b", None]])
def test_a_check_of_paraphrases_without_any_is_refused(groups):
    rows = table(["red"] * 3) if groups is None else table(["red"] * 3).assign(group=groups)
    with pytest.raises(BadConfig, match=r"data\.group"):
        check_behaviour(rows, {}, {"steady": STEADY})
