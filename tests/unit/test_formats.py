import json
from pathlib import Path

import pandas as pd
import pytest

from loraflow.data.formats import BadRow, guess_columns, match_files, read_rows, to_messages
from loraflow.failures import BadData

WANTED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": WANTED},
        {"messages": [{**m, "name": "x"} for m in WANTED], "source": "s"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": WANTED[:1], "completion": WANTED[1:]},
        {
            "messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in WANTED],
            "tools": [],
        },
    ],
)
def test_every_form_gives_the_same_chat(row):
    assert to_messages(row) == WANTED


def test_columns_of_other_names(tmp_path):
    (tmp_path / "x.csv").write_text("id,question,answer\n1,q,a\n")
    columns = {"prompt": "question", "completion": "answer"}
    (row,) = read_rows(tmp_path, ["x.csv"], "auto", columns)
    assert row.messages == WANTED
    (row,) = read_rows(tmp_path, ["x.csv"], "auto", {"prompt": "ask", "completion": "answer"})
    assert row.problem == "expected the column ask (prompt); got id, question, answer"
    assert guess_columns({"id": "1", "question": "q", "answer": "a"}) == columns
    assert guess_columns({"text": "q"}) == guess_columns([]) == guess_columns({"question": 1, "answer": "a"}) == {}


def test_dollys_context_is_part_of_the_question():
    row = {"instruction": "Who?", "context": "Ann ran.", "response": "Ann"}
    assert to_messages(row)[0]["content"] == "Who?\n\nAnn ran."


def test_a_system_column_comes_first():
    assert to_messages({"system": "s", "prompt": "q", "completion": "a"}) == [
        {"role": "system", "content": "s"},
        *WANTED,
    ]


def test_alpacas_input_follows_the_instruction():
    row = {"instruction": "Translate", "input": "Haus", "output": "house"}
    assert to_messages(row)[0]["content"] == "Translate\n\nHaus"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "expected an object"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "a part of type image_url; only text is read",
        ),
        ({"text": "x"}, "got the keys text"),
        ({"messages": []}, "without messages"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown role 'bot'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
        ({"messages": [WANTED[0], {"role": "assistant", "content": " "}]}, "empty assistant message"),
        ({"messages": [WANTED[0], {"role": "assistant", "content": None}]}, "content is NoneType"),
        ({"messages": WANTED[:1]}, "expected assistant"),
        ({"messages": WANTED[1:]}, "starts with a user"),
        ({"messages": [WANTED[0], *WANTED]}, "two user messages"),
        ({"messages": [WANTED[0], {"role": "system", "content": "x"}, WANTED[1]]}, "comes first"),
        ({"prompt": "q", "completion": ""}, "empty"),
        ({"messages": "x"}, "expected a list"),
    ],
)
def test_what_is_no_chat_says_what_was_expected(row, says):
    with pytest.raises(BadRow, match=says):
        to_messages(row)


def write(folder: Path, name: str, content: bytes) -> list:
    (folder / name).write_bytes(content)
    return list(read_rows(folder, [name], "auto"))


def test_malformed_lines_have_file_line_and_column(tmp_path):
    good = json.dumps({"messages": WANTED}).encode()
    rows = write(
        tmp_path,
        "x.jsonl",
        b"\xef\xbb\xbf" + good + b"\r\n\n" + b'{"messages": [}\n' + good[:20] + b"\xff\n" + b'{"a": NaN}\n'
        + b'{"prompt": "\\ud800", "completion": "a"}\n' + b"[" * 100_000 + b"\n" + good,
    )  # fmt: skip
    assert [row.place for row in rows if row.messages] == ["x.jsonl:1", "x.jsonl:8"]
    problems = {row.place: row.problem for row in rows if row.problem}
    assert "column 15" in problems["x.jsonl:3"]
    assert "expected one JSON object a line" in problems["x.jsonl:3"]
    assert "byte 21" in problems["x.jsonl:4"]
    assert "NaN" in problems["x.jsonl:5"]
    assert "surrogate" in problems["x.jsonl:6"]
    assert "deeply" in problems["x.jsonl:7"]


def test_tables_are_read(tmp_path):
    frame = pd.DataFrame({"prompt": ["q", "NA", ""], "completion": ["a", "null", "x"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    rows = list(read_rows(tmp_path, ["t.csv"], "auto"))
    assert rows[0].messages == WANTED
    assert rows[1].messages[0]["content"] == "NA", "text that looks like a missing value is text"
    assert rows[2].problem and rows[2].place == "t.csv:row 3"
    pd.DataFrame({"messages": [WANTED, WANTED]}).to_parquet(tmp_path / "t.parquet")
    assert [row.messages for row in read_rows(tmp_path, ["t.parquet"], "auto")] == [WANTED, WANTED]
    pd.DataFrame({"messages": [json.dumps(WANTED), "{"]}).to_csv(tmp_path / "m.csv", index=False)
    rows = list(read_rows(tmp_path, ["m.csv"], "auto"))
    assert rows[0].messages == WANTED and "no JSON" in rows[1].problem
    (tmp_path / "l.json").write_text(json.dumps([{"messages": WANTED}]))
    assert next(iter(read_rows(tmp_path, ["l.json"], "auto"))).messages == WANTED


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", b"{", "no JSON"),
        ("x.json", b"{}", "no list"),
        ("x.parquet", b"PAR1garbage", "Parquet"),
        ("x.xlsx", b"", "not read"),
    ],
)
def test_files_that_cannot_be_read_at_all(tmp_path, name, content, says):
    with pytest.raises(BadData, match=says):
        write(tmp_path, name, content)


def test_a_name_that_matches_nothing_lists_what_is_there(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(BadData) as caught:
        match_files(tmp_path, ["train.jsonl"])
    assert "a.jsonl" in str(caught.value)
