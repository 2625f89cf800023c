"""The stage evaluate, with a tiny model."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from loraflow.evaluation import metric_modules, score
from loraflow.evaluation.metric_modules import ModuleScores
from loraflow.evaluation.values import EvaluationReport, scores_to_dict
from loraflow.failures import BadData
from loraflow.hardware.process_group import ProcessGroup
from loraflow.job import Inputs, Progress
from tests.conftest import chat
from tests.job_factory import make_job
from tests.unit.training.test_training import REF, recipe


@pytest.fixture
def evaluate(phi3, tmp_path):
    """Run the evaluate stage on seven rows of two sets; return its folder and its summary."""

    def run(**settings):
        out, rows = tmp_path / "out", tmp_path / "rows"
        out.mkdir()
        rows.mkdir()
        lines = [json.dumps({"id": f"r{i}", "set": "hard" if i % 3 == 2 else "heldout", **chat(i)}) for i in range(7)]
        (rows / "heldout.jsonl").write_text("\n".join(lines) + "\n")
        metrics = ["exact_match", "token_loss"]
        asked = recipe(
            evaluation__metrics=metrics, evaluation__max_new_tokens=4, gate__primary="exact_match", **settings
        )
        ref = REF.model_copy(update={"facets": {"heldout": "d"}})
        job = make_job("evaluate", asked, {"model": REF, "rows": ref})
        return out, score.run(job, Inputs({"model": phi3, "rows": rows}), out, Progress())

    return run


def test_the_stage_report_contains_the_scores_and_the_first_answers(evaluate):
    out, summary = evaluate()
    table, report = pd.read_parquet(out / "scores.parquet"), EvaluationReport.model_validate(summary.report)
    assert json.loads((out / "metrics.json").read_text()) == scores_to_dict(report.metrics) == summary.report["metrics"]
    assert {rows: part["exact_match"].n for rows, part in report.metrics.items()} == {"heldout": 5, "hard": 2}
    part = table[table["set"] == "heldout"]
    loss = report.metrics["heldout"]["token_loss"]
    assert loss.value == pytest.approx(part["nll"].sum() / part["reference_tokens"].sum())
    assert report.metrics["heldout"]["perplexity"].low == pytest.approx(math.exp(loss.low))
    assert summary.figures["heldout.token_loss"] == round(loss.value, 6)
    assert [sample.id for sample in report.samples] == ["r0", "r1", "r3", "r4", "r6"]
    assert report.samples[0].prompt == chat(0)["messages"][0]["content"]
    assert report.samples[0].answer == part["answer"].iloc[0]


def test_max_rows_limits_each_set(evaluate):
    out, summary = evaluate(evaluation__max_rows=2)
    table = pd.read_parquet(out / "scores.parquet")
    assert table["set"].value_counts().to_dict() == {"heldout": 2, "hard": 2}
    report = EvaluationReport.model_validate(summary.report)
    assert report.available == {"heldout": 5, "hard": 2} and report.longest > 0


def heldout_file(folder: Path, rows: list[tuple[str, str]]) -> Path:
    """Write held-out rows of (prompt, label)."""
    lines = [json.dumps({"id": f"r{n}", "set": "heldout", "messages": [{"role": "user", "content": prompt},
             {"role": "assistant", "content": label}]}) + "\n" for n, (prompt, label) in enumerate(rows)]  # fmt: skip
    file = folder / "heldout.jsonl"
    file.write_text("".join(lines))
    return file


def test_max_rows_is_a_sample_that_adding_rows_hardly_changes(tmp_path):
    rows = [(f"question {n}", f"label {n // 40}") for n in range(77 * 40)]  # sorted by label
    taken, available = score.read_rows(heldout_file(tmp_path, rows), 100, 0)
    assert len(taken) == 100 and available == {"heldout": 3080}
    assert len({row.messages[-1]["content"] for row in taken}) == 77, "the first 100 rows have 3 labels"
    assert [int(row.id[1:]) for row in taken] == sorted(int(row.id[1:]) for row in taken), "in the file's order"
    prompts = {row.messages[0]["content"] for row in taken}
    more, _ = score.read_rows(heldout_file(tmp_path, [("new", "x"), *reversed(rows)]), 100, 0)
    assert len(prompts & {row.messages[0]["content"] for row in more}) >= 98
    other, _ = score.read_rows(heldout_file(tmp_path, rows), 100, 1)
    assert prompts != {row.messages[0]["content"] for row in other}
    everything, _ = score.read_rows(heldout_file(tmp_path, rows), 5000, 0)
    assert [row.id for row in everything] == [f"r{n}" for n in range(3080)]


def test_without_heldout_rows_nothing_is_scored(tmp_path):
    (tmp_path / "heldout.jsonl").write_text("")
    with pytest.raises(BadData, match="no held-out rows"):
        score.read_rows(tmp_path / "heldout.jsonl", None, 0)


def test_of_several_devices_only_the_first_scores(evaluate, monkeypatch):
    monkeypatch.setattr(score, "join", lambda _: Second(rank=1, size=2))
    out, summary = evaluate()
    assert summary.report == {} and not list(out.iterdir())


class Second(ProcessGroup):
    """The second of two devices, without the first: nothing is exchanged."""

    def gather_results(self, found):
        return found

    def broadcast(self, value):
        return value


def test_a_non_finite_score_ends_the_stage(evaluate, monkeypatch):
    monkeypatch.setattr(metric_modules, "compute", lambda name, *_: ModuleScores({}, {name: [math.nan] * 7}))
    with pytest.raises(BadData, match="not a finite number"):
        evaluate()
