"""`data diff` of files, folders and runs: rows added, removed and edited, and what changed in lengths and fields."""

import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.cli.data import version_of
from loraflow.data.checks.compare import changes, difference_lines
from loraflow.data.versions import dvc
from loraflow.failures import BadConfig, BadData
from tests.unit.data.test_git_branch import git

OLD = [{"question": f"q{n}", "answer": "a" * (n + 1)} for n in range(10)]
NEW = [*OLD[2:9], {"question": "q9", "answer": "other"}, {"question": "new", "answer": "b", "note": "n"}]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def diff(*arguments) -> list[str]:
    result = CliRunner().invoke(cli, ["data", "diff", *map(str, arguments)])
    assert result.exit_code == 0, result.output or result.exception
    return result.output.splitlines()


def test_an_edited_row_has_the_same_prompt_and_another_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "old.jsonl", OLD)
    write(tmp_path / "new.jsonl", NEW)
    lines = diff("old.jsonl", "new.jsonl")
    assert lines[0] == "old.jsonl → new.jsonl: 10 → 9 rows, 1 added, 2 removed, 1 edited"
    assert any(line.startswith("characters of answers: median") for line in lines)
    assert lines[-1] == "field note: in 0.0% → 11.1% of the rows"
    assert diff("old.jsonl", "old.jsonl") == ["old.jsonl: 10 → 10 rows, 0 added, 0 removed, 0 edited"]


def test_rows_that_move_between_files_of_a_folder_are_the_same_in_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, first in (("a", 4), ("b", 6)):
        write(tmp_path / name / "one.jsonl", OLD[:first])
        write(tmp_path / name / "two.jsonl", OLD[first:])
    assert diff("a", "b") == [
        "one.jsonl: 4 → 6 rows, 2 added, 0 removed, 0 edited",
        "two.jsonl: 6 → 4 rows, 0 added, 2 removed, 0 edited",
        "all files: 10 → 10 rows, 0 added, 0 removed, 0 edited",
    ]


def test_without_arguments_the_work_tree_is_compared_with_the_last_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    write(tmp_path / "data" / "x.jsonl", OLD)
    dvc.add("data")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    (tmp_path / "data" / "x.jsonl").unlink()  # a link to DVC's cache, perhaps
    write(tmp_path / "data" / "x.jsonl", NEW)
    assert diff()[0] == "x.jsonl: 10 → 9 rows, 1 added, 2 removed, 1 edited", "before `data add`"
    shutil.rmtree(tmp_path / "data")
    assert diff() == ["x.jsonl: 10 → 10 rows, 0 added, 0 removed, 0 edited"], "the pinned version, from DVC's cache"


def test_rows_count_as_often_as_they_are_there():
    found = changes({("p", "x"): 3, ("q", "y"): 1}, {("p", "x"): 1, ("p", "z"): 1, ("q", "y"): 2})
    assert (found.before, found.after, found.added, found.removed, found.edited) == (4, 4, 1, 1, 1)


def test_a_run_is_compared_by_the_files_and_columns_that_it_read(tmp_path):
    run = "20261127-010203-abcdef"
    renamed = [{"frage": row["question"], "antwort": row["answer"]} for row in OLD]
    write(tmp_path / "artifact" / "files" / "old.jsonl", renamed)
    write(tmp_path / "new.jsonl", NEW)
    record = {
        "run": run,
        "recipe": "x",
        "resolved": {"data": {"format": "auto", "columns": {"prompt": "frage", "completion": "antwort"}}},
        "stages": [{"stage": "version_dataset", "state": "computed", "fingerprint": "f", "digest": "d"}],
    }
    documents = {f"runs/{run}.json": json.dumps(record).encode()}
    store = SimpleNamespace(
        read_document=documents.get,
        find=lambda *_: "ref",
        path=lambda _: tmp_path / "artifact",
        uri="s",
        scratch=tmp_path,
        fetch=lambda *_: [],
    )
    old, new = version_of(run, "data.dvc", store), version_of(str(tmp_path / "new.jsonl"), "data.dvc", store)
    assert "10 → 9 rows, 1 added, 2 removed, 1 edited" in next(difference_lines(old, new))
    with pytest.raises(BadConfig, match="no such run"):
        version_of("20261127-010203-000000", "data.dvc", store)
    store.find = lambda *_: None
    with pytest.raises(BadData, match="no longer in the store"):
        version_of(run, "data.dvc", store)


def test_files_that_dvc_ignores_are_no_part_of_the_work_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "-q")
    write(tmp_path / "data" / "x.jsonl", OLD)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvcignore").write_text("/data/drafts\n*.old.jsonl\n")
    dvc.add("data")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    for ignored in ("drafts/y.jsonl", "x.old.jsonl"):
        write(tmp_path / "data" / ignored, NEW)
    write(tmp_path / "data" / "z.jsonl", NEW[:1])
    assert any(line.startswith("all files: 10 → 11 rows") for line in diff())


def test_rows_that_cannot_be_read_are_counted_and_a_version_without_any_chat_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "old.jsonl", OLD)
    write(tmp_path / "new.jsonl", [*OLD, {"question": "q"}, {"x": 1}])
    assert diff("old.jsonl", "new.jsonl")[0].startswith("NEW: 2 of 12 rows could not be read, first new.jsonl:11: ")
    assert "OLD: 2 of 12 rows" in diff("new.jsonl", "old.jsonl")[0]
    write(tmp_path / "bad.jsonl", [{"x": 1}, {"x": 2}])
    with pytest.raises(BadData, match="2 of 2 rows could not be read"):
        version_of("bad.jsonl", "data.dvc", None)


def test_only_a_run_opens_the_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "old.jsonl", OLD)
    opened = []
    monkeypatch.setattr("loraflow.store.open_store", lambda uri: opened.append(uri) or 1 / 0)
    diff("old.jsonl", "old.jsonl", "--store", "s")
    assert not opened
    CliRunner().invoke(cli, ["data", "diff", "20261127-010203-abcdef", "old.jsonl", "--store", "s"])
    assert opened == ["s"]
