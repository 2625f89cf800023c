"""No text of a row disappears without being named: it is used, refused as ambiguous, or listed as not read."""

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.data.chats import BadRow
from loraflow.data.files import json_reader
from loraflow.data.files.readers import read_rows
from loraflow.data.formats.chat_formats import read_chat
from loraflow.failures import BadData


def to_messages(row):
    return read_chat(row).messages


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def test_an_empty_input_does_not_hide_the_context():
    row = {"instruction": "Who?", "input": "", "context": "TEXT", "output": "a"}
    assert to_messages(row)[0]["content"] == "Who?\n\nTEXT"
    assert to_messages({**row, "input": "TEXT"})[0]["content"] == "Who?\n\nTEXT"


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({"instruction": "q", "input": "A", "context": "B", "output": "a"}, "input and context"),
        ({"instruction": "q", "output": "A", "response": "B"}, "output and response"),
        ({"prompt": "q", "completion": "A", "response": "B"}, "completion and response"),
        ({"prompt": "q", "completion": "a", "system": "A", "system_prompt": "B"}, "system and system_prompt"),
        (
            {"messages": [QUESTION, ANSWER], "conversations": [SHAREGPT[0], {"from": "gpt", "value": "B"}]},
            "messages and conv",
        ),
        ({"conversations": [{"from": "human", "value": "A", "content": "B"}, SHAREGPT[1]]}, "content and value"),
        ({"conversations": [{"from": "human", "role": "system", "value": "A"}, SHAREGPT[1]]}, "role and from"),
    ],
)
def test_two_keys_for_one_thing_with_different_texts_are_refused(row, keys):
    with pytest.raises(BadRow, match=keys):
        read_chat(row)


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"instruction": "q", "output": "a", "response": "a"}, ()),
        ({"instruction": "q", "output": None, "response": "a"}, ()),
        ({"instruction": "q", "output": " ", "response": "a"}, ()),
        ({"messages": None, "instruction": "q", "input": "", "output": "a"}, ()),
        ({"messages": [], "conversations": SHAREGPT}, ()),
        ({"messages": [QUESTION, ANSWER], "conversations": SHAREGPT}, ()),
        ({"conversations": None, "prompt": "q", "completion": "a"}, ()),
        ({"instruction": None, "output": None, "prompt": "q", "completion": "a"}, ()),
        ({"instruction": "q", "prompt": "OTHER", "output": "a"}, ("prompt",)),
        ({"messages": [QUESTION, ANSWER], "instruction": "OTHER", "output": "OTHER"}, ("instruction", "output")),
        ({"messages": [{**QUESTION, "value": "OTHER"}, ANSWER]}, ("messages.value",)),
        ({"prompt": [QUESTION], "completion": [{**ANSWER, "thinking": {"is": "T"}}]}, ("completion.thinking",)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "citation": "C"}]}, ANSWER]},
         ("messages.content.citation",)),
        ({"prompt": "q", "completion": "a", "input": " ", "history": [], "context": "a"}, ("context",)),
    ],
)  # fmt: skip
def test_a_text_is_used_or_named(row, unread):
    chat = read_chat(row)
    assert [message["content"] for message in chat.messages] == ["q", "a"]
    assert chat.unread == unread


TEXTS = st.sampled_from(["", " ", None, "one", "two", "three"])
KEYS = [
    "instruction",
    "input",
    "context",
    "output",
    "response",
    "prompt",
    "completion",
    "system",
    "system_prompt",
    "note",
]


@given(st.dictionaries(st.sampled_from(KEYS), TEXTS), st.sampled_from(["auto", "alpaca", "prompt_completion"]))
@settings(max_examples=300)
def test_every_text_of_a_row_is_in_the_chat_or_named(row, format_name):
    try:
        chat = read_chat(row, format_name)
    except BadRow:
        return
    learned = " ".join(message["content"] for message in chat.messages)
    for key, value in row.items():
        assert value is None or value.strip() in learned or key in chat.unread


def test_a_renamed_column_does_not_hide_a_column_of_its_name():
    row = {"prompt": "OTHER", "question": "q", "answer": "a", "ctx": "TEXT"}
    chat = read_chat(row, "auto", {"prompt": "question", "completion": "answer"})
    assert chat.messages == [QUESTION, ANSWER] and chat.unread == ("prompt", "ctx")
    with pytest.raises(BadRow, match="in data.columns, input goes with instruction and output"):
        read_chat(row, "auto", {"prompt": "question", "completion": "answer", "input": "ctx"})


def test_a_system_column_that_is_no_text_is_refused():
    with pytest.raises(BadRow, match="the system column system is dict"):
        read_chat({"prompt": "q", "completion": "a", "system": {"text": "s"}})


def test_openais_developer_role_is_the_system_message():
    row = {"messages": [{"role": "developer", "content": "be brief"}, QUESTION, ANSWER]}
    assert to_messages(row)[0] == {"role": "system", "content": "be brief"}
    with pytest.raises(BadRow, match="unknown role None"):
        to_messages({"messages": [{"role": None, "content": "q"}, ANSWER]})


def write(folder: Path, name: str, content: bytes) -> list:
    (folder / name).write_bytes(content)
    return list(read_rows(folder, [name], "auto"))


def test_a_row_that_is_a_list_of_messages_is_its_chat(tmp_path):
    line = json.dumps([QUESTION, {**ANSWER, "id": 1}]).encode()
    for name, content in (("x.jsonl", line), ("x.json", b"[" + line + b"]")):
        (row,) = write(tmp_path, name, content)
        assert row.messages == [QUESTION, ANSWER] and row.unused_keys == ("messages.id",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b'{"prompt": "q"}', mtime=0), "mv x.jsonl x.jsonl.gz && gunzip --keep x.jsonl.gz"),
        (b"\x28\xb5\x2f\xfd....", "unzstd x.jsonl.zst"),
        (b"PK\x03\x04....", "a zip or Excel file"),
        (b"PAR1....", "mv x.jsonl x.jsonl.parquet"),
        ('{"prompt": "q", "completion": "a"}'.encode("utf-16-le"), "iconv -f UTF-16LE"),
    ],
)
def test_a_binary_file_under_the_name_of_a_text_file_is_named(tmp_path, content, says):
    with pytest.raises(BadData) as caught:
        write(tmp_path, "x.jsonl", content)
    assert says in str(caught.value)


def test_a_duplicated_json_key_is_refused(tmp_path):
    rows = write(
        tmp_path,
        "x.jsonl",
        b'{"prompt": "q", "prompt": "p", "completion": "a"}\n{"messages": [{"role": "user", "role": "x"}]}\n',
    )
    assert [row.problem for row in rows] == [
        'the key "prompt" is duplicated in an object', 'the key "role" is duplicated in an object']  # fmt: skip
    (_, row) = write(tmp_path, "x.json", b'{"prompt": "q", "prompt": "p"}\n{"prompt": "q", "completion": "a"}\n')
    assert row.messages == [QUESTION, ANSWER] and row.place == "x.json:2"
    (row,) = write(tmp_path, "x.csv", b'messages\n"[{""role"": ""user"", ""role"": ""x""}]"\n')
    assert 'column messages is not valid JSON: the key "role" is duplicated' in row.problem


def test_nul_bytes_are_named(tmp_path):
    rows = write(
        tmp_path,
        "x.jsonl",
        b'{"prompt": "q\\u0000", "completion": "a"}\n{"prompt": "q\0", "completion": "a"}\n\0\0\0\0\n',
    )
    assert "message 1: a NUL character (U+0000) at character 2" in rows[0].problem
    assert "column 14" in rows[1].problem and "column 1" in rows[2].problem


def test_a_line_beyond_the_limit_is_named_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_reader, "MAX_ROW_BYTES", 1000)
    good = json.dumps({"messages": [QUESTION, ANSWER]}).encode()
    rows = write(tmp_path, "x.jsonl", good + b"\n" + b'{"prompt": "' + b"x" * 5000 + b'"}\n' + good)
    assert [bool(row.messages) for row in rows] == [True, False, True]
    assert rows[1].place == "x.jsonl:2" and "a row of 5,015 bytes" in rows[1].problem and rows[2].place == "x.jsonl:3"


@pytest.mark.parametrize("depth", [100, 400, 700, 900, 1000, 3000, 100_000])
def test_deep_nesting_is_never_a_traceback(tmp_path, depth):
    value = '{"prompt": "\\u00e9", "completion": "a", "x": ' + "[" * depth + "]" * depth + "}"
    (row,) = write(tmp_path, "x.jsonl", value.encode())
    assert row.messages or "deeply" in row.problem
    try:
        (row,) = write(tmp_path, "x.json", f"[{value}]".encode())
        assert row.messages or "deeply" in row.problem
    except BadData as failure:
        assert "deeply" in failure.got
    cell = json.dumps([{"role": "user", "content": "q"}])[:-1] + "," + "[" * depth + "]" * depth + "]"
    (row,) = write(tmp_path, "x.csv", ('messages\n"' + cell.replace('"', '""') + '"\n').encode())
    assert row.problem


def test_parquets_struct_of_lists_is_the_list_of_structs(tmp_path):
    lists = {"role": ["user", "assistant"], "content": ["q", "a"]}
    for number, cell in enumerate([lists, [QUESTION, ANSWER]]):
        pq.write_table(pa.table({"messages": [cell]}), tmp_path / f"{number}.parquet")
        (row,) = read_rows(tmp_path, [f"{number}.parquet"], "auto")
        assert row.messages == [QUESTION, ANSWER]
    pq.write_table(pa.table({"messages": [{**lists, "content": ["q"]}]}), tmp_path / "bad.parquet")
    (row,) = read_rows(tmp_path, ["bad.parquet"], "auto")
    assert row.place == "bad.parquet:row 1" and "expected a list of" in row.problem


def test_values_that_python_cannot_hold_name_file_and_column(tmp_path):
    day = pa.array([10**15], pa.timestamp("s"))
    pq.write_table(pa.table({"prompt": ["q"], "completion": ["a"], "when": day}), tmp_path / "x.parquet")
    with pytest.raises(BadData) as caught:
        list(read_rows(tmp_path, ["x.parquet"], "auto"))
    assert "x.parquet, column when" in caught.value.where
    columns = {"prompt": ["q"], "completion": [None], "when": pa.array([0], pa.date32())}
    pq.write_table(pa.table({**columns, "n": pa.array([2**64 - 1], pa.uint64())}), tmp_path / "y.parquet")
    (row,) = read_rows(tmp_path, ["y.parquet"], "auto")
    assert row.problem == "message 2: content is NoneType; expected text"
    pq.write_table(
        pa.Table.from_arrays([pa.array(["q"]), pa.array(["a"])], ["prompt", "prompt"]), tmp_path / "z.parquet"
    )
    with pytest.raises(BadData, match="duplicated"):
        list(read_rows(tmp_path, ["z.parquet"], "auto"))


@pytest.mark.parametrize("content", [{"a": 1}, 3, 2**70, True, ["x"], [["x"]], None])
def test_a_content_of_another_type_is_named(content):
    for row in ({"messages": [QUESTION, {"role": "assistant", "content": content}]}, {"prompt": "q", "completion": content},
                {"instruction": content, "output": "a"}, {"instruction": "q", "output": "a", "history": [[content, "a"]]}):  # fmt: skip
        with pytest.raises(BadRow):
            read_chat(row)


def test_mixed_shapes_in_one_file_are_read_row_by_row(tmp_path):
    shapes = [
        {"messages": [QUESTION, ANSWER]},
        {"conversations": SHAREGPT},
        {"prompt": "q", "completion": "a"},
        3,
        None,
        "x",
        [],
    ]
    rows = write(tmp_path, "x.jsonl", b"".join(json.dumps(row).encode() + b"\n" for row in shapes))
    assert [row.place for row in rows if row.messages] == ["x.jsonl:1", "x.jsonl:2", "x.jsonl:3"]
    assert all(row.problem for row in itertools.islice(rows, 3, None))
