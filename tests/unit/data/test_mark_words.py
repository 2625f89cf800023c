"""What words, lists, texts of objects and classes beside an answer say about it, by the whole file."""

import json
import re

import pandas as pd
import pytest

from loraflow.data.answers.mark_names import named_marks, without_marks
from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.answers.unread_values import counted, doubtful, questions
from loraflow.data.cell_values import Unreadable, parsed_text
from loraflow.data.chats import BadRow
from loraflow.data.checks.check_report import CheckReport, SplitCounts
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import read_chat
from loraflow.reporting.rows import check_notes

PAIR = {"prompt": "q", "completion": "a"}


def read(folder, rows, **settings):
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows(folder, ["x.jsonl"], "auto", **settings))


def read_csv(folder, text, **settings):
    (folder / "x.csv").write_text(text)
    return list(read_rows(folder, ["x.csv"], "auto", **settings))


def rows_of(key, values, answer="a"):
    return [{"prompt": f"q{n}", "completion": answer.format(value), key: value} for n, value in enumerate(values)]


JUDGING = ["quality", "verdict", "evaluation", "human_label"]
ANYTHING = ["decision", "status", "state", "result", "outcome", "review", "rating", "review_status", "grade"]
WORDS = JUDGING + ANYTHING


@pytest.mark.parametrize("key", WORDS)
def test_a_row_whose_answer_names_the_word_is_learned(tmp_path, key):
    rows = rows_of(key, ["Rejected", "approved"], "Your application is {}: your income …")
    assert all(row.messages and row.unused_keys == (key,) for row in read(tmp_path, rows))


@pytest.mark.parametrize("key", WORDS)
def test_a_column_with_values_that_judge_nothing_is_a_class(tmp_path, key):
    assert all(row.messages for row in read(tmp_path, rows_of(key, ["paid", "rejected", "pending", "deleted"])))
    nested = [{**row, key: None, "metadata": {key: row[key]}} for row in rows_of(key, ["paid", "rejected", "open"])]
    assert all(row.messages for row in read(tmp_path, nested))


@pytest.mark.parametrize("key", JUDGING)
@pytest.mark.parametrize("other", ["approved", "good", None, "correct", "excellent"])
def test_a_column_that_judges_is_refused_if_it_has_judgements_alone_and_both_ways_out_work(tmp_path, key, other):
    rows = rows_of(key, ["rejected", other])
    first, second = read(tmp_path, rows)
    assert first.place == "x.jsonl:1" and not first.is_marked_false and second.messages
    assert first.problem.startswith(f"{key} 'rejected' may mark the answer as wrong, or be a class: ")
    assert f"set data.columns: {{train: {key}}} to leave such answers out" in first.problem
    assert f"name {key} in data.ignore to learn them" in first.problem
    found = read(tmp_path, rows, columns={"train": key})
    assert [row.marked_by for row in found] == [f"{key}: rejected", ""] and found[1].messages
    assert all(row.messages for row in read(tmp_path, rows, ignore=[key]))


@pytest.mark.parametrize("key", [*ANYTHING, "metadata.status", "resolved", "solved"])
@pytest.mark.parametrize("values", [["rejected", "approved"], ["poor", "good"], ["failed", "passed"], [False, True]])
def test_a_column_that_may_be_about_anything_is_learned_and_asked_about(tmp_path, key, values):
    outer, _, inner = key.partition(".")
    rows = [{**PAIR, "prompt": f"q{n}", outer: {inner: value} if inner else value} for n, value in enumerate(values)]
    rows = read(tmp_path, rows)
    assert all(row.messages for row in rows)
    (question,) = questions(doubtful(counted([row.told for row in rows]), {outer: 2, key: 2}))
    assert question.startswith(f"does {key} mark wrong answers? ({str(values[0]).lower()} in 1 rows")


FAILED = [(False, True), ("no", "yes"), (0, 1), ("false", "true"), (False, False), (False, "n/a"), (False, None)]
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    "key", ["success", "is_success", "successful", "metadata.success", "resolved", "is_solved", "metadata.resolved"]
)
@pytest.mark.parametrize("values", FAILED, ids=repr)
def test_a_trajectory_that_failed_is_refused(tmp_path, key, values):
    outer, _, inner = key.partition(".")
    rows = [{**CHAT, outer: {inner: value} if inner else value} for value in values]
    if "success" in key:  # of a table too
        rows = [{**PAIR, **row, "prompt": f"q{n}"} for n, row in enumerate(rows)]
        rows = [{name: value for name, value in row.items() if name != "messages"} for row in rows]
    found = read(tmp_path, rows)
    assert [bool(row.messages) for row in found] == [False, values[1] is not False]
    assert f"{key} {values[0]!r} may mark the answer as wrong" in found[0].problem


def test_a_patch_makes_a_row_a_trajectory_and_a_message_may_have_failed(tmp_path):
    assert not any(row.messages for row in read(tmp_path, [{**PAIR, "patch": "diff", "resolved": False}]))
    message = {**CHAT["messages"][1], "solved": False}
    assert not any(row.messages for row in read(tmp_path, [{"messages": [CHAT["messages"][0], message]}]))
    assert all(row.messages for row in read(tmp_path, [{**PAIR, "resolved": False}, {**PAIR, "resolved": True}]))
    assert all(row.messages for row in read(tmp_path, rows_of("success", [0, 3, 7])))  # how often


BESIDE_ONE = [
    ("quality", "bad", "medium", "good"), ("quality", "bad", "good", "n/a"), ("verdict", "INCORRECT", "CORRECT", "UNKNOWN"),
    ("human_label", "incorrect", "correct", "unsure"), ("feedback", "bad", "good", "neutral"), ("quality", "schlecht", "gut"),
    ("verdict", "falsch", "richtig"), ("execution_status", "error", "success", "unknown"), ("vote", -1, 1, "n/a"),
    ("vote", "-1", "1", "n/a"), ("test_result", "failed", "passed"), ("verification_result", False, True),
    ("validation_result", "error", "ok"), ("test_result", "timeout", "ok", "skipped"), ("metadata.label", 0, 1),
    ("metadata.label", "no", "yes"), ("review_result", "rejected", "approved"),
]  # fmt: skip


@pytest.mark.parametrize("case", BESIDE_ONE, ids=repr)
def test_a_word_that_judges_is_refused_beside_one_other_value(tmp_path, case):
    key, *values = case
    outer, _, inner = key.partition(".")
    rows = [{**PAIR, "prompt": f"q{n}", outer: {inner: value} if inner else value} for n, value in enumerate(values)]
    first, *others = read(tmp_path, rows)
    assert f"{key} {values[0]!r} may mark the answer as wrong" in first.problem and not first.is_marked_false
    assert all(row.messages for row in others)


@pytest.mark.parametrize("key", ["status", "state", "result", "outcome", "verdict", "metadata.status"])
@pytest.mark.parametrize("word", ["Wrong Answer", "RUNTIME_ERROR", "Time Limit Exceeded", "incorrect", "wrong"])
def test_a_word_that_is_about_answers_alone_is_refused_under_any_name(tmp_path, key, word):
    outer, _, inner = key.partition(".")
    few, many = [word, "Accepted"], [word, "Accepted", "queued", "skipped"]
    for values, is_read in [(few, False), (many, word in ("incorrect", "wrong"))]:
        rows = [
            {**PAIR, "prompt": f"q{n}", outer: {inner: value} if inner else value} for n, value in enumerate(values)
        ]
        first, *others = read(tmp_path, rows)
        assert bool(first.messages) is is_read and all(row.messages for row in others)


@pytest.mark.parametrize("key", ["execution_status", "verdict", "qa_status", "exit_status", "final_result"])
@pytest.mark.parametrize("word", ["error", "timeout"])
def test_a_run_that_failed_is_a_question_beside_other_values(tmp_path, key, word):
    rows = read(tmp_path, rows_of(key, [word, "success", "queued", "skipped"]))
    assert all(row.messages for row in rows)
    (question,) = questions(doubtful(counted([row.told for row in rows]), {key: 4}))
    assert question.startswith(f"does {key} mark wrong answers? ({word} in 1 rows")


def test_a_result_of_a_review_is_a_mark_as_a_flag_and_a_question_as_a_word(tmp_path):
    assert [row.is_marked_false for row in read(tmp_path, rows_of("review_result", [False, True]))] == [True, False]
    assert [row.is_marked_false for row in read(tmp_path, rows_of("review_result", [0, 1]))] == [True, False]
    loans = read(tmp_path, rows_of("review_result", ["rejected", "approved", "pending", "paid"]))
    assert all(row.messages for row in loans)
    (question,) = questions(doubtful(counted([row.told for row in loans]), {"review_result": 4}))
    assert question.startswith("does review_result mark wrong answers? (rejected in 1 rows")


@pytest.mark.parametrize("key", ["answer_status", "response_status", "answer_result"])
def test_a_status_that_names_the_answer_leaves_it_out(tmp_path, key):
    assert [row.is_marked_false for row in read(tmp_path, rows_of(key, ["incorrect", "correct"]))] == [True, False]


WAYS = [
    ("is_harmful", True, False), ("is_harmful", 1, 0), ("is_harmful", "yes", "no"), ("is_safe", "no", "yes"), ("safe", 0, 1),
    ("response_label", "toxic", "safe"), ("response_harm_label", "harmful", "unharmful"), ("verdict", "wrong answer", "OK"),
    ("quality", "very poor", "excellent"), ("human_label", False, True), ("answer_quality", "poor", "good"), ("is_correct", "falsch", True),
    ("execution_status", "timeout", "success"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "bad", "good"), WAYS)
def test_the_columns_that_a_refusal_names_leave_out_the_bad_answer_and_no_other(tmp_path, key, bad, good):
    rows = rows_of(key, [bad, good])
    first, second = read(tmp_path, rows)
    found = re.search(r"set data.columns: \{(train|exclude): (\w+)\} to leave such answers out", first.problem)
    assert second.messages and found
    first, second = read(tmp_path, rows, columns={found[1]: found[2]})
    assert first.is_marked_false and second.messages and second.learned is None


@pytest.mark.parametrize(("key", "values"), [("thumbs", [-1, 1]), ("vote", ["-1", "1"]), ("correct", [0, 2])])
def test_a_refused_number_is_to_be_written_as_a_flag(tmp_path, key, values):
    (first, _) = read(tmp_path, rows_of(key, values))
    assert "write it as is_correct (true or false) to leave such answers out" in first.problem


@pytest.mark.parametrize("word", ["failed", "timeout", "very poor", "falsch", "👎", "Incorrect"])
def test_a_column_of_words_that_the_recipe_names_leaves_the_bad_ones_out_and_refuses_those_between(tmp_path, word):
    rows = rows_of("result", [word, "success", "passed", "good", "average"])
    found = read(tmp_path, rows, columns={"train": "result"})
    assert [row.is_marked_false for row in found] == [True] + [False] * 4
    assert [bool(row.messages) for row in found] == [False, True, True, True, False]
    assert "train 'average' is not readable" in found[4].problem


def test_argillas_discarded_is_a_mark_and_a_class_of_orders_is_none(tmp_path):
    assert [bool(row.messages) for row in read(tmp_path, rows_of("record_status", ["discarded", "submitted"]))] == [
        0,
        1,
    ]
    assert all(row.messages for row in read(tmp_path, rows_of("status", ["discarded", "shipped"])))


@pytest.mark.parametrize("key", ["options", "attributes", "properties", "choices", "candidates"])
def test_a_list_of_what_may_be_chosen_judges_no_answer(key):
    items = [{"text": "a", "correct": True}, {"text": "b", "correct": False}]
    assert read_chat({**PAIR, key: items}).learned is read_chat({**PAIR, key: items[1:]}).learned is None
    assert read_chat({**PAIR, key: repr(items)}).learned is None


def test_a_list_leaves_a_row_out_only_if_all_items_that_judge_agree():
    for key in ("reviews", "annotations", "metadata"):
        bad, good, none = {"helpful": "no"}, {"helpful": "yes"}, {"text": "x"}
        assert read_chat({**PAIR, key: [bad, good, none]}).learned is None
        with pytest.raises(MarkedFalse):
            read_chat({**PAIR, key: [bad, none, bad]})
    assert read_chat({**PAIR, "correct.responses": ["no", "yes"]}).learned is None


NAN = float("nan")


@pytest.mark.parametrize(
    "text",
    [
        '{"correct": false, "score": NaN}', "{'correct': False, 'score': nan}", "{'correct': np.False_}",
        "{'correct': False, 'at': Timestamp('2024-01-01 00:00:00')}", '{"a": 1, "a": 1, "correct": false}',
        "{'correct': numpy.bool_(False)}", "{'weight': np.float64(0.0)}", "{'a': array([1, 2], dtype=int64), 'valid': 'no'}",
        "{'correct': false, 'x': null}", "[('correct', False)]", str({"correct": False, "raw": "x" * 21_000}),
        "{'weight': -0.0, 'd': datetime.datetime(2024, 1, 1)}", "OrderedDict({'correct': False})"[12:-1],
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_a_mark_in_any_text_of_an_object_is_honoured(text):
    with pytest.raises(MarkedFalse, match="by metadata"):
        read_chat({**PAIR, "metadata": text})


def test_what_pandas_writes_of_an_object_with_nan_is_read(tmp_path):
    marks = [{"correct": True, "score": 0.5}, {"correct": False, "score": NAN}]
    pd.DataFrame({"prompt": ["q", "r"], "completion": ["a", "b"], "metadata": marks}).to_csv(
        tmp_path / "x.csv", index=False
    )
    first, second = read_rows(tmp_path, ["x.csv"], "auto")
    assert first.messages and first.unused_keys == () and second.marked_by == "metadata.correct: False"


@pytest.mark.parametrize(
    "text", ["{'correct': <NA>}", '{"correct": fal', "[{'valid': no way}]", '{"train": true, "train": false}']
)
def test_a_text_of_an_object_with_a_mark_that_cannot_be_read_is_refused(tmp_path, text):
    (row,) = read(tmp_path, [{**PAIR, "metadata": text}])
    assert row.place == "x.jsonl:1" and "metadata is a text that begins as an object and has the mark" in row.problem
    with pytest.raises(Unreadable):
        parsed_text(text)


@pytest.mark.parametrize("text", ["[sic] a good one", "{not json", "{'score': <NA>}"])
def test_a_text_without_a_mark_is_no_object(text):
    assert read_chat({**PAIR, "info": text}).unread == ("info",)


def test_a_verdict_that_is_the_answer_of_every_row_is_its_class(tmp_path):
    for key in ("valid", "hallucination", "use", "correct"):
        rows = rows_of(key, ["no", "Yes"], "{}")
        assert all(row.messages for row in read(tmp_path, rows)), key
        nested = [
            {"prompt": row["prompt"], "completion": row["completion"], "metadata": {key: row[key]}} for row in rows
        ]
        assert all(row.messages for row in read(tmp_path, nested)), key
    assert read_chat({"prompt": "q", "completion": "bad", "metadata": {"rating": "bad"}}).learned is None


def test_correct_no_beside_the_answer_no_is_a_mark_if_another_answer_differs(tmp_path):
    rows = [{**PAIR, "completion": "no", "correct": "no"}, {**PAIR, "completion": "no", "correct": "yes"}]
    assert [row.is_marked_false for row in read(tmp_path, rows)] == [True, False]


PAIRS = [
    ("prompt,completion,wrong_answer,correct_answer\nq,no,no,yes\n", "its answer is the text of wrong_answer"),
    ("prompt,completion,rejected_response\nq,yes,yes\n", "its answer is the text of rejected_response"),
    ("prompt,completion,rejected\nq,no,yes\nr,yes,no\n", "rejected 'yes' may be another answer"),
]


@pytest.mark.parametrize(("text", "problem"), PAIRS)
def test_an_answer_that_may_be_the_worse_one_is_refused_if_it_is_yes_or_no(tmp_path, text, problem):
    assert read_csv(tmp_path, text)[0].problem.startswith(problem)


def test_a_worse_answer_that_is_a_number_is_compared():
    with pytest.raises(BadRow, match="its answer is the text of wrong_answer"):
        read_chat({"prompt": "2 + 2", "completion": "5", "wrong_answer": 5, "correct_answer": 4})
    assert read_chat({"prompt": "2 + 2", "completion": "4", "wrong_answer": 5, "correct_answer": 4}).learned is None


@pytest.mark.parametrize(
    ("header", "columns"),
    [
        ("question,reply,chosen,rejected\nq,no,no,yes\nr,yes,yes,no", {"completion": "reply", "prompt": "question"}),
        ("prompt,chosen_response,rejected\nq,no,yes\nr,yes,no", {"completion": "chosen_response"}),
        ("prompt,correct_answer,incorrect\nq,no,yes\nr,yes,no", {"completion": "correct_answer"}),
        ("prompt,winner,rejected\nq,no,yes\nr,yes,no", {"completion": "winner"}),
        ("prompt,reply,rejected\nq,no,yes\nr,yes,no", {"completion": "reply"}),
        ("prompt,reply,label\nq,no,no\nr,yes,yes", {"completion": "reply"}),
    ],
)
def test_columns_of_a_recipe_are_the_answers_that_the_file_is_judged_by(tmp_path, header, columns):
    rows = read_csv(tmp_path, header + "\n", columns=columns)
    assert [row.messages and row.messages[-1]["content"] for row in rows] == ["no", "yes"]


def test_rejected_is_a_mark_beside_a_renamed_answer_that_is_no_yes_or_no(tmp_path):
    rows = read_csv(tmp_path, "prompt,reply,rejected\nq,Tea.,yes\nr,Rice.,no\n", columns={"completion": "reply"})
    assert [row.marked_by for row in rows] == ["rejected: yes", ""]
    rows = read_csv(tmp_path, "prompt,completion,rejected\nq,no,True\nr,yes,False\n")
    assert [row.is_marked_false for row in rows] == [True, False]


@pytest.mark.parametrize("depth", [60, 300, 900])
def test_objects_that_are_nested_too_deeply_are_refused(tmp_path, depth):
    value = {"a": 1}
    for _ in range(depth):
        value = {"metadata": value}
    (row,) = read(tmp_path, [{**PAIR, **value}])
    assert "nested more than 50 deep" in row.problem or "deeply" in row.problem


def test_marks_that_left_rows_out_are_named_with_their_values_and_not_as_not_read():
    marks = {"is_correct: no": 2, "rejected: True": 30, "metadata.valid: no": 1}
    assert named_marks(marks) == "30 by rejected: True, 2 by is_correct: no, 1 by metadata.valid: no"
    assert without_marks({"rejected": 3, "metadata": 4, "score": 5}, marks) == {"score": 5}
    splits = SplitCounts(train=1, validation=0, heldout=0)
    report = CheckReport(
        rows=splits, sets={}, counts={"marked_false": 33}, malformed_share=0, first_problems=[], marks=marks
    )
    assert any("30 by rejected: True" in note for note in check_notes(report))
    assert "marks" not in report.model_copy(update={"marks": {}}).as_json()
