"""The metrics: loraflow's own, beside the packages that define them, and a user's."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from loraflow.evaluation import metric_modules, score
from loraflow.evaluation.metric_modules import ModuleScores, compute, find_module
from loraflow.failures import BadConfig

PAIRS = [
    ("the cat sat", "the cat sat"),
    ("a cat sits on the mat", "the cat sat on the mat"),
    ("", "something"),
    ("नमस्ते दुनिया", "नमस्ते दुनिया"),
    ("你好世界", "你好朋友"),
    ("Привет мир", "Привет, мир!"),
    ("สวัสดี", "สวัสดี"),
]
PREDICTIONS, REFERENCES = map(list, zip(*PAIRS, strict=True))


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "rouge", "chrf"])
def test_identical_texts_have_the_best_score_in_every_script(name):
    texts = [reference for _, reference in PAIRS]
    values, rows = compute(name, texts, texts)
    best = 100.0 if name == "chrf" else 1.0
    for key, value in values.items():
        expected = 1.0 if key not in ("rouge2",) else None
        if expected is not None:
            assert value == pytest.approx(best), key
            assert rows[key] == pytest.approx([best] * len(texts))


def test_rouge_equals_rouge_score_on_latin_text():
    from rouge_score import rouge_scorer

    predictions, references = ["The cats were sitting quietly.", "no"], ["A cat sat there quietly", "yes"]
    _, rows = compute("rouge", predictions, references)
    oracle = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
    for i, (p, r) in enumerate(zip(predictions, references, strict=True)):
        for kind, expected in oracle.score(r, p).items():
            assert rows[kind][i] == pytest.approx(expected.fmeasure), kind


def test_token_f1_equals_squads():
    values, rows = compute("token_f1", PREDICTIONS, REFERENCES)
    assert rows["token_f1"][:3] == [1.0, pytest.approx(2 * 4 / 12), 0.0]
    assert rows["token_f1"][4] == pytest.approx(0.5)
    assert values["token_f1"] == pytest.approx(np.mean(rows["token_f1"]))


def test_chrf_equals_sacrebleus():
    import sacrebleu

    _, rows = compute("chrf", PREDICTIONS, REFERENCES)
    assert rows["chrf"][1] == pytest.approx(sacrebleu.sentence_chrf(PREDICTIONS[1], [REFERENCES[1]]).score)


@pytest.mark.parametrize(
    ("prediction", "valid", "f1"),
    [
        ('{"a": 1, "b": {"c": [1, 2]}}', 1.0, 1.0),
        (' {"b": {"c": [2, 1]}, "a": 1}\n', 1.0, 1.0),
        ('{"a": 1}', 1.0, 0.5),
        ('{"a": "1", "b": {"c": [1, 2]}}', 1.0, 2 / 3),
        ('{"a": 1, "b": {"c": [1, 2]}', 0.0, 0.0),
        ("[1]", 0.0, 0.0),
        ('Sure! {"a": 1}', 0.0, 0.0),
    ],
)
def test_json_fields_scores_validity_and_field_f1(prediction, valid, f1):
    _, rows = compute("json_fields", [prediction], ['{"a": 1, "b": {"c": [1, 2]}}'])
    assert rows["json_valid"] == [valid]
    assert rows["field_f1"] == [pytest.approx(f1)]


@pytest.mark.parametrize(
    ("prediction", "reference", "valid", "f1"),
    [
        ('{"a.b": 1}', '{"a": {"b": 1}}', 1.0, 0.0),
        ('{"a[]": 1}', '{"a": [1]}', 1.0, 0.0),
        ('{"a": {"b": 1}}', '{"a": {"b": 1}}', 1.0, 1.0),
        ('{"a": NaN}', '{"a": null}', 0.0, 0.0),
        ('{"a": 1, "b": -Infinity}', '{"a": 1}', 0.0, 0.0),
    ],
)
def test_json_fields_are_those_of_json(prediction, reference, valid, f1):
    """A key with a point is not a path; NaN and Infinity are not in https://www.rfc-editor.org/rfc/rfc8259#section-6."""
    _, rows = compute("json_fields", [prediction], [reference])
    assert (rows["json_valid"], rows["field_f1"]) == ([valid], [f1])


def test_token_loss_is_weighted_by_tokens():
    values, rows = compute("token_loss", [2.0, 30.0], [2, 10])
    assert values["token_loss"] == pytest.approx(32 / 12)
    assert values["perplexity"] == pytest.approx(math.exp(32 / 12))
    assert rows["token_loss"] == [1.0, 3.0]


def test_a_users_metric_module_is_scored_row_by_row(tmp_path):
    folder = tmp_path / "same_length"
    folder.mkdir()
    (folder / "same_length.py").write_text(
        "import datasets\nimport evaluate\n\n\nclass SameLength(evaluate.Metric):\n"
        "    def _info(self):\n        return evaluate.MetricInfo(description='', citation='', inputs_description='',\n"
        "            features=datasets.Features({'predictions': datasets.Value('string'), 'references': datasets.Value('string')}))\n\n"
        "    def _compute(self, predictions, references):\n"
        "        return {'same_length': sum(len(p) == len(r) for p, r in zip(predictions, references)) / len(predictions)}\n"
    )
    values, rows = compute(str(folder), ["ab", "c"], ["xy", "zz"])
    assert values == {"same_length": 0.5} and rows == {"same_length": [1.0, 0.0]}


@pytest.mark.parametrize(
    "name", ["prompt", "group", "nll", "stops", "perplexity", "macro_f1", "exact_match", "accuracy", "chrf"]
)
def test_a_metric_whose_score_would_replace_another_column_is_refused(name, monkeypatch):
    """Groups and prompts say which rows are independent; and the gate decides on the score that the report shows."""
    table = pd.DataFrame({"prompt": ["q"], "answer": ["x"], "reference": ["x"]})
    own = compute("exact_match", ["x"], ["x"])._replace(rows={name: [1.0]})
    monkeypatch.setattr(
        metric_modules, "compute", lambda metric, *texts: own if "/" in metric else compute(metric, *texts)
    )
    config = SimpleNamespace(metrics=["exact_match", "./metrics/own"], modules={})
    with pytest.raises(BadConfig, match=rf"name of another metric(.|\n)*metrics/own(.|\n)*{name}"):
        score._row_scores(table, config)


def test_a_metric_without_a_score_for_each_row_is_refused(monkeypatch):
    table = pd.DataFrame({"answer": ["x", "y"], "reference": ["x", "x"]})
    monkeypatch.setattr(metric_modules, "compute", lambda *_: ModuleScores({"own": 1.0}, {"own": [1.0]}))
    with pytest.raises(BadConfig, match=r"a score for each row(.|\n)*2 values in own_scores(.|\n)*got: +1"):
        score._row_scores(table, SimpleNamespace(metrics=["./metrics/own"], modules={}))


def test_a_bare_name_is_never_looked_up_on_the_hub():
    with pytest.raises(BadConfig, match="no such metric"):
        find_module("bleu")
