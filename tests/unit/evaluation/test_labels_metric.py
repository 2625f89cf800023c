"""The metric `labels`: accuracy, macro-F1 and confusions against slow loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loraflow.config import load_recipe
from loraflow.evaluation.label_scores import OTHER, confusions, macro_f1
from loraflow.evaluation.metric_modules import compute
from loraflow.evaluation.values import EvaluationReport, MetricValue
from loraflow.failures import BadConfig
from loraflow.reporting.markdown import scores_report
from tests.golden.payloads import REPOSITORY

ANSWERS = ["spam", " Spam", "ham", "no idea", "ham", "eggs"]
REFERENCES = ["spam", "spam", "spam", "ham", "ham", "eggs"]


def slow_macro_f1(answers, references):
    total, names = 0.0, set(references)
    for name in names:
        hits = sum(a == name == r for a, r in zip(answers, references, strict=True))
        precision = hits / max(answers.count(name), 1)
        recall = hits / references.count(name)
        total += 2 * precision * recall / (precision + recall) if hits else 0.0
    return total / len(names)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abcx"), st.sampled_from("abc")), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_the_labels_of_f1(rows):
    answers, references = (list(part) for part in zip(*rows, strict=True))
    found = macro_f1(answers, references, None, 0.95)
    assert found.value == pytest.approx(slow_macro_f1(answers, references))
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_rows_of_a_group_are_drawn_together_so_the_interval_is_wider():
    answers, references = ["a"] * 30 + ["b"] * 10 + ["b"] * 40, ["a"] * 40 + ["b"] * 40
    single = macro_f1(answers, references, None, 0.95)
    grouped = macro_f1(answers, references, np.arange(80) // 10, 0.95)
    assert grouped.value == single.value and grouped.high - grouped.low > 1.5 * (single.high - single.low)
    assert macro_f1(answers, references, np.zeros(80, int), 0.95)[1:] == (0.0, 1.0)


@pytest.mark.parametrize("groups", [None, np.arange(21)])
def test_macro_f1_of_answers_that_are_all_right_or_all_wrong_has_the_interval_of_a_share(groups):
    references = ["a", "b", "c"] * 7
    for answers, hits in ((references, 21), (["b", "c", "a"] * 7, 0)):
        exact = stats.binomtest(hits, 21).proportion_ci(0.95, method="exact")
        found = macro_f1(answers, references, groups, 0.95)
        assert found == pytest.approx((hits / 21, exact.low, exact.high))


def test_accuracy_counts_rows_without_differences_of_case_and_white_space():
    scores = compute("labels", ANSWERS, REFERENCES)
    assert scores.rows == {"accuracy": [1, 1, 0, 0, 1, 1]} and scores.values == {"accuracy": pytest.approx(4 / 6)}


def test_the_worst_labels_are_listed_with_what_they_are_taken_for():
    found = confusions(ANSWERS, REFERENCES)
    assert [
        (confusion.label, confusion.rows, confusion.wrong, confusion.as_label, confusion.as_count)
        for confusion in found
    ] == [
        ("ham", 2, 1, OTHER, 1),
        ("spam", 3, 1, "ham", 1),
    ]
    report = EvaluationReport(metrics={}, confusions={"heldout": found})
    assert (
        EvaluationReport.model_validate(report.to_dict()) == report
        and "confusions" not in EvaluationReport(metrics={}).to_dict()
    )
    text = scores_report(
        "m",
        "r",
        {"heldout": {"accuracy": MetricValue(value=0.5, low=0, high=1, n=6)}},
        confidence=0.95,
        folder="f",
        table="t",
        confusions=report.confusions,
    )
    assert "| spam | 3 | 1 | ham (1) |" in text


@pytest.mark.parametrize("name", ["primary", "guards", "worst"])
def test_macro_f1_is_refused_as_a_score_of_the_gate(name):
    value = {"primary": "macro_f1", "guards": {"macro_f1": 0.1}, "worst": {"macro_f1": {"drop": 1, "rows": 1}}}[name]
    recipe = {"evaluation.metrics": ["token_loss", "labels"], "gate.primary": "accuracy", "gate.guards": {}}
    with pytest.raises(BadConfig, match="macro_f1, which is no mean over rows"):
        load_recipe(REPOSITORY / "configs" / "quickstart.yaml", {**recipe, f"gate.{name}": value})
    assert load_recipe(REPOSITORY / "configs" / "quickstart.yaml", recipe).gate.primary == "accuracy"
