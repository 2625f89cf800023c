"""Columns that are not read and may say which answers are wrong are a question, and the recipe can answer it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.config.data_sources import COLUMNS
from loraflow.data.answers.labels import Labels
from loraflow.data.answers.unread_values import counted, doubtful, questions, told_by
from loraflow.data.checks.check_report import CheckReport
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.files.readers import read_rows
from loraflow.reporting.rows import check_notes
from tests.unit.data.test_check import run_check

PAIR = {"prompt": "q", "completion": "a"}


def read(folder, rows, columns=None, ignore=()):
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({**PAIR, "prompt": f"q{n}", **row}) + "\n" for n, row in enumerate(rows))
    )
    return list(read_rows(folder, ["t.jsonl"], "auto", columns or {}, ignore=ignore))


def asked(folder, key, values):
    rows = read(folder, [{key: value} for value in values])
    unread = {key: sum(key in row.unused_keys for row in rows)}
    return doubtful(counted([row.told for row in rows]), unread)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([True, False, True], {"true": 2, "false": 1}),
        (["yes", "no"], {"true": 1, "false": 1}),
        ([0, 1, 1, None, ""], {"true": 2, "false": 1}),
        (["1", "0"], {"true": 1, "false": 1}),
        (["good", "very poor", "average"], {"very poor": 1}),
        (["safe", "unsafe"], {"unsafe": 1}),
        ([True, True], None),
        ([0, 1, 2], None),
        (["yes", "no", "maybe"], None),
        ([0.5, 1], None),
        (["a text that is wrong", "b"], None),
    ],
)
def test_a_column_of_true_and_false_or_with_a_word_that_judges_is_a_question(tmp_path, values, expected):
    assert asked(tmp_path, "human_verdicts", values) == ({"human_verdicts": expected} if expected else {})


@pytest.mark.parametrize("values", [["yes", "no", "n/a"], [True, False, "unknown"]], ids=str)
def test_one_value_that_is_no_flag_does_not_hide_that_a_row_is_not_solved(tmp_path, values):
    assert list(asked(tmp_path, "resolved", values)) == ["resolved"]


@pytest.mark.parametrize("key", ["task_success", "is_resolved", "problem_solved", "run_successful"])
def test_false_in_every_row_is_a_question_where_it_says_that_the_answer_failed(tmp_path, key):
    assert asked(tmp_path, key, [False, "no"]) == {key: {"false": 2}}
    assert (
        asked(tmp_path, key, [True, "yes"])
        == asked(tmp_path, key, [0, 5, 7])
        == asked(tmp_path, "flagged", [False])
        == {}
    )


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("lang", ["ko", "en"]), ("language_code", ["mal", "eng"]), ("language", ["false", "true"]), ("author", ["sai", "nguyen"]),
        ("name", ["galt", "fel"]), ("tag", ["ko", "mal"]), ("complexity", ["low", "high"]), ("size", ["half", "full"]),
        ("context_window", ["partial", "full"]), ("turn", [0, 1]), ("cluster_id", ["0", "1"]), ("speaker", [0, 1]), ("gender", ["n", "y"]),
    ],
)  # fmt: skip
def test_codes_numbers_and_sizes_are_no_question(tmp_path, key, values):
    assert asked(tmp_path, key, values) == {}


@pytest.mark.parametrize(
    ("key", "values", "word"),
    [
        ("input_quality", ["low", "high"], "low"), ("human_check", ["partial", "full"], "partial"), ("is_checked", [0, 1], "false"),
        ("isDone", ["0", "1"], "false"), ("qa", ["mal", "bien"], "mal"), ("tag", ["bad", "x"], "bad"), ("checked", [0, 1], "false"),
    ],
)  # fmt: skip
def test_words_and_numbers_of_columns_that_judge_are_a_question(tmp_path, key, values, word):
    assert asked(tmp_path, key, values)[key][word] == 1


def test_a_key_of_metadata_is_asked_about_and_one_that_is_read_is_not(tmp_path):
    rows = read(tmp_path, [{"metadata": {"checked": n % 2 == 0, "id": n}, "is_correct": n > 0} for n in range(4)])
    columns = doubtful(counted([row.told for row in rows]), {"metadata": 3})
    assert columns == {"metadata.checked": {"false": 2, "true": 1}}
    (tmp_path / "t.jsonl").write_text(json.dumps({**PAIR, "metadata": {"checked": True, "kept": False}}))
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", ignore=["metadata.checked"])
    assert row.told == (("metadata.kept", "false"),)
    (line,) = questions(columns)
    assert line.startswith("does metadata.checked mark wrong answers? (false in 2 rows, true in 1 rows)")
    assert "data.ignore" in line and "data.columns" not in line


@pytest.mark.parametrize("judge", ["judge", "grader", "critique", "llm_judgement"])
def test_what_a_judge_says_in_its_object_is_asked_about(tmp_path, judge):
    words = ("incorrect", "correct")
    rows = read(tmp_path, [{judge: {"verdict": word, "strict": n > 0}} for n, word in enumerate(words)])
    assert doubtful(counted([row.told for row in rows]), {judge: 2}) == {f"{judge}.verdict": {"incorrect": 1}}


@pytest.mark.parametrize(
    "key, member", [("order", "status"), ("payment", "result"), ("ticket", "resolved"), ("u17", "review")]
)
def test_an_object_that_is_no_judges_is_not_asked_about(tmp_path, key, member):
    rows = read(tmp_path, [{key: {member: word}} for word in ("rejected", "failed", False, True)])
    assert doubtful(counted([row.told for row in rows]), {key: 4}) == {}


def test_a_dictionary_with_data_as_keys_makes_no_long_line(tmp_path):
    rows = read(tmp_path, [{"metadata": {f"is_valid_{n}": flag for n in range(5000)}} for flag in (True, False)])
    *_, line = questions(doubtful(counted([row.told for row in rows]), {"metadata": 2}))
    assert line.startswith("4995 more columns like these: metadata.is_valid_") and line.endswith(" and 4975 more")
    assert line.count("metadata.") == 20


def test_no_in_another_language_is_a_question_in_a_column_of_verdicts_with_any_other_words(tmp_path):
    rows = read(tmp_path, [{"is_correct": word} for word in ("ja", "nein", "vielleicht")])
    assert doubtful(counted([row.told for row in rows]), {"is_correct": 3}) == {"is_correct": {"nein": 1}}


def test_a_key_of_the_messages_of_a_chat_is_asked_about(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    chats = [
        {"chat": [{"role": "user", "content": "q", "toxic": True}, {"role": "assistant", "content": "a", "toxic": toxic, "turn": 1}]}
        for toxic in (True, False)
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    rows = list(read_rows(tmp_path, ["t.jsonl"], "auto", {"messages": "chat"}))
    assert doubtful(counted([row.told for row in rows]), {"chat.toxic": 2, "chat.turn": 2}) == {
        "chat.toxic": {"true": 2, "false": 1}
    }
    messages = [{**user, "toxic": True}, {**answer, "toxic": False}, user, {**answer, "toxic": True}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto")
    assert doubtful(counted([row.told]), {"messages.toxic": 1}) == {"messages.toxic": {"true": 1, "false": 1}}


def test_at_most_five_columns_are_asked_about_in_full():
    lines = questions({f"c{n}": {"true": 1, "false": 1} for n in range(8)})
    assert len(lines) == 6 and lines[-1] == "3 more columns like these: c5, c6, c7"


@pytest.mark.parametrize(("key", "expected"), [("train", [True, False, True]), ("exclude", [False, True, True])])
def test_the_columns_that_a_question_names_answer_it(tmp_path, key, expected):
    assert key in COLUMNS and f"{key}: checked" in questions({"checked": {"true": 1, "false": 1}})[0]
    rows = read(tmp_path, [{"checked": True}, {"checked": "no"}, {}], {key: "checked"})
    assert [row.messages is not None for row in rows] == expected
    assert {row.marked_by for row in rows if row.is_marked_false} == {
        "checked: no" if key == "train" else "checked: True"
    }
    assert all(row.unused_keys == () for row in rows)


def test_a_run_and_data_check_ask(tmp_path):
    (tmp_path / "data").mkdir()
    read(tmp_path / "data", [{"checked": n % 3 > 0, "completion": f"a\r\nb{n}"} for n in range(30)])
    report = run_check(tmp_path / "data", tmp_path / "out")
    assert report["doubtful"] == {"checked": {"true": 20, "false": 10}} and report["counts"]["carriage_returns"] == 30
    notes = check_notes(CheckReport.model_validate(report))
    assert any(note.startswith("does checked mark wrong answers?") for note in notes)
    assert "30 rows have carriage returns in their texts; the training keeps them" in notes
    done = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "data")])
    assert "question  does checked mark wrong answers? (true in 20 rows, false in 10 rows)" in done.output
    assert "30 rows have carriage returns" in done.output
    done = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "data"), "--ignore", "checked", "--json"])
    document = json.loads(done.output)
    assert "doubtful" not in document and document["unread"] == {}


def test_ignore_belongs_to_a_file_and_not_to_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text("model:\n")
    done = CliRunner().invoke(cli, ["data", "check", str(tmp_path / "r.yaml"), "--ignore", "x"])
    assert done.exit_code != 0 and "--ignore and a recipe exclude each other" in str(done.exception)


@pytest.mark.parametrize(
    "inner", [{"quality": "bad", "id": 1}, json.dumps({"quality": "bad", "id": 1}), [{"quality": "bad"}]]
)
def test_a_key_inside_an_object_is_ignored_alone(tmp_path, inner):
    marked = {"metadata": inner, "extra": {"train": False}}
    assert [row.messages is None for row in read(tmp_path, [{"metadata": inner}])] == [True]
    assert [row.problem for row in read(tmp_path, [{"metadata": inner}], ignore=["metadata.quality"])] == [None]
    (row,) = read(tmp_path, [marked], ignore=["metadata.quality"])
    assert row.is_marked_false and row.marked_by == "extra.train: False"


def test_a_key_inside_a_map_of_parquet_and_inside_a_message_is_ignored(tmp_path):
    kind = pa.map_(pa.string(), pa.string())
    table = {"prompt": ["q"], "completion": ["a"], "metadata": pa.array([[("quality", "bad"), ("id", "1")]], kind)}
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    (row,) = read_rows(tmp_path, ["t.parquet"], "auto")
    assert row.messages is None
    (row,) = read_rows(tmp_path, ["t.parquet"], "auto", ignore=["metadata.quality"])
    assert row.messages
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "metadata": {"train": False}}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": chat}))
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto", ignore=["metadata.train"])
    assert row.messages and row.learned is None


def test_lines_in_cells_end_as_everywhere(tmp_path):
    (tmp_path / "t.csv").write_bytes(b'prompt,completion\r\n"one\r\ntwo","three\rfour"\r\n')
    (row,) = read_rows(tmp_path, ["t.csv"], "auto")
    assert [message["content"] for message in row.messages] == ["one\ntwo", "three\nfour"]
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "one\r\ntwo", "completion": "a"}))
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto")
    assert row.messages[0]["content"] == "one\r\ntwo", "JSON says which characters it means"


def asked_of(folder, rows):
    """Return the questions about rows of JSON lines, as check_dataset asks them."""
    found = read(folder, rows)
    unread = {key: sum(key in row.unused_keys for row in found) for row in found for key in row.unused_keys}
    return doubtful(counted([row.told for row in found]), unread, len(found))


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("metadata", {"korrekt": "ja"}, {"korrekt": "nein"}),
        ("metadata", {"approuvé": "oui"}, {"approuvé": "non"}),
        ("metadata", {"评价": "好"}, {"评价": "差"}),
        ("metadata", {"review_note": "ok"}, {"review_note": "blocked"}),
        ("test_result", {"report": {"resolved": True}}, {"report": {"resolved": False}}),
        ("results", {"judge": {"verdict": "correct"}}, {"judge": {"verdict": "incorrect"}}),
        ("eval_results", {"correctness": {"passed": True}}, {"correctness": {"passed": False}}),
        ("scores", {"Factuality": 1}, {"Factuality": 0}),
        ("scores", {"match": {"value": 1}}, {"match": {"value": 0}}),
        ("scores", [{"name": "correctness", "value": 1}], [{"name": "correctness", "value": 0}]),
        ("assessments", [{"feedback": {"value": "yes"}}], [{"feedback": {"value": "no"}}]),
        ("judges", [{"name": "j1", "verdict": "right"}], [{"name": "j1", "verdict": "wrong"}]),
        ("annotations", [{"result": [{"value": {"choices": ["Correct"]}}]}], [{"result": [{"value": {"choices": ["Incorrect"]}}]}]),
        ("qa", '{"passed": true}', '{"passed": false}'),
        ("audit", {"status": "passed"}, {"status": "failed"}),
        ("distilabel_metadata", {"passed_filter": True}, {"passed_filter": False}),
        ("flags", "[]", '["wrong"]'),
        ("kommentar", ["gut"], ["schlecht"]),
        ("review_decision", "keep", "discard"),
        ("human_action", "Keep", "Remove"),
        ("review_status", "approved", "changes requested"),
        ("Status", "Freigegeben", "Nicht freigegeben"),
        ("fact_check", "SUPPORTED", "NOT SUPPORTED"),
        ("状态", "通过", "不通过"),
        ("Gut?", "J", "N"),
        ("exact_match", "1.0", "0.0"),
        ("split_name", "train", "test"),
        ("phase", "train", "valid"),
    ],
)  # fmt: skip
def test_what_tools_and_people_write_is_a_question(tmp_path, key, good, bad):
    questions_of = asked_of(tmp_path, [{key: good}, {key: bad}, {key: good}])
    assert [name.partition(".")[0] for name in questions_of] == [key]
    assert asked_of(tmp_path, [{key: good}, {key: good}]) == {}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("priority", ["high", "normal"]), ("rating", ["good", "excellent"]), ("status", ["approved", "pending", "paid"]),
        ("side", ["right", "left"]), ("invoice", ["not paid", "open"]), ("kind", ["structured", "unstructured"]),
        ("code", ["ok", "other"]), ("payment", [{"result": {"valid": True}}, {"result": {"valid": False}}]),
        ("file", ["train", "part2"]), ("level", ["0.0", "1.0"]),
        ("weather", ["good", "rain"]), ("category", ["keep", "other"]), ("action", ["pass", "shoot"]),
        ("condition", ["good", "used"]), ("state", ["ok", "degraded"]), ("order_status", ["accepted", "shipped"]),
        ("loan_status", ["approved", "pending"]), ("verdict", ["guilty", "not guilty"]), ("payment", ["paid", "not paid"]),
        ("payment_status", ["paid", "not paid"]), ("genre", ["fiction", "non-fiction"]), ("drug", ["steroidal", "non steroidal"]),
        ("smoker", ["smoker", "not smoker"]), ("hemisphere", ["N", "S"]), ("channel", ["o", "n"]), ("emotion", ["j", "n"]),
        ("customer_metadata", [{"active": True}, {"active": False}]), ("usage_metadata", [{"cached": True}, {"cached": False}]),
        ("image_metadata", [{"exif": True, "flash": "no"}, {"exif": False, "flash": "yes"}]),
        ("search_results", [[{"snippet": "good"}], [{"snippet": "bad"}]]), ("lab_results", [{"value": 1}, {"value": 0}]),
    ],
)  # fmt: skip
def test_words_without_an_opposite_and_objects_of_others_are_no_question(tmp_path, key, values):
    assert asked_of(tmp_path, [{key: value} for value in values]) == {}


@pytest.mark.parametrize("nothing", ["None", "nan", "NULL", " ", float("nan")], ids=str)
def test_a_cell_that_says_nothing_hides_no_question(tmp_path, nothing):
    flags = [{"human_verified": flag} for flag in (True, False, nothing)]
    assert asked_of(tmp_path, flags) == {"human_verified": {"true": 1, "false": 1}}
    assert asked_of(tmp_path, [{"note": nothing}]) == {} and not read(tmp_path, [{"note": nothing}])[0].unused_keys


def test_messages_that_are_text_in_a_cell_are_asked_about(tmp_path):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    cells = [json.dumps([chat[0], {**chat[1], "label": word}]) for word in ("ja", "nein", False)]
    pq.write_table(pa.table({"dialog": cells}), tmp_path / "t.parquet")
    columns = columns_of(tmp_path / "t.parquet", "t.parquet")
    assert columns == {"messages": "dialog"}
    rows = list(read_rows(tmp_path, ["t.parquet"], "auto", columns))
    assert [bool(row.messages) for row in rows] == [True, True, False], "false is a mark"
    assert doubtful(counted([row.told for row in rows]), {"dialog.label": 2}) == {"dialog.label": {"ja": 1, "nein": 1}}
    alone = [row.told for row in rows[1:2]]
    assert doubtful(counted(alone), {"dialog.label": 1}) == {"dialog.label": {"nein": 1}}


def test_an_answer_with_a_thumb_up_is_read_like_one_with_a_thumb_down(tmp_path):
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    thumbs = [{"messages": [user, {**answer, "answer_rating": "👍"}, user, {**answer, "answer_rating": "👎"}]}]
    (tmp_path / "t.jsonl").write_text(json.dumps(thumbs[0]) + "\n")
    (row,) = read_rows(tmp_path, ["t.jsonl"], "auto")
    assert (row.learned, row.unused_keys) == ((1,), ())


@pytest.mark.parametrize("key", ["remark", "accepted", "status"])
def test_a_column_of_many_words_is_looked_at_a_few_times(key):
    rows = [{**PAIR, key: word} for n in range(300) for word in (f"not {n}", f"note {n}", "approved")]
    read_again = []
    labels = Labels(lambda: read_again.append(1) or iter(rows))
    assert not any(told_by(row, [key], labels) for row in rows)
    assert len(read_again) < 5 and len(labels.asked) < 5


@pytest.mark.parametrize("key", ["rejected", "wrong", "hallucination", "is_bad", "discard"])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["J", "N"], "j"),
        (["S", "N"], "s"),
        (["sí", "no"], "si"),
        (["J", "false"], "j"),
        (["ja", "false"], "ja"),
        (["oui", False], "oui"),
        (["はい", "no"], "はい"),
    ],
)
def test_yes_in_another_language_in_a_column_of_wrong_answers_is_a_question(tmp_path, key, values, expected):
    assert asked_of(tmp_path, [{key: value} for value in values]) == {key: {expected: 1}}


@pytest.mark.parametrize("values", [["J", "N"], ["sí", "no"], ["ja", False]], ids=str)
def test_yes_in_another_language_in_a_column_of_right_answers_is_learned(tmp_path, values):
    rows = read(tmp_path, [{"is_correct": value} for value in values])
    assert [bool(row.messages) for row in rows] == [True, False]
    assert asked_of(tmp_path, [{"is_correct": value} for value in values]) == {}


@pytest.mark.parametrize("key", ["is_correct", "valid", "label", "phase"])
def test_a_column_of_train_and_test_is_a_question_under_each_name(tmp_path, key):
    assert asked_of(tmp_path, [{key: "train"}, {key: "test"}]) == {key: {"train": 1, "test": 1}}
