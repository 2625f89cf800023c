"""Answers that foreign datasets mark as wrong, in columns that are neither weights nor labels; and preference pairs."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.answers.unread_values import counted, doubtful, questions
from loraflow.data.chats import BadRow
from loraflow.data.files.guess_columns import guess_columns
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import read_chat

PAIR = {"prompt": "q", "completion": "a"}


def read_csv(tmp_path, text, **settings):
    (tmp_path / "x.csv").write_text(text)
    return list(read_rows(tmp_path, ["x.csv"], "auto", **settings))


def answers(rows):
    return [row.messages and row.messages[-1]["content"] for row in rows]


def test_chosen_no_beside_rejected_yes_is_a_pair_of_answers_if_each_answer_is_the_chosen_one(tmp_path):
    rows = read_csv(tmp_path, "prompt,completion,chosen,rejected\nq,no,no,yes\nr,yes,yes,no\n")
    assert answers(rows) == ["no", "yes"] and rows[0].unused_keys == ("chosen", "rejected")


def test_rejected_is_no_mark_beside_a_chosen_column_that_is_the_answer(tmp_path):
    rows = read_csv(tmp_path, "prompt,chosen,rejected\nq,no,yes\nr,yes,no\n", columns={"completion": "chosen"})
    assert answers(rows) == ["no", "yes"] and rows[0].unused_keys == ("rejected",)


def test_chosen_no_beside_rejected_yes_is_a_mark_if_answers_say_neither(tmp_path):
    rows = read_csv(tmp_path, "prompt,completion,chosen,rejected\nq,Tea is.,no,yes\nr,It is.,yes,no\n")
    assert answers(rows) == [None, "It is."] and rows[0].is_marked_false


def test_a_text_beside_pairs_of_yes_and_no_is_refused(tmp_path):
    rows = read_csv(tmp_path, "prompt,completion,chosen,rejected\nq,no,no,yes\nr,red,yes,no\n")
    assert answers(rows) == [None, None] and not any(row.is_marked_false for row in rows)


@pytest.mark.parametrize("second", ["r,yes,yes,no", "r,Maybe.,Maybe.,no", "r,other,It is.,It is not."])
def test_chosen_and_rejected_that_may_be_answers_or_marks_are_refused(tmp_path, second):
    first = read_csv(tmp_path, f"prompt,completion,chosen,rejected\nq,no,yes,no\n{second}\n")[0]
    assert first.messages is None and not first.is_marked_false
    assert first.problem.startswith("chosen 'yes' and rejected 'no' may be another answer, or say whether")
    assert "set data.columns: {completion: chosen} if it is an answer" in first.problem


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad one"}],
         "chosen": [{"role": "assistant", "content": "fine"}], "rejected": [{"role": "assistant", "content": "bad one"}]},
        {**PAIR, "rejected_response": "a"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}],
         "chosen": {"from": "gpt", "value": "y"}, "rejected": {"from": "gpt", "value": "x"}},
    ],
)  # fmt: skip
def test_an_answer_that_is_the_rejected_one_is_refused(row):
    with pytest.raises(BadRow, match="its answer is the text of rejected"):
        read_chat(row)


@pytest.mark.parametrize("other", [{"rejected_response": "b"}, {"chosen": "a", "rejected": "a"}, {"wrong_answer": "b"}])
def test_an_answer_beside_another_rejected_one_is_learned(other):
    assert read_chat({**PAIR, **other}).learned is None


WRONG = [
    {"correctness": "incorrect"}, {"answer_correctness": "Wrong"},
    {"answer_quality": "bad"}, {"response_rating": "Bad"}, {"thumbs": "down"}, {"record_status": "discarded"},
    {"metadata": {"desirable": False}}, {"metadata": '{"kto_tag": false}'}, {"isAnswerCorrect": False},
    {"answer_correct": "no"}, {"response_is_valid": "No"}, {"is_wrong_answer": True}, {"label_correct": 0}, {"ok": "no"},
    {"do_not_use": True}, {"is_best_answer": False}, {"selected": "no"}, {"helpful": False}, {"hallucination": "yes"}, {"vote": "down"}, {"feedback": "👎"}, {"feedback": {"thumbs_up": False}},
    {"feedback": {"rating": "👎", "vote": "down"}}, {"metadata": '{"train": false}'}, {"metadata": "{'correct': 'no'}"},
    {"meta_json": '[{"valid": false}]'}, {"metadata": {"quality": {"correct": False}}}, {"annotations": [{"correct": "no"}]},
    {"metadata": '{"annotations": "[{\\"correct\\": false}]"}'},
    {"feedback": [{"user_id": "1", "value": "👎", "status": "submitted"}]}, {"correct.responses": ["no"]},
    {"responses.status": ["discarded"]}, {"correct.responses": "['no']"},
]  # fmt: skip


@pytest.mark.parametrize("mark", WRONG, ids=json.dumps)
def test_an_opinion_that_an_answer_is_wrong_leaves_its_row_out(mark):
    with pytest.raises(MarkedFalse):
        read_chat({**PAIR, **mark})
    if not any("responses" in key for key in mark):  # the same beside a message
        with pytest.raises(MarkedFalse):
            read_chat({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **mark}]})


UNCLEAR = [
    {"quality": "bad"}, {"verdict": "Incorrect"}, {"judgement": "wrong"}, {"human_label": "bad"},
    {"feedback": {"quality": "bad"}}, {"quality": [{"user_id": "1", "value": "bad", "status": "submitted"}]}, {"answer_quality": "poor"},
]  # fmt: skip


@pytest.mark.parametrize("key", UNCLEAR, ids=json.dumps)
def test_a_word_of_a_column_that_judges_is_refused_and_leaves_no_row_out(key):
    way = r"set data.columns: {train: \w+} |write it as is_correct \(true or false\) "
    with pytest.raises(
        BadRow, match=rf"may mark the answer as wrong, or be a class: (?:{way})to leave such answers out, or name"
    ) as caught:
        read_chat({**PAIR, **key})
    assert not isinstance(caught.value, MarkedFalse)


# Words that may be about anything: the row is learned, and its column is a question.
ASKED = [
    {"review": "Rejected"}, {"status": "rejected"}, {"state": "deleted"}, {"result": "rejected"}, {"outcome": "removed"},
    {"decision": "Rejected"}, {"metadata": {"status": "rejected"}}, {"metadata": '{"status": "rejected"}'},
    {"feedback": {"rating": "bad"}}, {"metadata": [{"state": "deleted"}]}, {"info": {"review": {"grade": "fail"}}},
    {"verdict": ["incorrect", "incorrect"]}, {"is_correct": ["falsch"]},
]  # fmt: skip


@pytest.mark.parametrize("key", ASKED, ids=json.dumps)
def test_a_word_that_may_be_about_anything_is_a_question(tmp_path, key):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **key}]}
    for row in ({**PAIR, **key}, chat):
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        (found,) = read_rows(tmp_path, ["x.jsonl"], "auto")
        (question,) = questions(doubtful(counted([found.told]), {}))
        assert found.messages and "mark wrong answers?" in question


FLAGS = [{"is_correct": [False, False]}, {"correct": [False]}, {"valid": "[False]"}, {"is_wrong": [True, True]}]


@pytest.mark.parametrize("key", FLAGS, ids=json.dumps)
def test_flags_of_several_judges_that_agree_leave_a_row_out_unless_they_are_those_of_texts(key):
    with pytest.raises(MarkedFalse):
        read_chat({**PAIR, **key})
    for others in ({"is_correct": [False, True]}, {"drafts": ["v", "w"], "is_correct": [False, False]}):
        assert read_chat({**PAIR, **others}).learned is None


def test_votes_of_minus_one_and_one_are_a_question_and_counts_are_none(tmp_path):
    for values, is_asked in (([1, -1], True), ([0, -1, 1], True), (["1", "-1"], True), ([3, -1, 0], False)):
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({**PAIR, "score": value}) + "\n" for value in values))
        rows = list(read_rows(tmp_path, ["x.jsonl"], "auto"))
        asked = doubtful(counted([row.told for row in rows]), {"score": len(values)})
        assert all(row.messages for row in rows) and bool(asked) is is_asked
        assert all("is_correct (true or false)" in line for line in questions(asked)), "train takes no -1"


RIGHT = [
    {"quality": "good"}, {"status": "open"}, {"state": "off"}, {"verdict": "false"}, {"rating": 1}, {"vote": "up"},
    {"correctness": 0}, {"correct_answer": "no"}, {"wrong_answer": "yes"}, {"metadata": '{"train": true}'},
    {"metadata": "{not json"}, {"correct.responses": ["yes"]}, {"responses.status": ["submitted", "discarded"]},
    {"product": {"train": False}}, {"selected": 0}, {"best": "the answer"}, {"helpful": 0}, {"use": "at home"}, {"feedback": "negative"},
]  # fmt: skip


@pytest.mark.parametrize("key", RIGHT, ids=json.dumps)
def test_a_value_that_does_not_say_that_the_answer_is_wrong_leaves_it_in(key):
    assert read_chat({**PAIR, **key}).learned is None


def test_a_class_that_is_also_the_answer_is_no_opinion_about_it():
    assert read_chat({"prompt": "A dull film.", "completion": "bad", "rating": "Bad"}).unread == ("rating",)


def test_an_opinion_in_another_language_is_refused_and_named():
    with pytest.raises(BadRow, match="quality 'schlecht' may mark the answer as wrong"):
        read_chat({**PAIR, "quality": "schlecht"})


def test_a_mark_in_a_map_of_parquet_is_honoured(tmp_path):
    marks = pa.array([[("train", "false")], [("train", "true")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(
        pa.table({"prompt": ["q", "r"], "completion": ["a", "b"], "metadata": marks}), tmp_path / "x.parquet"
    )
    assert answers(read_rows(tmp_path, ["x.parquet"], "auto")) == [None, "b"]


def test_chats_of_two_models_to_compare_are_not_guessed_as_the_chat():
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert guess_columns({"conversation_a": chat, "conversation_b": chat, "winner": "model_b"}) == {}
    assert guess_columns({"first": chat, "second": chat}) == {} and guess_columns({"rejected_turns": chat}) == {}
    assert guess_columns({"conversation": chat, "turn": 1}) == {"messages": "conversation"}


def test_a_cell_of_several_lines_in_a_tsv_with_a_single_column_is_read(tmp_path):
    chat = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], indent=1)
    cell = chat.replace('"', '""')
    (tmp_path / "x.tsv").write_text(f'messages\n"{cell}"\n')
    assert answers(read_rows(tmp_path, ["x.tsv"], "auto")) == ["a"]
