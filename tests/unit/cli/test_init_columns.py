"""`init` takes columns of any name: classification sets by their names, --columns, or one question on a terminal."""

import sys

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.cli.init_dataset import choose_columns
from loraflow.data.files.guess_columns import guess_columns, is_classification
from loraflow.failures import BadConfig, BadData


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "a b", "category": "c"}, {"prompt": "text", "completion": "category"}),
        ({"Text": "a b", "Label": "c", "id": "7"}, {"prompt": "Text", "completion": "Label"}),
        ({"utterance": "a b", "intent": "c"}, {"prompt": "utterance", "completion": "intent"}),
        ({"text": "a b", "category": "c", "label": "d"}, {}),  # which of the two is not known
        ({"text": "a b", "category": "long " * 20}, {}),
        ({"text": "a b", "label": 3}, {}),
        ({"question": "a", "answer": "b", "category": "c"}, {"prompt": "question", "completion": "answer"}),
    ],
)
def test_a_text_and_its_class_are_recognised_by_their_names(row, columns):
    assert guess_columns(row) == columns
    assert is_classification(columns) is (columns.get("completion", "").lower() in ("category", "label", "intent"))


def test_columns_can_be_named_and_wrong_ones_are_refused_with_those_there_are(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("frage,antwort\na,b\n")
    expected = {"prompt": "frage", "completion": "antwort"}
    assert choose_columns(file, "t.csv", "prompt=frage,completion=antwort") == expected
    for given in ("prompt=x,completion=antwort", "question=frage", "frage", ""):
        with pytest.raises(BadConfig):
            choose_columns(file, "t.csv", given)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_is_asked_once_if_the_columns_are_unknown(tmp_path, monkeypatch, is_terminal):
    (tmp_path / "t.csv").write_text("frage,antwort\na,b\n")
    (tmp_path / "known.csv").write_text("prompt,completion\na,b\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: is_terminal, raising=False)
    asked = []
    monkeypatch.setattr("click.prompt", lambda text, **_: asked.append(text) or "frage, antwort")
    assert choose_columns(tmp_path / "known.csv", "known.csv", None) == {} and not asked
    found = choose_columns(tmp_path / "t.csv", "t.csv", None)
    assert found == ({"prompt": "frage", "completion": "antwort"} if is_terminal else {})
    assert len(asked) == is_terminal


def test_a_classification_set_becomes_a_recipe_that_can_be_planned(tmp_path, phi3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"the parcel {n} is late,{('delivery', 'refund')[n % 2]}\n" for n in range(16))
    (tmp_path / "mine.csv").write_text("text,category\n" + rows)
    done = CliRunner().invoke(cli, ["init", "--data", "mine.csv", "--base", str(phi3)])
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("only 16 rows"), "before anything else"
    assert "a classification set: text → category, 2 classes" in lines
    assert 'columns: {"prompt": "text", "completion": "category"}' in (tmp_path / "configs" / "mine.yaml").read_text()
    plan = CliRunner().invoke(cli, ["plan", "configs/mine.yaml"])
    assert plan.exit_code == 0, plan.output


def test_init_that_finds_no_chat_says_how_to_name_the_columns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("frage,antwort\n" + "a,b\n" * 30)
    done = CliRunner().invoke(cli, ["init", "--data", "t.csv", "--base", "bundled:smollm2"])
    assert done.exit_code != 0 and "--columns prompt=COLUMN,completion=COLUMN" in str(done.exception or done.output)
    assert "t.csv:row 1: " in done.exception.got and not done.output, "the same problem was printed six times"
    (tmp_path / "t.csv").write_text("question,answer\n")
    done = CliRunner().invoke(cli, ["init", "--data", "t.csv", "--base", "bundled:smollm2"])
    assert (done.exception.got, done.exception.next_step, done.output) == ("no rows to learn", "add rows", "")


def test_columns_may_be_keys_that_the_first_row_leaves_out(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"frage": "a"}\n[1]\n{"frage": "b", "antwort": "c"}\n')
    expected = {"prompt": "frage", "completion": "antwort"}
    assert choose_columns(file, "t.jsonl", "frage,antwort") == expected
    with pytest.raises(BadConfig, match="of frage, antwort"):
        choose_columns(file, "t.jsonl", "frage,other")


@pytest.mark.parametrize(("line", "problem"), [('{"frage": "a"', "column 15: "), ("3", "no object")])
def test_columns_of_a_file_whose_first_row_is_malformed_give_its_problem(tmp_path, line, problem):
    file = tmp_path / "t.jsonl"
    file.write_text(line + '\n{"frage": "b", "antwort": "c"}\n')
    with pytest.raises(BadData, match="first row cannot be read") as caught:
        choose_columns(file, "t.jsonl", "frage,antwort")
    assert problem in str(caught.value) and "t.jsonl:1" in str(caught.value)
