"""Scores of parts of the held-out rows."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from loraflow.data.checks import broken_text
from loraflow.evaluation.slices import QUARTERS, slice_scores
from loraflow.reporting.markdown import slice_lines


def table(hits, questions=None, tokens=None, reference="x"):
    n = len(hits)
    asked = questions or [f"question {i}" for i in range(n)]
    return pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(n)],
            "prompt": [json.dumps([{"role": "user", "content": text}]) for text in asked],
            "reference": reference,
            "finish": "stop",
            "reference_tokens": np.zeros(n) if tokens is None else tokens,
            "exact_match": np.asarray(hits, dtype=float),
        }
    )


def slices(tables, by, metrics=("exact_match",)):
    return slice_scores(tables, by, metrics, confidence=0.95)


def test_quarters_by_length_have_their_own_scores_with_wilsons_interval():
    hits = [1] * 10 + [0] * 10 + [1, 0] * 5 + [1] * 9 + [0]
    found = slices(
        {"base": table(np.zeros(40), tokens=np.arange(40)), "tuned": table(hits, tokens=np.arange(40))}, ["length"]
    )
    assert [(part.name, part.rows) for part in found] == [(name, 10) for name in QUARTERS]
    assert [part.values["tuned"]["exact_match"].value for part in found] == [1.0, 0.0, 0.5, 0.9]
    assert {part.values["base"]["exact_match"].value for part in found} == {0.0}
    wilson = stats.binomtest(9, 10).proportion_ci(0.95, method="wilson")
    assert found[3].values["tuned"]["exact_match"].low == pytest.approx(wilson.low)


def test_rows_are_found_by_their_ids_and_every_row_is_in_one_slice():
    rng = np.random.default_rng(0)
    tokens, hits = rng.integers(1, 5, 50), rng.integers(0, 2, 50)
    scored = table(hits, tokens=tokens)
    found = slices({"base": scored, "tuned": scored.sample(frac=1, random_state=1)}, ["length"])
    assert sum(part.rows for part in found) == 50
    for part in found:
        assert part.values["base"] == part.values["tuned"]
    assert sum(part.rows * part.values["tuned"]["exact_match"].value for part in found) == pytest.approx(hits.sum())


def test_rows_of_equal_length_are_one_slice_and_characters_count_without_tokens():
    assert [(part.name, part.rows) for part in slices({"tuned": table([1] * 8)}, ["length"])] == [(QUARTERS[0], 8)]
    sized = table([1] * 8, reference=["x" * size for size in range(1, 9)])
    assert [part.rows for part in slices({"tuned": sized}, ["length"])] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("What is red?", "Latin"), ("\u0427\u0442\u043e \u0442\u0430\u043a\u043e\u0435 SQL", "Cyrillic"),
        ("\u4ec0\u4e48\u662f\u7ea2\u8272", "CJK"), ("\u0645\u0627", "Arabic"), ("12 + 3", "no letters"), ("", "no letters"),
    ],
)  # fmt: skip
def test_the_script_of_a_question_is_that_of_most_of_its_letters(text, script):
    assert (broken_text.script(text, min_letters=1) or "no letters") == script


def test_the_report_has_a_table_for_each_kind_of_slice():
    shown = table([1, 1, 0], questions=["red", "blue", "\u0447\u0442\u043e"], tokens=[1, 2, 3])
    lines = list(slice_lines(slices({"base": shown, "tuned": shown}, ["length", "script"])))
    assert (
        "| script | rows | metric | base | tuned |" in lines
        and "Only the parts in gate.slices affect the decision" in lines[2]
    )
    assert any(line.startswith("| Latin | 2 | exact_match | 1.000 [") for line in lines)
    assert not list(slice_lines([]))
