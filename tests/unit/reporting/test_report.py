"""Reports as markdown, and the values that they show."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from typing import get_args

import pytest
from pydantic import ValidationError

from loraflow.evaluation.values import (
    Comparison,
    Decision,
    EvaluationReport,
    MetricValue,
    ModelScores,
    Sample,
    Verdict,
    scores_to_dict,
)
from loraflow.registry.runs import RunSummary
from loraflow.reporting import chart, markdown


@dataclass(frozen=True)
class Stage:
    stage: str = "train"
    state: str = "computed"
    fingerprint: str = "0123456789abcdef"
    digest: str = "89abcdef01234567"
    seconds: float = 12.345


def value(number, n=3):
    return MetricValue(value=number, low=number - 0.1, high=number + 0.1, n=n)


BASE = {"heldout": {"exact_match": value(0.25)}}
TUNED = {"heldout": {"exact_match": value(0.75), "stops": value(1.0)}, "handwritten": {"exact_match": value(0.5, 2)}}
DECISION = Decision(verdict="promote", reasons=("better than base", "better than champion"))
SAMPLE = Sample(id="a", prompt="what\n is `this`?", reference='{"a": 1}', answer="no | idea")


def test_the_closing_table_fits_in_80_columns_with_a_champion(capsys, monkeypatch):
    from loraflow.cli.run import show

    monkeypatch.setenv("COLUMNS", "80")
    score, equal = value(0.5), MetricValue(value=0.25, low=-math.inf, high=math.inf, n=3)
    scores = {"heldout": {"token_loss": score, "perplexity": equal}}
    show(RunSummary(run="x", recipe="tiny", metrics=dict.fromkeys(("base", "tuned", "champion"), scores)))
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│ ")]
    assert cells[:2] == [
        ["token_loss", *["0.500  0.400–0.600"] * 3],
        ["perplexity", *["0.250 (no interval)"] * 3],
    ]


def test_a_score_without_interval_says_so_also_in_stored_artifacts():
    for ends in ({"low": None, "high": None}, {"low": 0.0, "high": math.inf}, {"low": math.inf, "high": math.inf}):
        score = MetricValue.model_validate({"value": 2.0, **ends, "n": 3})
        assert (str(score), score.text("{:8.4f}  {:.4f}–{:.4f}")) == ("2.000 (no interval)", "  2.0000 (no interval)")
    assert value(0.5).text("{:8.4f}  {:.4f}–{:.4f}") == "  0.5000  0.4000–0.6000"


def test_the_report_and_the_closing_table_say_what_was_left_out(capsys):
    from loraflow.cli.run import show
    from loraflow.data.checks.check_report import CheckReport
    from loraflow.reporting.rows import RowPolicy, summarise_rows

    check = CheckReport(
        rows={"train": 70, "validation": 0, "heldout": 5}, sets={"heldout": 4, "hard": 1}, malformed_share=0.01,
        counts={"read": 100, "malformed": 1, "marked_false": 9, "duplicate": 8, "leak": 7},
        first_problems=[], unread={"note": 3},
        similar={"near_leaks": 2, "near_leak": "a:1 and b:1", "disputed_prompts": 1, "disputed_rows": 2, "disputed": "a:3 and a:4"},
    )  # fmt: skip
    tokens = {"train_rows": 19, "train_tokens": 900, "supervised_tokens": 345, "rows_special_tokens": 16, "rows_too_long": 18,
              "rows_nothing_to_learn": 6}  # fmt: skip
    scores = EvaluationReport(metrics={"heldout": {"exact_match": value(0.5, 2)}, "hard": {"exact_match": value(0.5, 1)}},
                              available={"heldout": 4, "hard": 1}, control_tokens=1, longest=200)  # fmt: skip
    rows = summarise_rows(check, tokens, scores, RowPolicy(128, "drop"))
    text = markdown.run_report(report(rows=rows))
    show(RunSummary(run="x", recipe="tiny", rows=rows))
    shown = " ".join(capsys.readouterr().out.split())
    for line in ("| read | 100 |", "| left out: malformed | 1 |", "| left out: marked as not to be learned | 9 |", "| left out: duplicate chats | 8 |",
                 "| left out of training: its prompt is held out | 7 |", "| left out of training: a control token in its text | 16 |",
                 "| left out of training: longer than max_length, 128 tokens | 18 |", "| left out of training: no token to learn | 6 |",
                 "| trained on | 19 |", "| tokens learned | 345 |", "| scored, heldout: a seeded sample of 4 (evaluation.max_rows) | 2 |",
                 "| scored, hard | 1 |"):  # fmt: skip
        assert line in text
        assert line.split("|")[1].strip() in shown
    for note in ("not read: note (3 rows)", "2 training rows have a held-out prompt", "1 training prompts have different answers",
                 "1 held-out rows have a control token", "the longest held-out row has 200 tokens",
                 "18 of 37 training rows (49%) are longer than max_length (128 tokens) and left out: raise training_config"):  # fmt: skip
        assert note in text and note in shown
    dealt = summarise_rows(check, tokens, scores, RowPolicy(128, "drop", deals_rows=True))
    counts = {count.what: count.rows for count in dealt.counts}
    assert counts["scored, heldout: the rows of 4 that were dealt to this model (data.heldout_reserve)"] == 2
    cut = summarise_rows(check, tokens, scores, RowPolicy(128, "truncate"))
    assert "cut: longer than max_length, 128 tokens" in [count.what for count in cut.counts]
    few = summarise_rows(check, {**tokens, "train_rows": 400}, scores, RowPolicy(128, "drop"))
    assert not any("raise training_config.max_length" in note for note in few.notes)


def report(**changes):
    content = {
        "decision": DECISION,
        "scores": ModelScores(base=BASE, tuned=TUNED),
        "confidence": 0.95,
        "losses": [(1, 2.0), (2, 1.0)],
        "samples": [SAMPLE],
        "store": "store",
    }
    summary = RunSummary.model_construct(
        run="20260101-000000-abcdef",
        recipe="quickstart",
        stages=[Stage(), Stage("evaluate base", "cached", "f" * 64, "e" * 64, 0.04)],
        rows=changes.pop("rows", None),
        adapter="store/train/0123/4567/adapter",
        merged="store/merge/89ab",
    )
    return markdown.RunReport(summary=summary, **content | changes)


RUN = """\
# quickstart: promote

The new model is the champion now.

- better than base
- better than champion

## Scores on heldout (3 rows)

| metric | base | tuned |
|---|---|---|
| exact_match | 0.250 [0.150, 0.350] | 0.750 [0.650, 0.850] |
| stops |  | 1.000 [0.900, 1.100] |

## Scores on handwritten (2 rows)

| metric | base | tuned |
|---|---|---|
| exact_match |  | 0.500 [0.400, 0.600] |

In brackets: 95% confidence intervals.

## Training loss

`█▁`

| step | loss |
|---:|---:|
| 1 | 2.0000 |
| 2 | 1.0000 |

## Sample answers

**what is 'this'?**

- expected: `{"a": 1}`
- tuned: `no | idea`

## Lineage

| stage | state | seconds | fingerprint | digest |
|---|---|---:|---|---|
| train | computed | 12.3 | `0123456789ab` | `89abcdef0123` |
| evaluate base | cached | 0.0 | `ffffffffffff` | `eeeeeeeeeeee` |

An artifact is in the folder `STAGE/FINGERPRINT/DIGEST` of the store:

```
store
```

## Files

Adapter:

```
store/train/0123/4567/adapter
```

Merged model:

```
store/merge/89ab
```

Chat with the model:

```
loraflow chat 20260101-000000-abcdef
```
"""


def test_a_run_is_reported_with_its_decision_scores_losses_answers_and_lineage():
    assert markdown.run_report(report()) == RUN


def test_the_loss_curve_is_an_image_if_images_are_supported():
    terminal, page = markdown.run_report(report()), markdown.run_report(report(), image=True)
    assert "`█▁`" in terminal and "![training loss]" not in terminal
    assert "![training loss](data:image/svg+xml;base64," in page and "█" not in page
    assert [line for line in page.splitlines() if "![" not in line] == [
        line for line in terminal.splitlines() if "█" not in line
    ]


def test_the_report_shows_the_answer_of_the_base_beside_that_of_the_tuned_model():
    [sample] = report().samples
    text = markdown.run_report(report(base_answers={sample.id: "base's words", "another row": "x"}))
    assert '- expected: `{"a": 1}`\n- base: `base\'s words`\n- tuned: `no' in text and "`x`" not in text


def test_sections_without_content_are_left_out():
    text = markdown.run_report(report(losses=[], samples=[]))
    assert "## Training loss" not in text and "## Sample answers" not in text
    assert text.index("## Scores") < text.index("## Lineage")


def test_the_champion_has_a_column_of_its_own():
    text = markdown.run_report(report(scores=ModelScores(base=BASE, tuned=TUNED, champion=BASE)))
    assert "| metric | base | tuned | champion |\n|---|---|---|---|\n" in text
    assert "| exact_match | 0.250 [0.150, 0.350] | 0.750 [0.650, 0.850] | 0.250 [0.150, 0.350] |" in text


def test_the_approval_request_shows_reasons_and_scores():
    scores = ModelScores(base=BASE, tuned=TUNED)
    text = markdown.approval_request("quickstart", DECISION, scores, confidence=0.95)
    scores_of_the_report = RUN[RUN.index("## Scores") : RUN.index("\n## Training loss")]
    assert text == (
        "# quickstart: promote?\n\nThe gate would promote the new model. With *Promote* on, it becomes the champion. "
        "With *Promote* off, it is declined. The reason is recorded.\n\n"
        "- better than base\n- better than champion\n\n" + scores_of_the_report
    )


def test_the_approval_request_says_what_the_look_may_risk():
    decision = dataclasses.replace(DECISION, budget="Look 3 of 365, 362 left: at most 5% for any false promotion.")
    text = markdown.approval_request("quickstart", decision, ModelScores(base=BASE, tuned=TUNED), confidence=0.975)
    assert text.index("better than champion") < text.index(decision.budget) < text.index("## Scores")
    assert "97.5% confidence intervals" in text


def test_the_scores_of_one_model_are_reported():
    text = markdown.scores_report(
        "champion", "quickstart", TUNED, confidence=0.95, folder="store/merge", table="store/scores.parquet"
    )
    assert text == (
        "# Scores of champion, recipe quickstart\n\n## heldout (3 rows)\n\n| metric | value |\n|---|---|\n"
        "| exact_match | 0.750 [0.650, 0.850] |\n| stops | 1.000 [0.900, 1.100] |\n\n"
        "## handwritten (2 rows)\n\n| metric | value |\n|---|---|\n| exact_match | 0.500 [0.400, 0.600] |\n\n"
        "In brackets: 95% confidence intervals.\n\n"
        "Model:\n\n```\nstore/merge\n```\n\nScores of each row:\n\n```\nstore/scores.parquet\n```\n"
    )


@pytest.mark.parametrize(
    ("values", "bars"), [([], ""), ([3.0], "▁"), ([2.0, 2.0], "▁▁"), ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█")]
)
def test_a_sparkline_reaches_from_the_lowest_to_the_highest_value(values, bars):
    assert chart.sparkline(values) == bars


def test_thinned_rows_include_the_first_and_the_last():
    rows = list(range(1000))
    found = markdown.thin(rows, 12)
    assert len(found) == 12 and found[0] == 0 and found[-1] == 999
    assert max(b - a for a, b in itertools.pairwise(found)) <= 92
    assert markdown.thin(rows[:12], 12) == rows[:12]
    assert markdown.thin(rows[:13], 12) == [0, 2, 4, 6, 8, 10, 12], "at equal distances"


def test_the_set_that_the_gate_compares_is_shown_first():
    scores = {"handwritten": TUNED["handwritten"], "heldout": TUNED["heldout"]}
    text = markdown.run_report(report(scores=ModelScores(base=BASE, tuned=scores)))
    assert text.index("## Scores on heldout") < text.index("## Scores on handwritten")


@pytest.mark.parametrize("verdict", get_args(Verdict))
def test_each_verdict_is_explained(verdict):
    text = markdown.run_report(report(decision=Decision(verdict=verdict, reasons=("why",))))
    assert text.startswith(f"# quickstart: {verdict}\n\n{markdown.VERDICTS[verdict]}\n\n- why\n")


def test_a_quoted_text_cannot_leave_its_line_or_its_backticks():
    assert markdown.quote("a\n\tb `c` | d") == "a b 'c' | d"
    assert markdown.quote("x" * 300) == "x" * 300
    assert markdown.quote("x" * 301) == "x" * 299 + "…"


@pytest.mark.parametrize(
    ("answer", "shown"),
    [("no | idea", "<code>no | idea</code>"), ("", "<em>empty</em>"), (" \n ", "<em>only white space</em>")],
)
def test_a_sample_answer_is_shown_as_it_is_by_a_reader_of_markdown(answer, shown):
    from markdown_it import MarkdownIt

    page = MarkdownIt("gfm-like", {"linkify": False}).render(
        markdown.run_report(report(samples=[SAMPLE.model_copy(update={"answer": answer})]))
    )
    assert f"<li>tuned: {shown}</li>" in page


COMPARISON = {
    "against": "base", "metric": "chrf", "kind": "guard", "difference": 0.0, "lower": -math.inf, "upper": math.inf, "n": 1,
    "state": "open", "reason": "chrf against base: too few rows",
}  # fmt: skip


def test_a_report_says_what_the_sign_of_a_difference_means_where_it_shows_one():
    compared = Decision.from_dict({"verdict": "undecided", "reasons": ["r"], "comparisons": [COMPARISON]})
    scores = ModelScores(base=BASE, tuned=TUNED)
    for decision, shown in ((compared, True), (Decision(verdict="unchanged", reasons=("r",)), False)):
        for text in (
            markdown.run_report(report(decision=decision)),
            markdown.approval_request("quickstart", decision, scores, confidence=0.95),
        ):
            assert ("- r\n\nA difference above 0 means that the new model is better" in text) == shown


def test_an_undecided_guard_does_not_make_the_report_say_that_no_gain_was_shown():
    guard = {**COMPARISON, "metric": "general_loss"}
    gain = {**COMPARISON, "metric": "exact_match", "kind": "gain", "state": "passed"}
    values = {"verdict": "undecided", "reasons": [guard["reason"]], "comparisons": [gain, guard]}
    text = markdown.run_report(report(decision=Decision.from_dict(values)))
    assert "not promoted: the gate could not decide" in text and "better." not in text.partition("\n- ")[0]


def test_a_decision_is_unchanged_by_writing_and_reading_json():
    values = {"verdict": "undecided", "reasons": ["too few rows"], "comparisons": [COMPARISON]}
    decision = Decision.from_dict(values)
    assert decision.comparisons == (Comparison(**COMPARISON),)
    in_json = {**COMPARISON, "lower": None, "upper": None}  # JSON has no infinite numbers
    assert json.dumps(decision.to_dict()) == json.dumps({**values, "comparisons": [in_json]})
    assert Decision.from_dict(json.loads(json.dumps(values))) == decision == Decision.from_dict(decision.to_dict())


def test_a_decision_with_keys_of_another_version_is_readable():
    stored = {"verdict": "reject", "reasons": ["declined by hand"], "comparisons": [], "seen": "0" * 64}
    assert Decision.from_dict(stored) == Decision(verdict="reject", reasons=("declined by hand",))


@pytest.mark.parametrize("values", [{}, {"verdict": "maybe", "reasons": []}, {"verdict": "promote", "reasons": "x"}])
def test_an_invalid_decision_is_refused(values):
    with pytest.raises(ValidationError):
        Decision.from_dict(values)


def test_a_decision_is_immutable():
    decision = Decision.from_dict({"verdict": "promote", "reasons": ["better"], "comparisons": [COMPARISON]})
    with pytest.raises(FrozenInstanceError):
        decision.verdict = "reject"
    approved = decision.with_reason("approved by hand")
    assert (approved.verdict, approved.reasons) == ("promote", ("better", "approved by hand"))
    declined = decision.overruled("reject", "declined by hand")
    assert (declined.verdict, declined.reasons) == ("reject", ("declined by hand",))
    known = Decision.unchanged("decided before", declined)
    assert (known.verdict, known.reasons) == ("unchanged", ("decided before", "declined by hand"))
    again = Decision.unchanged("decided before", dataclasses.replace(known, budget="Look 1 of 365."))
    assert again.budget == "When it was decided: Look 1 of 365."
    assert Decision.unchanged("decided before", again) == again, "nothing is said twice"
    assert approved.comparisons == declined.comparisons == known.comparisons == decision.comparisons
    assert Decision.unchanged("the challenger is the champion").comparisons == ()
    reasons = ["better"]
    assert Decision("promote", reasons).reasons == ("better",), "a list of the caller is copied"
    assert decision.to_dict()["reasons"] == ["better"]


def test_an_evaluation_report_is_unchanged_by_writing_and_reading_json():
    part = {"value": 0.5, "low": -math.inf, "high": math.inf, "n": 1}
    sample = {"id": "a", "prompt": "p", "reference": "r", "answer": "s"}
    values = {"metrics": {"heldout": {"chrf": part}, "extra": {"chrf": part}}, "samples": [sample]}
    assert EvaluationReport.model_validate(values).available == {}, "of an earlier version"
    values |= {"available": {"heldout": 5, "extra": 1}, "control_tokens": 2, "longest": 99}
    report = EvaluationReport.model_validate(values)
    assert report.metrics["heldout"]["chrf"] == MetricValue(**part)
    in_json = {**part, "low": None, "high": None}  # JSON has no infinite numbers
    stored = {**values, "metrics": {"heldout": {"chrf": in_json}, "extra": {"chrf": in_json}}}
    assert json.dumps(report.to_dict()) == json.dumps(stored)
    assert EvaluationReport.model_validate(report.to_dict()) == report


def test_a_runs_scores_are_json_by_model():
    scores = ModelScores(base=BASE, tuned=TUNED)
    assert scores.to_dict() == {"base": scores_to_dict(BASE), "tuned": scores_to_dict(TUNED), "champion": None}
    assert scores_to_dict(BASE) == {"heldout": {"exact_match": {"value": 0.25, "low": 0.15, "high": 0.35, "n": 3}}}


def test_values_and_reports_load_neither_numpy_nor_pandas():
    code = (
        "import sys; import loraflow.evaluation.values, loraflow.reporting.markdown; "
        "sys.exit(', '.join({'numpy', 'pandas', 'torch', 'prefect'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
