import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from loraflow.data.chats import BadRow
from loraflow.data.files.guess_columns import columns_of, guess_columns
from loraflow.data.files.readers import match_files, read_rows
from loraflow.data.formats.chat_formats import read_chat
from loraflow.failures import BadData


def to_messages(row):
    return read_chat(row).messages


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"messages": [{**m, "name": "x"} for m in CHAT], "source": "s"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {
            "messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in CHAT],
            "tools": [],
        },
    ],
)
def test_every_format_gives_the_same_chat(row):
    assert to_messages(row) == CHAT


def test_columns_can_have_other_names(tmp_path):
    (tmp_path / "x.csv").write_text("id,question,answer\n1,q,a\n")
    columns = {"prompt": "question", "completion": "answer"}
    (row,) = read_rows(tmp_path, ["x.csv"], "auto", columns)
    assert row.messages == CHAT
    (row,) = read_rows(tmp_path, ["x.csv"], "auto", {"prompt": "ask", "completion": "answer"})
    assert row.problem == "expected the column ask (prompt); got id, question, answer"
    assert guess_columns({"id": "1", "question": "q", "answer": "a"}) == columns
    assert guess_columns({"text": "q"}) == guess_columns([]) == guess_columns({"question": 1, "answer": "a"}) == {}


def test_context_and_system_prompt_columns_are_read():
    """Many published datasets have them beside question and answer, and they change the prompt."""
    row = {"question": "Who?", "context": "Ann ran.", "answer": "Ann"}
    assert guess_columns(row) == {"instruction": "question", "output": "answer"}
    assert to_messages({**row, "instruction": "Who?", "output": "Ann"})[0]["content"] == "Who?\n\nAnn ran."
    system = {"role": "system", "content": "s"}
    assert to_messages({"system_prompt": "s", "prompt": "q", "completion": "a"}) == [system, *CHAT]
    assert to_messages({"system": "s", "messages": CHAT}) == [system, *CHAT], "Anthropic's"
    assert to_messages({"system": [{"type": "text", "text": "s"}], "messages": CHAT}) == [system, *CHAT]
    assert to_messages({"system": "s", "messages": [system, *CHAT]}) == [system, *CHAT]
    with pytest.raises(BadRow, match="two different system messages"):
        to_messages({"system": "t", "messages": [system, *CHAT]})


def test_llama_factorys_history_comes_before_the_question():
    row = {"instruction": "q", "input": "", "output": "a", "history": [["q1", "a1"]]}
    assert [m["content"] for m in to_messages(row)] == ["q1", "a1", "q", "a"]
    with pytest.raises(BadRow, match=r"a list of \[question, answer\]"):
        to_messages({**row, "history": ["q1"]})


def test_unused_keys_are_named(tmp_path):
    turns = [CHAT[0], {**CHAT[1], "emotion": "hm", "tool_calls": None}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": 1, "messages": turns, "tools": [], "score": 0.5}))
    (row,) = read_rows(tmp_path, ["x.jsonl"], "auto")
    assert row.messages == CHAT
    assert row.unused_keys == ("id", "score", "messages.emotion")
    (tmp_path / "y.jsonl").write_text(json.dumps({"n": 1, "Question": "q", "Answer": "a"}))
    columns = columns_of(tmp_path / "y.jsonl", "y.jsonl")
    assert columns == {"prompt": "Question", "completion": "Answer"}
    (row,) = read_rows(tmp_path, ["y.jsonl"], "auto", columns)
    assert row.messages == CHAT and row.unused_keys == ("n",)


@pytest.mark.parametrize(
    ("name", "turns"),
    [("messages", CHAT), ("conversations", [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])],
)
def test_a_column_of_chats_is_found_by_its_content(name, turns):
    assert guess_columns({"id": 1, "dialog": turns}) == {name: "dialog"}
    assert guess_columns({"chosen": turns, "rejected": turns}) == {}, "ambiguous"
    assert guess_columns({"dialog": turns[1:]}) == {}


def test_dollys_context_is_part_of_the_question():
    row = {"instruction": "Who?", "context": "Ann ran.", "response": "Ann"}
    assert to_messages(row)[0]["content"] == "Who?\n\nAnn ran."


def test_a_system_column_comes_first():
    assert to_messages({"system": "s", "prompt": "q", "completion": "a"}) == [
        {"role": "system", "content": "s"},
        *CHAT,
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
            "a part of type image_url; only text is supported",
        ),
        ({"text": "x"}, "got the keys text"),
        ({"messages": []}, "has no messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "unknown role 'alien'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown role 'alien'"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "empty assistant message"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "content is NoneType"),
        ({"messages": CHAT[:1]}, "expected assistant"),
        ({"messages": CHAT[1:]}, "must be a user message"),
        ({"messages": [CHAT[0], *CHAT]}, "two user messages"),
        ({"messages": [CHAT[0], {"role": "system", "content": "x"}, CHAT[1]]}, "must be the first message"),
        ({"prompt": "q", "completion": ""}, "empty"),
        ({"messages": "x"}, "expected a list"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "function_call": {"arguments": "{}"}}]},
            "function_call\\[0\\].function.name is None",
        ),
        ({"instruction": "q", "input": {"x": 1}, "output": "a"}, "input is dict"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "completion: chosen"),
    ],
)
def test_a_row_that_is_not_a_chat_is_reported_with_the_expected_format(row, says):
    with pytest.raises(BadRow, match=says):
        to_messages(row)


def write(folder: Path, name: str, content: bytes) -> list:
    (folder / name).write_bytes(content)
    return list(read_rows(folder, [name], "auto"))


def test_malformed_lines_have_file_line_and_column(tmp_path):
    good = json.dumps({"messages": CHAT}).encode()
    rows = write(
        tmp_path,
        "x.jsonl",
        b"\xef\xbb\xbf" + good + b"\r\n\n" + b'{"messages": [}\n' + good[:20] + b"\xff\n" + b'{"a": NaN}\n'
        + b'{"prompt": "\\ud800", "completion": "a"}\n' + b"[" * 100_000 + b"\n" + good,
    )  # fmt: skip
    assert [row.place for row in rows if row.messages] == ["x.jsonl:1", "x.jsonl:8"]
    problems = {row.place: row.problem for row in rows if row.problem}
    assert "column 15" in problems["x.jsonl:3"]
    assert "expected one JSON object per line" in problems["x.jsonl:3"]
    assert "byte 21" in problems["x.jsonl:4"]
    assert "NaN" in problems["x.jsonl:5"]
    assert "surrogate" in problems["x.jsonl:6"]
    assert "deeply" in problems["x.jsonl:7"]


def test_tables_are_read(tmp_path):
    frame = pd.DataFrame({"prompt": ["q", "NA", ""], "completion": ["a", "null", "x"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    rows = list(read_rows(tmp_path, ["t.csv"], "auto"))
    assert rows[0].messages == CHAT
    assert rows[1].messages[0]["content"] == "NA", "text that looks like a missing value is text"
    assert rows[2].problem and rows[2].place == "t.csv:row 3"
    pd.DataFrame({"messages": [CHAT, CHAT]}).to_parquet(tmp_path / "t.parquet")
    assert [row.messages for row in read_rows(tmp_path, ["t.parquet"], "auto")] == [CHAT, CHAT]
    pd.DataFrame({"messages": [json.dumps(CHAT), "{"]}).to_csv(tmp_path / "m.csv", index=False)
    rows = list(read_rows(tmp_path, ["m.csv"], "auto"))
    assert rows[0].messages == CHAT and "not valid JSON" in rows[1].problem
    (tmp_path / "l.json").write_text(json.dumps([{"messages": CHAT}]))
    assert next(iter(read_rows(tmp_path, ["l.json"], "auto"))).messages == CHAT


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", b"{", "not valid JSON"),
        ("x.json", b"{}", "not contain a list"),
        ("x.json", b"", "an empty file"),
        ("x y.json", b'{"data": [{}]}', "jq -c '.[\"data\"][]' 'x y.json' > 'x y.jsonl'"),
        (
            "x.json",
            b'{"features": [{"name": "q"}], "rows": [{"row_idx": 0, "row": {}}]}',
            "jq -c '.[\"rows\"][].row' x.json > x.jsonl",
        ),
        ("x.parquet", b"PAR1garbage", "Parquet"),
        ("x.xlsx", b"", "not supported"),
        ("x.jsonl.gz", b"", "gunzip --keep x.jsonl.gz"),
        ("x.txt", b"", "suffix .jsonl"),
        ("x.csv", b"", "a first line"),
        ("x.csv", b"prompt,prompt\na,b\n", "is duplicated"),
        ("x.csv", b'prompt,completion\nq,a\n"q,a\nq,a\n', "the row that begins at line 3"),
        ("x.tsv", b'prompt\tcompletion\n"q\ta\nb" q\ta\n', "a quote before and after a cell"),
        ("x.csv", "prompt,completion\nq,a\nGröße,ü\n".encode("cp1252"), "iconv -f WINDOWS-1252 -t UTF-8 x.csv"),
        ("x.csv", "prompt,completion\nq,a\nGröße,ü\n".encode("cp1252"), "x.csv:3"),
        ("x.jsonl", '{"prompt": "q", "completion": "a"}'.encode("utf-16"), "iconv -f UTF-16 -t UTF-8 x.jsonl"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, says):
    with pytest.raises(BadData) as caught:
        write(tmp_path, name, content)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"prompt;completion\r\nq;a\r\n",
        b'\xef\xbb\xbfprompt;completion\r\n"q";a\r\n',
        b"sep=;\r\nprompt;completion\r\nq;a\r\n",
        b"prompt\tcompletion\nq\ta\n",
        b"prompt, completion\nq,a\n",
        b"prompt,completion\nq,a,\n\n",
        b",prompt,completion\n0,q,a\n",
    ],
)
def test_a_table_written_by_excel_or_pandas_is_read(tmp_path, content):
    (row,) = write(tmp_path, "x.csv", content)
    assert row.messages == CHAT


def test_a_row_with_a_wrong_number_of_cells_is_named_and_never_shifted(tmp_path):
    """With the same number too many in each row, pandas takes the first column as index: all others move by one."""
    rows = write(tmp_path, "x.csv", b"prompt,completion\nwell, what,then\nonly\nq,a\n")
    assert [row.messages for row in rows] == [None, None, CHAT]
    assert rows[0].place == "x.csv:row 1" and "3 cells, but the header has 2" in rows[0].problem
    assert "1 cells" in rows[1].problem
    long = "x" * 200_000
    (row,) = write(tmp_path, "x.csv", f'prompt,completion\n"{long}\r\n""two""",a\n'.encode())
    assert row.messages[0]["content"] == long + '\n"two"'


def test_json_lines_are_read_with_any_suffix(tmp_path):
    line = json.dumps({"messages": CHAT}).encode()
    assert [row.messages for row in write(tmp_path, "x.json", line + b"\n" + line + b"\n")] == [CHAT, CHAT]
    (row,) = write(tmp_path, "x.jsonl", b"[" + line + b"]")
    assert "rename it to .json" in row.problem


def test_a_file_without_permission_is_a_failure(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text("{}")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read anything
    with pytest.raises(BadData, match="cannot be opened"):
        list(read_rows(tmp_path, ["x.jsonl"], "auto"))


def test_a_full_file_name_matches_only_that_file(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("train.jsonl", "old/train.jsonl", "[ab].jsonl", "a.jsonl"):
        (tmp_path / name).write_text("")
    assert match_files(tmp_path, ["train.jsonl"]) == ["train.jsonl"]
    assert match_files(tmp_path, ["[ab].jsonl"]) == ["[ab].jsonl"]
    assert match_files(tmp_path, ["train*"]) == ["old/train.jsonl", "train.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("train/**", ["train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv"]),
        ("train/", ["train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv", "x/train/d.jsonl"]),
        ("train", ["train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv", "x/train/d.jsonl"]),
        ("/train", ["train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv"]),
        ("x/train", ["x/train/d.jsonl"]),
        ("**/*.jsonl", ["a.jsonl", "train/a.jsonl", "train/deep/er/b.jsonl", "x/train/d.jsonl"]),
        ("**/train/**", ["train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv", "x/train/d.jsonl"]),
        ("train/**/*.jsonl", ["train/a.jsonl", "train/deep/er/b.jsonl"]),
        ("**", ["a.jsonl", "train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv", "x/train/d.jsonl"]),
        ("*", ["a.jsonl", "train/a.jsonl", "train/deep/er/b.jsonl", "train/train/c.csv", "x/train/d.jsonl"]),
    ],
)
def test_folders_and_double_stars_select_what_they_select_for_git(tmp_path, pattern, names):
    """git itself says what such a line of a .gitignore ignores."""
    files = [
        "a.jsonl",
        "train/a.jsonl",
        "train/deep/er/b.jsonl",
        "train/train/c.csv",
        "x/train/d.jsonl",
        "x/train.txt2",
    ]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert match_files(tmp_path, [pattern]) == names
    (tmp_path / ".gitignore").write_text(pattern)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    listed = ["git", "-C", str(tmp_path), "check-ignore", "--stdin"]
    by_git = subprocess.run(listed, input="\n".join(files), capture_output=True, text=True).stdout.split()
    assert sorted(name for name in by_git if not name.endswith("2")) == names


@pytest.mark.parametrize("pattern", ["!", "!a.jsonl", "/", "", "nothing/**", "\\"])
def test_a_pattern_that_selects_nothing_is_refused(tmp_path, pattern):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(BadData, match="No file of the dataset"):
        match_files(tmp_path, [pattern])


def test_an_unmatched_name_lists_the_existing_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(BadData) as caught:
        match_files(tmp_path, ["train.jsonl"])
    assert "a.jsonl" in str(caught.value)
