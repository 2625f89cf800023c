"""What exports of help desks, annotation tools and spreadsheets say about answers in columns that nobody listed."""

import json

import pandas as pd
import pytest

from loraflow.data.answers.unread_values import counted, doubtful, questions
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.files.readers import read_rows


def rows_with(tmp_path, key, values):
    """Read a row for each value; None leaves the key out."""
    rows = [
        {"prompt": f"What is {n}?", "completion": f"It is {n}.", **({} if value is None else {key: value})}
        for n, value in enumerate(values)
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(read_rows(tmp_path, ["x.jsonl"], "auto", is_training=True))


def asked(rows):
    unread = {}
    for row in rows:
        for key in row.unused_keys:
            unread[key] = unread.get(key, 0) + 1
    return questions(doubtful(counted([row.told for row in rows]), unread, len(rows)))


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("deleted_at", ["2026-01-02", None, None], "a value in 1 rows"),
        ("rejection_reason", ["made up", "", None], "a value in 1 rows"),
        ("rejectedBy", ["anna", None], "a value in 1 rows"),
        ("error", ["KeyError: 3", None], "a value in 1 rows"),
        ("issues", [["factual"], []], "a value in 1 rows"),
        ("trash", [True, None], "true in 1 rows"),
        ("approved", ["x", "", "x"], "x in 2 rows"),
        ("error", [True, False], "true in 1 rows, false in 1 rows"),
        ("errors", ["True", "False"], "true in 1 rows, false in 1 rows"),
        ("exception", ["yes", "no"], "true in 1 rows, false in 1 rows"),
        ("issues", [True, False], "true in 1 rows, false in 1 rows"),
        ("issues", [["wrong"], []], "wrong in 1 rows"),
        ("error_type", ["true", "false"], "true in 1 rows, false in 1 rows"),
        ("error_message", ["wrong", None], "wrong in 1 rows"),
        ("error_message", ["wrong", False], "wrong in 1 rows, false in 1 rows"),
        ("error_message", ["bad answer", "ok"], "bad answer in 1 rows"),
        ("failure_reason", ["incorrect", "late"], "incorrect in 1 rows, a value in 1 rows"),
        ("rejection_reason", ["low", "style"], "low in 1 rows, a value in 1 rows"),
        ("korrekt", ["ja", "nein"], "ja in 1 rows, nein in 1 rows"),
        ("correcto", ["sí", "no"], "si in 1 rows, false in 1 rows"),
        ("正解", ["はい", "いいえ"], "はい in 1 rows, いいえ in 1 rows"),
        ("quality_choice", ["Bad answer", "Good answer"], "bad answer in 1 rows"),
        ("reaction", [":-1:", ":+1:"], "-1 in 1 rows, true in 1 rows"),
        ("feedback", ["👎🏽", "👍🏽"], "👎🏽 in 1 rows"),
        ("review_status", ["Needs work", "Approved"], "needs work in 1 rows"),
        ("status", ["DO NOT USE", "fine"], "do not use in 1 rows"),
        ("annotation_status", ["in_progress", "done"], "in_progress in 1 rows"),
        ("verification", ["unverified", "verified"], "unverified in 1 rows"),
        ("rating", [{"overall": "bad"}, {"overall": "good"}], "bad in 1 rows"),
        ("tags", [["wrong", "math"], ["math"]], "wrong in 1 rows"),
        ("exact_match", [0, 1], "false in 1 rows, true in 1 rows"),
        ("finish_reason", ["content_filter", "stop"], "content_filter in 1 rows"),
        ("finishReason", ["SAFETY", "STOP"], "SAFETY in 1 rows"),
    ],
)
def test_a_column_that_may_mark_answers_is_a_question(tmp_path, key, values, said):
    rows = rows_with(tmp_path, key, values)
    assert all(row.messages for row in rows), "only a question"
    (question,) = asked(rows)
    assert f"({said})" in question


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("error", [None, None]), ("is_code", [True, True]), ("turn", [1, None]), ("n_edits", [1, 2]), ("spam", [1, 1]),
        ("language", ["ja", "no"]), ("direction", ["si", "so"]), ("tags", [["good", "bad"], ["math"]]), ("topic", ["test", "exam"]),
        ("sentiment", ["low", "high"]), ("issues", [[], []]), ("error_count", [0, 3]), ("topic", ["answer", "response"]),
        ("size", ["x", None]), ("deleted_at", ["2026", "2026"]), ("spam", [1, None]), ("featured", ["1", None]),
        *(("error", [nothing, None]) for nothing in ("none", "None", "N/A", "n/a", "-", "ok", "null", "0", 0)),
        ("issues", [3, 0, 1]), ("deleted_by", ["None", None]),
    ],
)  # fmt: skip
def test_other_columns_are_named_without_a_question(tmp_path, key, values):
    assert asked(rows_with(tmp_path, key, values)) == []


def test_a_flag_in_metadata_is_a_question(tmp_path):
    (question,) = asked(rows_with(tmp_path, "metadata", [{"error": True}, {"error": False}]))
    assert "does metadata.error mark wrong answers? (true in 1 rows, false in 1 rows)" in question


def test_numbers_of_named_classes_are_no_question(tmp_path):
    rows = [{"text": f"It is {n}.", "label": n % 2, "label_text": ("ham", "spam")[n % 2]} for n in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "text", "completion": "label_text"}
    read = list(read_rows(tmp_path, ["x.jsonl"], "auto", columns, is_training=True))
    assert all(row.messages and not row.is_marked_false for row in read) and asked(read) == []


@pytest.mark.parametrize("key", ["qa_ok", "verified_by_human", "golden"])
def test_no_advice_leaves_out_the_rows_that_a_column_calls_good(tmp_path, key):
    assert "exclude:" not in "".join(asked(rows_with(tmp_path, key, [True, None])))


def test_a_column_of_splits_with_another_name_is_asked_about(tmp_path):
    (question,) = asked(rows_with(tmp_path, "purpose", ["train", "test", "train"]))
    assert question.startswith("does purpose keep rows for tests? (train in 2 rows, test in 1 rows)")
    assert "name the column split" in question
    rows = rows_with(tmp_path, "split", ["train", "test", "train"])
    assert [row.is_marked_false for row in rows] == [False, True, False], "what the question advises"


def test_the_advice_for_rows_with_a_flag_leaves_them_out(tmp_path):
    (question,) = asked(rows_with(tmp_path, "trash", [True, None, None]))
    assert "set data.columns: {exclude: trash}" in question and "train: trash" not in question
    rows = list(read_rows(tmp_path, ["x.jsonl"], "auto", {"exclude": "trash"}, is_training=True))
    assert [row.is_marked_false for row in rows] == [True, False, False]


@pytest.mark.parametrize("key", ["loss_masks", "train_mask", "message_weights"])
def test_a_list_of_marks_for_each_message_is_refused(tmp_path, key):
    for row in rows_with(tmp_path, key, [[0, 0], [False, True]]):
        assert row.problem and row.problem.startswith(f"{key} [")


EARLIER = [{"role": "user", "content": "Is tea a herb?"}, {"role": "assistant", "content": "No."}]
COHERE = [{"role": "USER", "message": "Is tea a herb?"}, {"role": "CHATBOT", "message": "No."}]


def first(tmp_path, row):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    columns = columns_of(tmp_path / "x.jsonl", "x.jsonl")
    return next(read_rows(tmp_path, ["x.jsonl"], "auto", columns)), columns


@pytest.mark.parametrize("key", ["chat_history", "dialogue_history", "previous_messages", "conversation_history"])
@pytest.mark.parametrize("pair", [("question", "answer"), ("prompt", "completion"), ("input", "output")])
def test_earlier_messages_are_not_left_out(tmp_path, key, pair):
    row, _ = first(tmp_path, {key: EARLIER, pair[0]: "Why?", pair[1]: "It is a shrub."})
    assert row.messages is None and f"{key} has earlier messages, which are not read; jq -c" in row.problem
    assert first(tmp_path, {key: [], pair[0]: "Why?", pair[1]: "It is a shrub."})[0].messages
    written = {key: EARLIER, pair[0]: "Is tea a herb? No. Why?", pair[1]: "It is a shrub."}
    assert first(tmp_path, written)[0].messages, "the prompt has them"


@pytest.mark.parametrize("as_text", [json.dumps, repr])
def test_earlier_messages_that_are_text_in_a_cell_are_not_left_out(tmp_path, as_text):
    cells = {"chat_history": [as_text(EARLIER), "[]", "none"], "question": ["Why?"] * 3, "answer": ["A shrub."] * 3}
    pd.DataFrame(cells).to_csv(tmp_path / "x.csv", index=False)
    columns = columns_of(tmp_path / "x.csv", "x.csv")
    first, *others = read_rows(tmp_path, ["x.csv"], "auto", columns)
    assert first.problem == (
        "chat_history has earlier messages, which are not read; write the row as messages; "
        "or name chat_history in data.ignore"
    )
    assert all(row.messages for row in others)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context", {"role": "user", "content": "a passage of one object"}),
        ("chat_history", [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "A shrub."}]),
        ("chat_history", [{"role": "user", "content": "Why?"}]),
    ],
)
def test_a_text_that_loses_nothing_is_not_refused(tmp_path, key, value):
    written = {key: json.dumps(value), "prompt": "Why?", "completion": "A shrub."}
    assert first(tmp_path, written)[0].messages


def test_an_earlier_answer_that_only_begins_the_answer_is_lost(tmp_path):
    own = json.dumps([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "A shrub."}])
    row, _ = first(tmp_path, {"chat_history": own, "question": "Why?", "answer": "A shrub. Or a tree."})
    assert row.problem.startswith("chat_history has earlier messages")


@pytest.mark.parametrize("name", ["verlauf", "beispiele", "log", "thread", "chat"])
@pytest.mark.parametrize(
    "pair",
    [{"frage": "Was ist das?", "antwort": "Tee."}, {"final_answer": "Tea."}, {"betreff": "Was ist das?"}],
    ids=lambda pair: next(iter(pair)),
)
def test_turns_as_text_beside_another_text_are_not_guessed(tmp_path, name, pair):
    pd.DataFrame([{**pair, name: json.dumps(EARLIER)}] * 3).to_csv(tmp_path / "x.csv", index=False)
    assert columns_of(tmp_path / "x.csv", "x.csv") == {}
    pd.DataFrame([{"id": "c-17", "sprache": "de", name: json.dumps(EARLIER)}] * 3).to_csv(
        tmp_path / "y.csv", index=False
    )
    assert columns_of(tmp_path / "y.csv", "y.csv") == {"messages": name}


def test_no_command_puts_the_answer_into_the_prompt(tmp_path):
    own = [*EARLIER, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is a shrub."}]
    row, _ = first(tmp_path, {"chat_history": own, "question": "Why?", "answer": "It is a shrub."})
    assert row.messages is None and "jq" not in row.problem


def test_no_command_makes_a_chat_that_begins_with_an_answer(tmp_path):
    pair = {"question": "Why?", "answer": "It is a shrub."}
    greeting = {"role": "assistant", "content": "How can I help?"}
    assert first(tmp_path, {"chat_history": [greeting], **pair})[0].messages, "no question that the answer may need"
    row, _ = first(tmp_path, {"chat_history": [greeting, *EARLIER], **pair})
    assert row.problem.startswith("chat_history has earlier messages") and "jq" not in row.problem


@pytest.mark.parametrize(
    "row",
    [
        {"preamble": "Be kind.", "chat_history": COHERE, "message": "Why?", "text": "It is a shrub."},
        {"chat_history": EARLIER, "user_query": "Why?", "bot_response": "It is a shrub."},
    ],
)
def test_the_history_of_a_chat_is_not_taken_for_the_chat(tmp_path, row):
    read, columns = first(tmp_path, row)
    assert read.messages is None and columns == {}
    assert "if chat_history is the whole chat, set data.columns: {messages: chat_history}" in read.problem
    named = list(read_rows(tmp_path, ["x.jsonl"], "auto", {"messages": "chat_history"}))
    assert len(named[0].messages) == 2, "what the message advises"


def test_a_history_without_another_text_is_the_chat(tmp_path):
    for other in ({"instance_id": "a-1"}, {"system_prompt": "Be kind."}, {"commit_message": "fix"}):
        read, columns = first(tmp_path, {"history": EARLIER, **other})
        assert columns == {"messages": "history"} and read.messages[-2:] == EARLIER


@pytest.mark.parametrize("keys", [("prompt", "completion"), ("instruction", "output")])
@pytest.mark.parametrize("context", [{}, {"input": "tea"}])
def test_a_history_that_has_the_answer_is_refused(tmp_path, keys, context):
    row = {keys[0]: "Why?", keys[1]: "It is a shrub.", **(context if keys[0] == "instruction" else {})}
    asked = f"Why?\n\n{context['input']}" if "input" in row else "Why?"
    before = ["Is tea a herb?", "No."]
    assert first(tmp_path, {**row, "history": [before]})[0].messages
    assert first(tmp_path, {**row, "history": [[asked, "A tree."]]})[0].messages, "it was asked again"
    refused, _ = first(tmp_path, {**row, "history": [before, [asked, "It is a shrub."]]})
    assert refused.messages is None and refused.problem.startswith("history ends with the question and answer")
    assert first(tmp_path, {keys[0]: "next", keys[1]: "ok", "history": [["next", "ok"]]})[0].messages, "said twice"


@pytest.mark.parametrize("key", ["retrieved_docs", "retrieved_context", "retrieved_chunks", "retrieved_documents"])
def test_a_retrieved_passage_that_the_prompt_lacks_is_refused(tmp_path, key):
    passage = "Tea is made of the leaves of a shrub, which grows in Asia. It is no herb at all."
    pair = {"prompt": "Is tea a herb?", "completion": "No."}
    assert f"{key} has a text that the prompt lacks" in first(tmp_path, {**pair, key: [passage]})[0].problem
    assert first(tmp_path, {**pair, key: [passage], "prompt": f"{passage} Is tea a herb?"})[0].messages
    assert first(tmp_path, {**pair, key: ["a.pdf"]})[0].messages
    for other in ("retrieved_query", "retrieved_examples", "retrieved_similar_answer", "retriever"):
        assert first(tmp_path, {**pair, other: [passage]})[0].messages, "no passage that the answer needs"
