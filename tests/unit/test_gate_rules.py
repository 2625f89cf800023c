"""Rules of the gate that decide nothing, or the opposite of what they say, are refused when the recipe is read."""

import pytest
from pydantic import ValidationError

from loraflow.config.gate_rules import largest_difference
from loraflow.config.recipe import SCORES, Recipe
from loraflow.evaluation.metric_modules import LOWER_IS_BETTER
from loraflow.evaluation.values import RANGES

METRICS = ["token_loss", "exact_match", "chrf"]
INF = float("inf")


def recipe(metrics=METRICS, **gate):
    return Recipe.model_validate(
        {
            "name": "r",
            "base": {"model": "b"},
            "data": {"extra_heldout": {"hard": "hard.jsonl"}},
            "evaluation": {"metrics": metrics, "general": "g.jsonl"},
            "gate": gate,
        }
    )


@pytest.mark.parametrize(
    ("gate", "said"),
    [
        ({"primary": "exact_match", "lower_is_better": ["exact_match"]}, "would promote the worse model"),
        ({"lower_is_better": ["brevty"]}, "the gate names brevty"),
        ({"guards": {"exact_match": 5}}, "a margin of 5 guards nothing"),
        ({"guards": {"chrf": 100}}, "chrf is between 0 and 100"),
        ({"guards": {"token_loss": INF}}, "finite"),
        ({"slices": {"language": {"exact_match": 1}}}, "gate.slices.language"),
        ({"slices": {"language": {"token_loss": INF}}}, "finite"),
        ({"worst": {"exact_match": {"drop": 2, "rows": 0}}}, "no row can be worse by 2"),
        ({"primary": "exact_match", "min_gain": 1}, "no model can gain more than 1"),
        ({"min_gain": INF}, "finite"),
        ({"forgetting": {"accuracy": 2}}, "a margin of 2 guards nothing"),
        ({"behaviour": {"polite": {"set": "harder", "refuses": True}}}, "there is no set harder; the sets are hard, heldout"),
    ],
)  # fmt: skip
def test_a_rule_without_effect_or_in_the_wrong_direction_is_refused(gate, said):
    with pytest.raises(ValidationError, match=said):
        recipe(**gate)


@pytest.mark.parametrize(
    "gate",
    [
        {"guards": {"exact_match": 0.99, "chrf": 5, "token_loss": 3}, "min_gain": 2},
        {"lower_is_better": ["token_loss"]},
        {"worst": {"exact_match": {"drop": 1, "rows": 0}}, "forgetting": {"loss": 2, "accuracy": 0.5}},
        {"behaviour": {"polite": {"set": "hard", "refuses": True}}},
    ],
)
def test_rules_that_can_decide_are_accepted(gate):
    recipe(**gate)


def test_scores_of_own_metrics_have_any_range_and_direction():
    recipe(
        ["exact_match", "./metrics/brevity"], primary="exact_match", guards={"brevity": 20}, lower_is_better=["brevity"]
    )


def test_ranges_are_those_by_which_the_gate_bounds_scores():
    scores = {"stops"}.union(*SCORES.values())
    assert {name: largest_difference(name) for name in scores} == {name: RANGES.get(name) for name in scores}
    assert {name for name in scores if largest_difference(name) is None} == LOWER_IS_BETTER & scores
