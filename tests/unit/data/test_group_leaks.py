"""Training rows of a held-out group are left out; near prompts with different answers are reported."""

import json
import random
from pathlib import Path

import pandas as pd
import pytest

from loraflow.data.checks.check_report import CheckReport
from loraflow.reporting.rows import check_notes
from tests.unit.data.test_near_duplicates import near, run_check, text, write


def write_grouped(file: Path, rows: list[tuple[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"prompt": text(n), "completion": "yes", "topic": group} for n, group in rows]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def places(file: Path) -> list[str]:
    return [json.loads(line)["place"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("policy", ["off", "report", "drop"])
@pytest.mark.parametrize("held", [{"heldout": ["test.jsonl"]}, {"extra_heldout": {"hand": "test.jsonl"}, "heldout": ["other.jsonl"]}])  # fmt: skip
def test_training_rows_of_a_group_of_a_held_out_file_are_left_out_and_counted(tmp_path, policy, held):
    files = tmp_path / "d" / "files"
    write_grouped(files / "train.jsonl", [(1, "a"), (2, "b"), (3, None), (4, " a "), (5, "A")])
    write_grouped(files / "test.jsonl", [(10, "a"), (11, "c")])
    write_grouped(files / "other.jsonl", [(20, "z")])
    out = tmp_path / "out"
    report = run_check(tmp_path / "d", out, policy, group="topic", train=["train.jsonl"], **held)
    assert places(out / "train.jsonl") == [f"train.jsonl:{line}" for line in (2, 3, 5)]
    assert report.counts["group_leak"] == 2
    dropped = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert dropped[0]["place"] == "train.jsonl:1" and dropped[0]["problem"] == (
        "a row of its group is held out (test.jsonl:1)"
    )


def write_marked(file: Path, rows: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def marked(prompt: str, group: str | None, weight: int = 1) -> dict[str, object]:
    """Return a chat whose first answer is learned, and whose last is not if its weight is 0."""
    turns = [("user", "hello"), ("assistant", "hi"), ("user", prompt)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return {"messages": [*messages, {"role": "assistant", "content": "yes", "weight": weight}], "topic": group}


@pytest.mark.parametrize("policy", ["off", "report", "drop"])
def test_a_held_out_row_that_is_never_scored_makes_no_training_row_a_leak(tmp_path, policy):
    files, out = tmp_path / "d" / "files", tmp_path / "out"
    never = [marked(text(1), "a", weight=0), marked(text(2), None), marked(text(3), "b", weight=0)]
    write_marked(files / "test.jsonl", [*never, marked(text(10), "c")])
    rows = [marked(text(1), "x"), marked(text(2), "y"), marked(near(text(3)), "z"), marked(text(4), "a")]
    write_marked(files / "train.jsonl", [*rows, marked(near(text(1), 3), "a"), marked(text(5), "c")])
    report = run_check(tmp_path / "d", out, policy, group="topic", heldout=["test.jsonl"])
    assert places(out / "heldout.jsonl") == ["test.jsonl:4"]
    assert places(out / "train.jsonl") == [f"train.jsonl:{line}" for line in range(1, 6)]
    assert {name: report.counts.get(name, 0) for name in ("leak", "near_leak", "group_leak")} == {
        "leak": 0, "near_leak": 0, "group_leak": 1}  # fmt: skip


@pytest.mark.parametrize("policy", ["off", "report", "drop"])
def test_the_group_of_a_held_out_duplicate_is_held_out_too(tmp_path, policy):
    files, out = tmp_path / "d" / "files", tmp_path / "out"
    write_grouped(files / "test.jsonl", [(10, "a"), (10, "b")])
    write_grouped(files / "train.jsonl", [(1, "a"), (2, "b"), (3, "c")])
    report = run_check(tmp_path / "d", out, policy, group="topic", heldout=["test.jsonl"])
    assert places(out / "train.jsonl") == ["train.jsonl:3"]
    assert (report.counts["duplicate"], report.counts["group_leak"]) == (1, 2)


def test_validation_rows_of_a_held_out_group_are_left_out_too(tmp_path):
    files = tmp_path / "d" / "files"
    write_grouped(files / "train.jsonl", [(n, f"g{n // 2}") for n in range(60)])
    write_grouped(files / "test.jsonl", [(100 + n, f"g{n}") for n in range(10)])
    out = tmp_path / "out"
    report = run_check(
        tmp_path / "d",
        out,
        "off",
        group="topic",
        heldout=["test.jsonl"],
        train=["train.jsonl"],
        validation_fraction=0.5,
    )
    assert report.counts["group_leak"] == 20 and report.rows.train + report.rows.validation == 40


def test_a_group_is_the_same_number_in_every_file_format(tmp_path):
    files = tmp_path / "d" / "files"
    files.mkdir(parents=True)
    rows = {"prompt": [text(1), text(2), text(3)], "completion": ["x"] * 3, "topic": [7, None, 8]}
    pd.DataFrame(rows).to_parquet(files / "train.parquet")  # a column of 64-bit floats
    (files / "test.csv").write_text(f"prompt,completion,topic\n{text(9)},y,7\n")
    report = run_check(tmp_path / "d", tmp_path / "out", "off", group="topic", heldout=["test.csv"])
    assert report.counts["group_leak"] == 1
    assert places(tmp_path / "out" / "train.jsonl") == ["train.parquet:row 2", "train.parquet:row 3"]


def test_near_prompts_with_different_answers_are_told_and_kept(tmp_path):
    files = tmp_path / "d" / "files"
    long = [text(seed, 60) for seed in range(4)]  # answers so different that the chats are not near
    rows = [(text(100 + n), f"answer {n}") for n in range(30)]
    rows += [(text(1), long[0]), (near(text(1)), long[1]), (text(2), long[2]), (near(text(2)), long[2].upper())]
    write(files / "train.jsonl", rows)
    write(files / "test.jsonl", [(text(50), "x")])
    report = run_check(tmp_path / "d", tmp_path / "out", "report", heldout=["test.jsonl"])
    assert report.rows.train == 34
    assert report.similar.near_disputed_prompts == 2 and report.similar.disputed_prompts == 0
    assert report.similar.near_disputed == "train.jsonl:31 and train.jsonl:32"
    assert any("2 training prompts are nearly the same as another one" in note for note in check_notes(report))


def test_planted_conflicts_of_near_prompts_are_found_as_by_comparing_all_pairs(tmp_path):
    random.seed(0)
    files = tmp_path / "d" / "files"
    prompts = [text(n) for n in range(150)]
    planted = [near(prompts[n], n) for n in range(50)]
    write(files / "train.jsonl", [(q, "yes") for q in prompts] + [(q, "no") for q in planted])
    write(files / "test.jsonl", [(text(5000), "x")])
    report = run_check(tmp_path / "d", tmp_path / "out", "report", heldout=["test.jsonl"])
    assert report.similar.near_disputed_prompts >= 98  # of 100; the index of a few pairs is below 0.8
    assert isinstance(report, CheckReport)
