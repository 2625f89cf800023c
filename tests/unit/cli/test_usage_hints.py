"""What the command line says to a person who left something out."""

import sys

import pytest

import loraflow.cli
from loraflow.cli.init_recipe import COMMENT_COLUMN, align_comment


def said(arguments: list[str], monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["loraflow", *arguments])
    with pytest.raises(SystemExit) as ended:
        loraflow.cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *handler: None)  # of this test process
    return tmp_path


def test_a_missing_option_says_what_it_is_for(folder, monkeypatch, capsys):
    (folder / "a.jsonl").touch()
    message = said(["init", "--data", "a.jsonl"], monkeypatch, capsys)
    assert "Missing option '--base'" in message and "bundled:smollm2, a folder, or a hub id" in message


def test_a_missing_recipe_says_which_there_are_or_how_to_make_one(folder, monkeypatch, capsys):
    assert "loraflow init --data FILE" in said(["run"], monkeypatch, capsys)
    (folder / "configs").mkdir()
    for number in range(10):
        (folder / "configs" / f"r{number}.yaml").touch()
    assert "Recipes here: r0, r1, r2, r3, r4, r5, r6, r7, and 2 more" in said(["plan"], monkeypatch, capsys)


def test_a_missing_file_for_answers_says_what_it_is(monkeypatch, capsys):
    assert "OUT is a new file for the answers" in said(["predict", "champion", "in.jsonl"], monkeypatch, capsys)


def test_another_wrong_call_says_what_click_says(monkeypatch, capsys):
    assert said(["runs", "--nothing"], monkeypatch, capsys).count("\n") <= 4


@pytest.mark.parametrize(
    ("line", "aligned"),
    [
        ("  near: drop         # why\n", True), ("  a: 1  # b\n", True), ('  c: {"a": "x"}  # ours\n', True),
        ('  model: "/a  # b"\n', False), ("# title  # x\n", False), ("name: x\n", False),
    ],
)  # fmt: skip
def test_comments_of_a_new_recipe_are_in_one_column_and_values_stay(line, aligned):
    found = align_comment(line)
    assert found == line if not aligned else found.index("# ") == COMMENT_COLUMN
    assert found.split() == line.split()
