"""Rules of the gate that decide nothing, or the opposite of what they say, are refused when the recipe is read."""

import json

import pytest
from pydantic import ValidationError

from loraflow.config import parse_recipe
from loraflow.config.evaluation import BINARY, LOWER_IS_BETTER, RANGES, SCORES
from loraflow.config.gate import Gate
from loraflow.execution import rederive as reproducing
from loraflow.execution.deal import recorded_workspace
from loraflow.failures import BadConfig
from loraflow.registry.rebuild import _command
from loraflow.registry.runs import RunRecord
from loraflow.store import LocalStore

METRICS = ["token_loss", "exact_match", "chrf"]
INF = float("inf")


def recipe(metrics=METRICS, *, is_recorded=False, **gate):
    document = {
        "name": "r",
        "base": {"model": "b"},
        "data": {"extra_heldout": {"hard": "hard.jsonl"}},
        "evaluation": {"metrics": metrics, "general": "g.jsonl"},
        "gate": gate,
    }
    return parse_recipe(json.dumps(document), is_recorded=is_recorded)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ({"primary": "exact_match", "lower_is_better": ["exact_match"]}, "would promote the worse model"),
        ({"lower_is_better": ["brevty"]}, "gate.lower_is_better names brevty"),
        ({"ranges": {"exact_match": [0, 2]}}, "exact_match, whose range is known"),
        ({"ranges": {"brevity": [0, 2]}}, "brevity, which is not a score"),
        ({"guards": {"exact_match": 5}}, "a margin of 5 guards nothing"),
        ({"guards": {"chrf": 100}}, "chrf is between 0 and 100"),
        ({"slices": {"language": {"exact_match": 1}}}, "gate.slices.language"),
        ({"worst": {"exact_match": {"drop": 2, "rows": 0}}}, "no row can be worse by 2"),
        ({"primary": "exact_match", "min_gain": 1}, "no model can gain more than 1"),
        ({"forgetting": {"accuracy": 2}}, "a margin of 2 guards nothing"),
        ({"behaviour": {"polite": {"set": "harder", "refuses": True}}}, "there is no set harder; the sets are hard, heldout"),
    ],
)  # fmt: skip
def test_a_rule_without_effect_or_in_the_wrong_direction_is_refused(gate, message):
    with pytest.raises(BadConfig, match=message):
        recipe(**gate)


@pytest.mark.parametrize(
    "gate",
    [{"guards": {"token_loss": INF}}, {"slices": {"language": {"token_loss": INF}}}, {"min_gain": INF}],
)
def test_margins_are_finite(gate):
    with pytest.raises(ValidationError, match="finite"):
        Gate.model_validate(gate)


@pytest.mark.parametrize(
    "gate",
    [
        {"guards": {"exact_match": 1.0}, "primary": "exact_match", "min_gain": 1},
        {"lower_is_better": ["exact_match", "brevty"]},
        {"slices": {"language": {"exact_match": 1}}, "worst": {"exact_match": {"drop": 2, "rows": 0}}},
        {"behaviour": {"polite": {"set": "harder", "refuses": True}}},
    ],
)
def test_a_recorded_recipe_is_read_with_rules_that_an_earlier_version_accepted(gate):
    recipe(is_recorded=True, **gate)


def test_a_run_with_such_a_rule_is_reproduced_repaired_and_rebuilt(tmp_path, monkeypatch):
    text = "name: r\nbase: {model: b}\nevaluation: {metrics: [token_loss, exact_match]}\ngate: {guards: {exact_match: 1.0}}\n"
    with pytest.raises(BadConfig, match="a margin of 1 guards nothing"):
        parse_recipe(text)
    resolved = parse_recipe(text, overrides={"training_config.seed": 7}, is_recorded=True)
    values = {"recipe_text": text, "resolved": resolved.model_dump(by_alias=True, mode="json")}
    record, store = RunRecord(run="20260101-000000-abcdef", recipe="r", **values), LocalStore(tmp_path / "store")
    monkeypatch.setattr(reproducing, "steps_of", lambda recipe: [])
    assert not list(reproducing.reproduce(store, record, str(tmp_path / "fresh")))
    assert recorded_workspace(store, record, store.uri).recipe.gate.guards == {"exact_match": 1.0}
    assert "--set training_config.seed=7" in _command(store, record, tmp_path / "r.yaml", text)


def test_all_rules_without_effect_are_named_at_once_each_with_its_line_or_override():
    text = "name: r\nbase: {model: b}\nevaluation: {metrics: [exact_match]}\ngate:\n  primary: exact_match\n  guards:\n    exact_match: 2\n"
    with pytest.raises(BadConfig) as caught:
        parse_recipe(text, "r.yaml", {"gate.min_gain": 3})
    message = str(caught.value)
    assert "has 2 problems" in message and "r.yaml:7: gate.guards.exact_match" in message
    assert "--set gate.min_gain: gate.min_gain: exact_match is between 0 and 1" in message


NAN = float("nan")
WRONG = {
    "primary": [None, 1, True, [], {}, "", " ", ["exact_match"], "exact_match "],
    "min_gain": [None, "0.1", -0.1, NAN, INF, True, [0], {}],
    "guards": [
        None, "x", ["exact_match"], {"": 0.1}, {"nope": 0.1},
        *({"exact_match": margin} for margin in (None, "0.1", -1, NAN, INF, True)),
    ],
    "worst": [
        None, 3, {"exact_match": 1}, {"nope": {"drop": 1, "rows": 1}}, {"exact_match": {"drop": 1, "rows": 1, "share": 0.1}},
        *({"exact_match": {"rows": 1, "drop": drop}} for drop in (None, 0, "1", NAN, INF, True)),
        *({"exact_match": {"drop": 1, "rows": rows}} for rows in (None, -1, 1.5, True, "1")),
        *({"exact_match": {"drop": 1, "share": share}} for share in (1, -0.1, NAN, "0.1")),
    ],
    "slices": [
        None, [], {"length": {}}, {"length": None}, {"length": 0.1}, {"": {"exact_match": 0.1}}, {"length": {"nope": 0.1}},
        *({"length": {"exact_match": margin}} for margin in (None, "0.1", -1, NAN, INF, True)),
    ],
    "behaviour": [
        None, [], {"x": None}, {"x": {"set": "nope", "refuses": True}}, {"x": {"set": "", "refuses": True}},
        *({"x": {"refuses": True, "share": share}} for share in (0, 1.5, NAN, "0.5", None)),
        *({"x": {name: value}} for name, value in [
            ("refuses", "yes"), ("contains", "a"), ("contains", [1]), ("json_fields", [None]), ("matches", 3), ("matches", "("),
            ("consistent", False), ("mathces", "a"),
        ]),
    ],
    "forgetting": [
        None, ["loss"], {"accuracy": 1}, {"perplexity": 1}, *({"loss": margin} for margin in (None, 0, -1, NAN, INF, True, "1")),
    ],
    "lower_is_better": [None, "exact_match", [1], [None], ["exact_match"], ["nope"], {}],
    "ranges": [
        None, [], {"exact_match": [0, 1]},
        *({"x": ends} for ends in (None, 1, [0], [0, 1, 2], [1, 0], [1, 1], [0, NAN], [0, INF], ["0", "1"], [False, True])),
    ],
    "error": [None, 0, -0.1, 0.5, 1, 5, NAN, INF, "0.05", True, [0.05]],
    "looks": [None, 0, -1, 1.5, "365", True, NAN, INF],
    "seeds": [None, 0, -1, 21, 1.5, "3", True, NAN],
    "independent_rows": [None, "yes", "true", 2, -1, 0.5, NAN, [], {}],
    "confidence": [None, 0.5, 1, 0, -1, 95, NAN, "0.95", True],
}  # fmt: skip


@pytest.mark.parametrize("key", Gate.model_fields)
def test_each_wrong_type_or_value_of_a_key_is_refused_with_its_line(key):
    for value in WRONG[key]:
        written = json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")
        primary = "" if key == "primary" else "primary: exact_match"
        text = f"name: r\nbase: {{model: b}}\nevaluation: {{metrics: [exact_match], general: g.jsonl}}\ngate:\n  {primary}\n"
        with pytest.raises(BadConfig) as caught:
            parse_recipe(f"{text}  {key}: {written}\n", "r.yaml")
        assert f"r.yaml:6: gate.{key}" in str(caught.value), (value, str(caught.value))


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
    own = {"guards": {"brevity": 20}, "lower_is_better": ["brevity"], "ranges": {"brevity": [0, 2000]}}
    recipe(["exact_match", "./metrics/brevity"], primary="exact_match", **own)


@pytest.mark.parametrize(
    ("gate", "where"),
    [
        ({"primary": "brevity"}, "gate.primary"),
        ({"guards": {"brevity": 20}}, "gate.guards.brevity"),
        ({"slices": {"length": {"brevity": 20}}}, "gate.slices.length.brevity"),
    ],
)
def test_a_guard_on_the_score_of_an_own_metric_without_a_range_is_refused_before_the_training(gate, where):
    gate = {"primary": "exact_match", **gate}
    with pytest.raises(BadConfig, match=rf"{where}: no model can be promoted by brevity(.|\n)*gate.ranges: \{{brevity"):
        recipe(["exact_match", "./metrics/brevity"], **gate)
    recipe(["exact_match", "./metrics/brevity"], is_recorded=True, **gate)
    recipe(["exact_match", "./metrics/brevity"], **gate, ranges={"brevity": [0, 2000]})
    recipe(["exact_match", "./metrics/brevity"], primary="exact_match", worst={"brevity": {"drop": 9, "rows": 0}})


@pytest.mark.parametrize(
    ("gate", "where"),
    [
        ({"primary": "nll"}, "gate.primary names nll"),
        ({"primary": "perplexity"}, "gate.primary names perplexity"),
        ({"guards": {"reference": 0.1}}, "gate.guards names reference"),
        ({"worst": {"macro_f1": {"drop": 0.5, "rows": 0}}}, "gate.worst names macro_f1"),
        ({"slices": {"language": {"answer_tokens": 3}}}, "gate.slices.language names answer_tokens"),
        ({"ranges": {"nll": [0, 20]}}, "gate.ranges names nll"),
        ({"lower_is_better": ["perplexity"]}, "gate.lower_is_better names perplexity"),
    ],
)
def test_with_an_own_metric_too_a_name_that_is_no_score_of_rows_is_refused(gate, where):
    gate = {"primary": "exact_match", **gate}
    with pytest.raises(BadConfig, match=where):
        recipe(["exact_match", "./metrics/brevity"], **gate)
    recipe(["exact_match", "./metrics/brevity"], is_recorded=True, **gate)
    with pytest.raises(BadConfig, match=where.partition(" ")[0]):
        recipe(["exact_match"], **gate)


@pytest.mark.parametrize(
    "gate",
    [
        {"primary": "accuracy"},
        {"primary": "accuracy", "ranges": {"accuracy": [-20, 1]}},
        {"primary": "exact_match", "guards": {"chrf": 2}},
        {"primary": "token_loss"},
        {"primary": "exact_match", "slices": {"language": {"rouge1": 0.1}}},
        {"primary": "exact_match", "worst": {"token_f1": {"drop": 0.5, "rows": 0}}},
    ],
)
def test_with_an_own_metric_too_a_score_of_a_built_in_metric_that_is_not_computed_is_refused(gate):
    """A user's metric may have a score of the same name with other values, such as -20: the built-in range does not hold."""
    metrics = ["exact_match", "./metrics/mine"]
    with pytest.raises(
        BadConfig, match=r"a score of the built-in metric \w+, which evaluation.metrics\s+does\s+not\s+have"
    ):
        recipe(metrics, **gate)
    if "ranges" not in gate:
        recipe([*metrics, "labels", "chrf", "token_loss", "rouge", "token_f1"], **gate)


def test_with_an_own_metric_too_a_guard_on_stops_is_accepted():
    read = recipe(["exact_match", "./metrics/brevity"], primary="exact_match", guards={"stops": 0.02})
    assert read.gate.guards == {"stops": 0.02}


def test_margins_of_own_metrics_are_compared_with_the_range_that_the_recipe_says():
    own = ["exact_match", "./metrics/brevity"]
    assert recipe(own, guards={"brevity": 20}, ranges={"brevity": [0, 400]}, primary="exact_match").gate.ranges == {
        "brevity": [0, 400]
    }
    with pytest.raises(BadConfig, match=r"brevity is between -5 and 5: a margin of 20 guards nothing"):
        recipe(own, guards={"brevity": 20}, ranges={"brevity": [-5, 5]}, primary="exact_match")
    with pytest.raises(BadConfig, match=r"smaller than the second one, not 5 and 5"):
        recipe(own, ranges={"brevity": [5, 5]}, primary="exact_match")


def test_only_scores_of_which_lower_is_better_have_no_range_and_scores_of_0_or_1_have_the_range_1():
    scores = {"stops"}.union(*SCORES.values())
    assert scores - RANGES.keys() == LOWER_IS_BETTER & scores
    assert {name: RANGES[name] for name in BINARY} == dict.fromkeys(BINARY, 1.0)
