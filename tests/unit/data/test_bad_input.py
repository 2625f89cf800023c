"""Input that is not what its name says: each problem names its file and line, and nothing ends in a traceback."""

import gzip
import json
from datetime import date

import pandas as pd
import pytest

from loraflow.data.files.readers import read_rows
from loraflow.failures import BadData

OK = {"prompt": "q", "completion": "a"}
NESTED = '{"a":' * 900 + "1" + "}" * 900
CALL = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": %s}]}]}'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "q", "completion": "a", "completion": "b"}', 'the key "completion" is duplicated'),
        (CALL % NESTED, "message 2: tool_calls[0].function.arguments are nested too deeply"),
        ('{"prompt": "q", "completion": "a", "x": ' + "[" * 100_000, "nested too deeply"),
        ('{"prompt": "q", "completion": "a", "id": ' + "9" * 5000 + "}", "a whole number of more than 4,300 digits"),
        ('{"prompt": "q", "completion": 99999999999999999999}', "content is int"),
        ('{"prompt": "q", "completion": "a", "weight": 1e400}', "weight inf is outside 0 to 10"),
        ('[{"role": "user", "content": "q"}]', "the last message has the role user"),
        ('[{"prompt": "q"}]', "a list; expected one JSON object per line"),
        ('{"messages": [{"role": null, "content": "q"}]}', "message 1: unknown role None"),
        ("\0\0", "column 1"),
        ('{"prompt": "q\\u0000", "completion": "a"}', "a NUL character (U+0000) at character 2"),
        ('{"messages": [{"role": "user", "content": "q"}], "tools": "[{"}', "tools is not valid JSON"),
    ],
)
def test_a_malformed_line_is_named_with_its_problem_and_the_next_is_read(tmp_path, line, problem):
    (tmp_path / "x.jsonl").write_text(line + "\n" + json.dumps(OK) + "\n")
    bad, good = read_rows(tmp_path, ["x.jsonl"], "auto")
    assert bad.place == "x.jsonl:1" and problem in bad.problem and good.messages


def test_mixed_shapes_null_messages_and_developers_are_read(tmp_path):
    developer = [
        {"role": "developer", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    rows = [OK, {"instruction": "q", "output": "a", "messages": None}, {"messages": developer}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(read_rows(tmp_path, ["x.jsonl"], "auto"))
    assert all(row.messages[-1] == {"role": "assistant", "content": "a"} for row in found)
    assert found[2].messages[0]["role"] == "system"
    pd.DataFrame([{"messages": {"role": ["user", "assistant"], "content": ["q", "a"]}}]).to_parquet(
        tmp_path / "s.parquet"
    )
    pd.DataFrame([{"prompt": date(2024, 1, 2), "completion": "a"}]).to_parquet(tmp_path / "d.parquet")
    (row,) = read_rows(tmp_path, ["s.parquet"], "auto")
    assert row.messages == found[0].messages
    (row,) = read_rows(tmp_path, ["d.parquet"], "auto")
    assert row.place == "d.parquet:row 1" and "content is date" in row.problem


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", gzip.compress(b"x", mtime=0), "compressed by gzip"),
        ("x.jsonl.gz", gzip.compress(b"x", mtime=0), "not supported"),
        ("x.csv", b"prompt|completion\nq|a\n", "another separator"),
        ("x.json", b'[{"prompt": "q", "prompt": "r", "completion": "a"}]', "not valid JSON"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused_with_a_next_step(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadData, match=says) as refusal:
        list(read_rows(tmp_path, [name], "auto"))
    assert name in refusal.value.where
