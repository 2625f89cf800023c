"""`gate.worst` limits how many rows may get much worse, and the report lists them."""

import json

import numpy as np
import pandas as pd
import pytest

from loraflow.config import load_recipe
from loraflow.evaluation.behaviour import LISTED, WorseLimit, find_worse, with_worse_rows
from loraflow.evaluation.gate import decide
from loraflow.evaluation.values import Decision
from loraflow.failures import BadConfig, BadData
from loraflow.reporting.markdown import approval_request
from loraflow.tasks.gate import _protocol


def table(scores, metric="field_f1"):
    prompts = [json.dumps([{"role": "user", "content": f"question {i}"}]) for i in range(len(scores))]
    ids = [f"r{i:03d}" for i in range(len(scores))]
    return pd.DataFrame({"id": ids, "prompt": prompts, "answer": "an | answer", metric: scores})


def decided(challenger, other, limit, metric="field_f1", **others):
    rules = {"primary": metric, "min_gain": 0.0, "guards": {}, "confidence": 0.95}
    tables = {"base": table(other, metric)} | {name: table(scores, metric) for name, scores in others.items()}
    decision = decide(table(challenger, metric), tables, **rules)
    return with_worse_rows(decision, find_worse(table(challenger, metric), tables, {metric: limit}))


BETTER, BEFORE = np.full(200, 0.9), np.full(200, 0.5)


def with_failures(count):
    scores = BETTER.copy()
    scores[:count] = 0.0
    return scores


def test_a_challenger_that_fails_on_more_rows_than_allowed_is_rejected_although_the_mean_is_better():
    assert decided(with_failures(3), BEFORE, WorseLimit(0.5, rows=3)).verdict == "promote"
    rejected = decided(with_failures(4), BEFORE, WorseLimit(0.5, rows=3))
    assert rejected.verdict == "reject" and rejected.comparisons[0].state == "passed"
    assert "4 of 200 rows got worse by 0.5 or more, 3 allowed: r000, r001" in rejected.reasons[0]


def test_a_share_counts_the_rows_that_are_compared():
    assert decided(with_failures(4), BEFORE, WorseLimit(0.5, share=0.02)).verdict == "promote"
    assert decided(with_failures(5), BEFORE, WorseLimit(0.5, share=0.02)).verdict == "reject"
    assert decided(with_failures(1), BEFORE, WorseLimit(0.5, share=0.0)).verdict == "reject"


def test_a_drop_of_exactly_the_bound_counts_despite_rounding():
    challenger, other = np.full(200, 0.4), np.full(200, 0.9)
    assert find_worse(table(challenger), {"base": table(other)}, {"field_f1": WorseLimit(0.5, rows=0)})[0].count == 200


def test_a_higher_loss_is_worse_and_each_model_is_compared():
    challenger, other, champion = np.full(200, 1.0), np.full(200, 2.0), np.full(200, 1.5)
    challenger[7], champion[9] = 9.0, 0.2
    tables = {"base": table(other, "token_loss"), "champion": table(champion, "token_loss")}
    worse = find_worse(table(challenger, "token_loss"), tables, {"token_loss": WorseLimit(0.5, rows=9)})
    assert [[row.id for row in found.rows] for found in worse] == [["r007"], ["r007", "r009"]]


def test_rows_are_paired_by_their_ids():
    challenger, other = table(with_failures(1)), table(BEFORE).sample(frac=1, random_state=1)
    found = find_worse(challenger, {"base": other}, {"field_f1": WorseLimit(0.5, rows=0)})[0]
    assert [(row.id, row.score, row.other) for row in found.rows] == [("r000", 0.0, 0.5)]


def test_the_decision_lists_the_worst_rows_and_can_be_read_again():
    decision = decided(with_failures(50), BEFORE, WorseLimit(0.5, rows=60))
    found = decision.worse[0]
    assert found.holds and found.count == 50 and len(found.rows) == LISTED
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
    from loraflow.evaluation.values import ModelScores

    report = approval_request("r", decision, ModelScores({}, {}), confidence=0.95)
    assert "## Rows that got much worse" in report and "| r000 | 0.500 | 0.000 | question 0 | an \\| answer |" in report


@pytest.mark.parametrize("scores", [[np.nan] * 200, ["x"] * 200])
def test_scores_that_are_no_numbers_are_refused(scores):
    with pytest.raises(BadData):
        find_worse(table(scores), {"base": table(BEFORE)}, {"field_f1": WorseLimit(0.5, rows=0)})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"drop": 0.5}, "`rows` or `share`"),
        ({"drop": 0.5, "rows": 1, "share": 0.1}, "and not both"),
        ({"drop": 0, "rows": 1}, "greater than 0"),
        ({"drop": 0.5, "rows": -1}, "greater than or equal to 0"),
        ({"rows": 1}, "drop"),
    ],
)
def test_a_rule_that_says_nothing_is_refused(recipe, rule, message):
    with pytest.raises(BadConfig, match=message):
        load_recipe(recipe, {"gate.worst": {"exact_match": rule}})


def test_a_rule_names_a_score_that_is_computed(recipe):
    with pytest.raises(BadConfig, match="rougeL"):
        load_recipe(recipe, {"gate.worst": {"rougeL": {"drop": 0.5, "rows": 1}}, "evaluation.metrics": ["exact_match"], "gate.primary": "exact_match", "gate.guards": {}})  # fmt: skip


def test_decisions_without_the_rule_keep_their_identity(recipe):
    """The protocol of a decision as it was before the rule existed; another one would take a new look."""
    from types import SimpleNamespace

    from loraflow import identity

    def protocol(overrides):
        refs = dict.fromkeys(("base_scores", "tuned_scores", "champion_scores"), SimpleNamespace(digest="d"))
        found = SimpleNamespace(recipe=load_recipe(recipe, overrides))
        return found.recipe.gate, _protocol(found, SimpleNamespace(**refs, further_seeds=(), general={}))

    gate, plain = protocol({})
    names = ["primary", "min_gain", "guards", "lower_is_better", "error", "looks", "confidence"]
    before = {name: getattr(gate, name) for name in names}
    assert plain == identity.fingerprint({"gate": before, "scores": ["d", "d", "d"]})
    assert protocol({"gate.worst": {"exact_match": {"drop": 1.0, "rows": 1}}})[1] != plain
