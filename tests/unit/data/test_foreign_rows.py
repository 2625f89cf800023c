"""Rows as people's tools write them: nothing in them is learned that their authors did not write, or marked as wrong."""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.chats import BadRow
from loraflow.data.files.guess_columns import columns_of, guess_columns
from loraflow.data.files.readers import Row, match_files, read_rows, readable_files
from loraflow.data.formats.chat_formats import read_chat, to_prompt
from loraflow.failures import BadData

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "completion": "a"}


def read(folder: Path, name: str, text: str, **settings) -> list[Row]:
    (folder / name).write_text(text)
    return list(read_rows(folder, [name], "auto", **settings))


def texts(row: Row) -> list[str]:
    return [message["content"] for message in row.messages]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("isCorrect", False), ("trainOnTurn", 0), ("lossWeight", "0"), ("Train?", "no"), ("loss scale", 0), ("is_train", False),
        ("use_for_training", False), ("do_not_train", True), ("excludeFromTraining", "yes"), ("is_valid", False), ("keep", 0),
        ("include", "false"), ("deleted", True), ("is_hidden", 1), ("discard", "1"), ("chosen", False), ("thumbs_up", False),
        ("thumbs_down", True), ("metadata", {"train": False}), ("meta", {"weight": 0}), ("extra", {"is_correct": "no"}),
        ("metadata.weight", 0), ("meta.rejected", True),
    ],
)  # fmt: skip
def test_a_mark_in_another_spelling_or_beside_the_answer_is_honoured(key, value):
    with pytest.raises(MarkedFalse):
        read_chat({**PAIR, key: value})
    chat = read_chat({"messages": [USER, {**ANSWER, key: value}, USER, ANSWER]})
    assert chat.learned == (3,)
    assert to_prompt({**PAIR, key: value}) == [USER]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thumbs_up", 0), ("chosen", 0), ("chosen", "a better answer"), ("keep", "in the fridge"), ("valid", "2024-01-01"),
        ("metadata", {"weight": 70}), ("metadata", {"label": 0, "source": "faq"}), ("options", {"A": "yes"}), ("meta.source", 0),
    ],
)  # fmt: skip
def test_counts_texts_and_measurements_are_no_marks_and_are_named(key, value):
    chat = read_chat({**PAIR, key: value})
    assert (chat.learned, chat.weights, chat.unread) == (None, None, (key,))


def test_a_weight_that_may_be_one_or_a_thousand_is_refused(tmp_path):
    rows = read(tmp_path, "t.csv", "prompt;completion;weight\na;b;1,000\na;b;0,500\n")
    assert "'1,000' is not readable" in rows[0].problem
    assert rows[1].weights == (0.5,)


def test_a_second_header_is_no_chat(tmp_path):
    for again in ("prompt,completion", '"prompt","completion"', '\ufeff"prompt", completion'):
        rows = read(tmp_path, "t.csv", f"prompt,completion\na,b\n{again}\nc,d\n")
        assert [bool(row.messages) for row in rows] == [True, False, True]
        assert "the header is repeated" in rows[1].problem


def test_quotes_that_do_not_count_as_quotes_are_refused_unless_all_cells_are_padded(tmp_path):
    rows = read(tmp_path, "a.csv", 'prompt,completion\nx, "b c"\n"x"," ""b c"""\ny, plain\n')
    assert "a space before a quote" in rows[0].problem
    assert texts(rows[1]) == ["x", ' "b c"'], "quotes that the author wrote"
    assert texts(rows[2]) == ["y", " plain"]
    rows = read(tmp_path, "b.csv", 'prompt, completion\nx, "b, c"\nd, e\n')
    assert [texts(row) for row in rows] == [["x", "b, c"], ["d", "e"]]
    rows = read(tmp_path, "c.csv", "prompt,completion\n'a','b'\n'a' or,b\n")
    assert "single quotes" in rows[0].problem and texts(rows[1]) == ["'a' or", "b"]


def test_rows_that_an_open_quote_joins_are_refused_in_tsv(tmp_path):
    rows = read(
        tmp_path, "t.tsv", 'prompt\tcompletion\n"What is tea\tA leaf\nWho\tMe\nSay "\tok\nz\ty\n"two\nlines"\tok\n'
    )
    assert "joins 3 rows" in rows[0].problem
    assert [texts(row) for row in rows[1:]] == [["z", "y"], ["two\nlines", "ok"]]


@pytest.mark.parametrize("missing", ["nan", "NaN", "<NA>", "\\N", "NULL", "None", "<noinput>", ""])
def test_an_optional_text_that_stands_for_nothing_is_no_part_of_the_prompt(tmp_path, missing):
    (row,) = read(tmp_path, "t.csv", f"instruction,input,output,system,history\nq,{missing},a,{missing},{missing}\n")
    assert [tuple(m.values()) for m in row.messages] == [("user", "q"), ("assistant", "a")]
    assert row.unused_keys == ()


def test_an_input_without_an_instruction_is_the_whole_prompt():
    assert read_chat({"instruction": "", "input": "TEXT", "output": "a"}).messages[0]["content"] == "TEXT"


def test_errors_of_a_spreadsheet_and_nulls_of_a_database_are_no_answers(tmp_path):
    rows = read(tmp_path, "t.csv", "prompt,completion,note\na,#NAME?,x\n#REF!,b,x\nc,\\N,x\nd,#1,#N/A\n")
    assert [bool(row.messages) for row in rows] == [False, False, False, True]
    assert "an error of a spreadsheet" in rows[0].problem and "message 1" in rows[1].problem
    assert "an empty assistant message" in rows[2].problem


CHAT = json.dumps([USER, ANSWER])


def test_a_chat_that_was_written_as_json_text_is_read_as_a_chat(tmp_path):
    wanted = [USER, ANSWER]
    prompt, completion = json.dumps([USER]), json.dumps([ANSWER])
    for row in ({"messages": [USER, ANSWER]}, {"prompt": prompt, "completion": completion}):
        assert read_chat(row).messages == wanted
        assert to_prompt(row) == wanted[:1]
    turns = json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
    assert read_chat({"conversations": turns}).messages == wanted
    assert read_chat({"dialog": CHAT}, "messages", {"messages": "dialog"}).messages == wanted
    quoted = json.dumps([["q0", "a0"]]).replace('"', '""')
    (row,) = read(tmp_path, "h.csv", f'instruction,output,history\nq,a,"{quoted}"\n')
    assert texts(row) == ["q0", "a0", "q", "a"]


def test_a_prompt_that_is_a_list_of_messages_as_text_is_never_learned_with_its_brackets():
    for row, problem in (
        ({"prompt": str([USER]), "completion": str([ANSWER])}, "Python's notation"),
        ({"prompt": json.dumps([USER]), "completion": "a"}, "a list of messages as text"),
        ({"instruction": str([USER]), "output": "a"}, "a list of messages as text"),
        ({"messages": str([USER, ANSWER])}, "Python's notation"),
    ):
        with pytest.raises(BadRow, match=problem):
            read_chat(row)
    wants_json = {"prompt": "Write the chat as JSON.", "completion": CHAT}
    assert read_chat(wants_json).messages[1]["content"] == CHAT


def test_a_placeholder_of_an_image_that_is_not_read_is_refused():
    with pytest.raises(BadRow, match="<image>, and images is not read"):
        read_chat({"messages": [{**USER, "content": "<image> What is it?"}, ANSWER], "images": ["a.png"]})
    assert read_chat({"prompt": "What is the tag <image>?", "completion": "a"}).messages
    assert read_chat({**PAIR, "image": "a.png"}).unread == ("image",)


@pytest.mark.parametrize(
    ("row", "columns", "prompt"),
    [
        ({"Instruction": "i", "Input": "x", "Output": "a"},
         {"instruction": "Instruction", "input": "Input", "output": "Output"}, "i\n\nx"),
        ({"instruction": "i", "question": "q", "answer": "a"},
         {"instruction": "instruction", "input": "question", "output": "answer"}, "i\n\nq"),
        ({"Question": "q", "Input": "x", "Answer": "a"},
         {"instruction": "Question", "output": "Answer", "input": "Input"}, "q\n\nx"),
        ({"System": "s", "Prompt": "q", "Completion": "a"},
         {"prompt": "Prompt", "completion": "Completion", "system": "System"}, "s"),
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}, "q"),
    ],
)  # fmt: skip
def test_guessed_columns_leave_out_no_part_of_the_prompt(row, columns, prompt):
    assert guess_columns(row) == columns
    chat = read_chat(row, "auto", columns)
    assert chat.messages[0]["content"] == prompt and chat.unread == ()


def test_hidden_files_are_data_only_if_they_are_named(tmp_path):
    for name in ("train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl", "._train.jsonl", "__MACOSX/train.jsonl",
                 "dataset_infos.json"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(PAIR) + "\n")
    assert (
        readable_files(tmp_path) == match_files(tmp_path, ["train*"]) == match_files(tmp_path, ["*"]) == ["train.jsonl"]
    )
    assert match_files(tmp_path, ["._train.jsonl"]) == ["._train.jsonl"]


def test_arguments_that_json_lacks_are_malformed_instead_of_a_traceback_later(tmp_path):
    for value in (datetime.date(2024, 1, 1), float("nan"), b"x"):
        call = {"function": {"name": "f", "arguments": {"day": value}}}
        messages = [{**USER, "tool_calls": None}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        pq.write_table(pa.table({"messages": pa.array([messages])}), tmp_path / "t.parquet")
        (row,) = read_rows(tmp_path, ["t.parquet"], "auto")
        assert "message 2: tool_calls[0].function.arguments cannot be written as JSON" in row.problem


@pytest.mark.parametrize(
    ("name", "text", "got", "next_step"),
    [
        ("t.jsonl", json.dumps([PAIR], indent=1), "spread over several lines", "jq -c '.[]' t.jsonl"),
        ("t.jsonl", json.dumps(PAIR, indent=1) + "\n" + json.dumps(PAIR, indent=1), "spread", "jq -c . t.jsonl"),
        ("t.jsonl", f"{json.dumps(PAIR)}\r{json.dumps(PAIR)}\r", "carriage return", r"tr '\r' '\n' < t.jsonl"),
        ("t.json", json.dumps(PAIR), "a single row", "put the rows in a list"),
        ("t.json", json.dumps({"messages": [USER, ANSWER]}), "a single row", "put the rows in a list"),
        ("t.json", json.dumps({"prompt": {"0": "a"}, "completion": {"0": "b"}}), "whole columns", "orient=\"records\""),
        ("t.json", json.dumps({"a1": PAIR, "a2": PAIR}), "the keys a1, a2", "jq -c '.[]' t.json > t.jsonl"),
        ("t.json", json.dumps({"a1": {"messages": [USER, ANSWER], "id": "x"}, "a2": {"messages": [USER, ANSWER], "id": "y"}}), "a1, a2", "jq -c '.[]' t.json"),
        ("t.json", json.dumps({"a1": {"messages": [USER, ANSWER]}, "a2": {"messages": [USER, ANSWER]}}), "a1, a2", "jq -c '.[]' t.json"),
        *(("t.json", json.dumps(splits), ", ".join(splits), "name the chat files in data.train") for splits in (
            {"train": {"prompt": ["q", "r"], "completion": ["a", "b"]}, "test": {"prompt": ["q"], "completion": ["a"]}},
            {"train": PAIR, "validation": PAIR},
            {"de": {"prompt": ["q", "r"], "completion": ["a", "b"]}, "en": {"prompt": ["q"], "completion": ["a"]}},
            {"de": {"prompt": {"0": "q"}, "completion": {"0": "a"}}, "en": {"prompt": {"0": "q"}, "completion": {"0": "a"}}},
        )),
        ("t.json", json.dumps({"data": [PAIR]}), "the keys data", "jq -c '.[\"data\"][]'"),
    ],
)  # fmt: skip
def test_a_file_whose_lines_are_no_rows_is_one_failure_with_the_command_that_converts_it(
    tmp_path, name, text, got, next_step
):
    with pytest.raises(BadData) as caught:
        read(tmp_path, name, text)
    assert got in caught.value.got and next_step in caught.value.next_step


def test_problems_of_joined_files_are_named(tmp_path):
    line = json.dumps(PAIR)
    rows = read(tmp_path, "t.jsonl", f"{line}\n\ufeff{line}\n{line},\n{{\n")
    assert rows[0].messages and columns_of(tmp_path / "t.jsonl", "t.jsonl") == {}
    assert "byte order mark" in rows[1].problem and "a comma after the row" in rows[2].problem and rows[3].problem
    (tmp_path / "w.jsonl").write_bytes(line.encode("utf-32"))
    with pytest.raises(BadData) as caught:
        list(read_rows(tmp_path, ["w.jsonl"], "auto"))
    assert caught.value.got == "UTF-32"
