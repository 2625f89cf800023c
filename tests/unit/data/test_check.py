"""The check_dataset stage: splits, duplicates, leaks, malformed rows and their limit; the quickstart's dataset."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loraflow.cli import cli
from loraflow.config.data import Data, read_tools_file
from loraflow.data.checks import check, row_limits
from loraflow.data.checks.check_report import CheckReport
from loraflow.data.versions import dvc
from loraflow.failures import BadData, LimitExceeded
from loraflow.job import Inputs, Job, Progress
from loraflow.reporting.rows import check_notes
from tests.conftest import write_chats


def run_check(folder: Path, out: Path, **settings) -> dict:
    out.mkdir()
    (folder.parent / "artifact").mkdir(exist_ok=True)
    shutil.copytree(folder, folder.parent / "artifact" / "files", dirs_exist_ok=True)
    data = Data(**settings)
    config = data.model_dump(include={"format", "columns", "train", "heldout", "extra_heldout", "validation_fraction", "system",
                                      "duplicates", "limit", "heldout_fraction", "seed"})  # fmt: skip
    if data.thinking in ("strip", "empty"):
        config["thinking"] = "strip"
    if data.tools is not None:
        config["tools"] = read_tools_file(data.tools)
    job = Job(stage="check_dataset", version=1, config=config)
    return check.run(job, Inputs({"dataset": folder.parent / "artifact"}), out, Progress()).report


def ids(file: Path) -> list[str]:
    return [json.loads(line)["id"] for line in file.read_text().splitlines()]


def test_a_row_keeps_its_split_when_other_rows_are_added_and_removed(tmp_path):
    write_chats(tmp_path / "a" / "data" / "chats.jsonl", range(200))
    write_chats(tmp_path / "b" / "data" / "chats.jsonl", range(100, 300))
    for name in "ab":
        run_check(tmp_path / name / "data", tmp_path / name / "out", validation_fraction=0.2)
    sides = [{i: side for side in ("train", "validation", "heldout") for i in ids(tmp_path / name / "out" / f"{side}.jsonl")}
             for name in "ab"]  # fmt: skip
    shared = sides[0].keys() & sides[1].keys()
    assert len(shared) == 100
    assert all(sides[0][i] == sides[1][i] for i in shared)
    assert {"train", "validation", "heldout"} == set(sides[0].values())


def test_rows_with_equal_prompts_are_in_one_split(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a{j}"} for i in range(100) for j in range(3)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_check(tmp_path / "data", tmp_path / "out", heldout_fraction=0.3)
    prompts = [{json.loads(line)["messages"][0]["content"] for line in (tmp_path / "out" / f"{side}.jsonl").open()}
               for side in ("train", "heldout")]  # fmt: skip
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]


def test_duplicates_and_leaks_are_dropped_and_reported(tmp_path):
    write_chats(tmp_path / "data" / "train.jsonl", [1, 2, 2, 3, 100])
    write_chats(tmp_path / "data" / "heldout.jsonl", [100, 101, 101])
    write_chats(tmp_path / "data" / "hand.jsonl", [101, 102])
    report = run_check(tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["heldout.jsonl"],
                       extra_heldout={"hand": "hand.jsonl"})  # fmt: skip
    assert report["rows"] == {"train": 3, "validation": 0, "heldout": 4}
    assert report["sets"] == {"heldout": 2, "hand": 2}
    assert report["counts"]["duplicate"] == 2 and report["counts"]["leak"] == 1
    reasons = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert "its prompt is held out (heldout.jsonl:1)" in reasons and "same as train.jsonl:2" in reasons


def test_a_file_that_no_pattern_names_is_reported(tmp_path):
    for number, name in enumerate(["train.jsonl", "more.jsonl", "sub/train.csv", "hand.jsonl"]):
        write_chats(tmp_path / "data" / name, range(number * 9, number * 9 + 9))
    (tmp_path / "data" / "notes.txt").write_text("not chats")
    settings = {"train": ["train.jsonl"], "extra_heldout": {"hand": "hand.jsonl"}}
    report = run_check(tmp_path / "data", tmp_path / "out", **settings)
    assert report["unread_files"] == ["more.jsonl", "sub/train.csv"] and report["counts"]["read"] == 18
    [note] = [note for note in check_notes(CheckReport.model_validate(report)) if "more.jsonl" in note]
    assert note == "files that no pattern of the recipe names are not read: more.jsonl, sub/train.csv"
    (tmp_path / "data" / "sub" / "train.csv").unlink()
    shutil.rmtree(tmp_path / "artifact")
    both = run_check(tmp_path / "data", tmp_path / "both", **{**settings, "train": ["train.jsonl", "more.jsonl"]})
    assert "unread_files" not in both, "a report without such files is the same as of earlier versions"


def test_unread_files_are_counted_beyond_those_that_are_named(tmp_path):
    for number in range(60):
        write_chats(tmp_path / "data" / f"{number:02}.jsonl", range(number * 2, number * 2 + 2))
    report = run_check(tmp_path / "data", tmp_path / "out", train=["00.jsonl"], heldout_fraction=0.5)
    assert (len(report["unread_files"]), report["unread_file_count"]) == (50, 59)
    [note] = [note for note in check_notes(CheckReport.model_validate(report), {"01.jsonl"}) if "no pattern" in note]
    assert note.endswith(": " + ", ".join(f"{n:02}.jsonl" for n in range(2, 12)) + " and 48 more files")


def test_files_that_the_recipe_uses_for_something_else_are_not_said_to_be_unread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "more.jsonl", "general.jsonl"):
        write_chats(Path("data", name), range(20))
    shutil.copy(Path(__file__).parents[2] / "tools.json", "data/tools.json")
    Path("data", "words.json").write_text("[]")
    Path("metrics", "polite").mkdir(parents=True)
    Path("metrics", "polite", "polite.py").write_text("WORDS = open('data/words.json')\n")
    Path("r.yaml").write_text(
        "name: r\nbase: {model: bundled:smollm2}\ndata: {source: data, tools: data/tools.json}\n"
        "evaluation: {general: ./data/general.jsonl, metrics: [./metrics/polite, token_loss]}\n"
    )
    done = CliRunner().invoke(cli, ["data", "check", "r.yaml"])
    assert [line for line in done.output.splitlines() if line.startswith("not read")] == [
        "not read  more.jsonl: no pattern of the recipe names it"
    ]
    document = json.loads(CliRunner().invoke(cli, ["data", "check", "r.yaml", "--json"]).output.splitlines()[-1])
    assert document["unread_files"] == ["more.jsonl"]


def test_chats_without_a_system_message_get_the_recipes_message(tmp_path):
    write_chats(tmp_path / "data" / "train.jsonl", range(20))
    run_check(tmp_path / "data", tmp_path / "out", system="be brief", train=["*"])
    row = json.loads((tmp_path / "out" / "train.jsonl").open().readline())
    assert row["messages"][0] == {"role": "system", "content": "be brief"}


THOUGHT = {"role": "assistant", "content": "<think>\nbecause\n</think>\n\ntwo"}
BESIDE = {"role": "assistant", "content": "two", "reasoning_content": "because"}
EMPTY = {"role": "assistant", "content": "<think>because</think>"}


@pytest.mark.parametrize("thinking", [None, "keep", "strip", "empty"])
def test_reasoning_is_kept_removed_or_named(tmp_path, thinking):
    (tmp_path / "data").mkdir()
    answers = (
        THOUGHT,
        BESIDE,
        EMPTY,
        {**BESIDE, "reasoning_content": None},
        {"role": "assistant", "content": "two", "thinking": {"is": "because"}},
    )
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, answer]} for n, answer in enumerate(answers)]
    (tmp_path / "data" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_check(tmp_path / "data", tmp_path / "out", heldout_fraction=0.0, thinking=thinking)
    learned = [json.loads(line)["messages"][1]["content"] for line in (tmp_path / "out" / "train.jsonl").open()]
    problems = {row["place"]: row["problem"] for row in map(json.loads, (tmp_path / "out" / "quarantine.jsonl").open())}
    if thinking in ("strip", "empty"):
        assert learned == ["two", "two", "two", "two"]
        assert problems == {"x.jsonl:3": "an answer is empty without its reasoning (data.thinking)"}
    else:
        assert learned == [THOUGHT["content"], "two", EMPTY["content"], "two"]
        assert [line.count("because") for line in (tmp_path / "out" / "train.jsonl").open()] == [1, 1, 1, 0]
        assert list(problems) == ["x.jsonl:5"] and problems["x.jsonl:5"].startswith("messages.thinking would not be")


def test_too_many_malformed_rows_stop_the_run_and_are_listed(tmp_path):
    write_chats(tmp_path / "data" / "train.jsonl", range(50))
    with (tmp_path / "data" / "train.jsonl").open("a") as file:
        file.write("{nonsense\n")
    report = run_check(tmp_path / "data", tmp_path / "out")
    with pytest.raises(LimitExceeded) as caught:
        row_limits.check_limits(report, 0.01, "report.json")
    assert "train.jsonl:51: column 2" in str(caught.value)
    row_limits.check_limits(report, 0.05, "report.json")


def test_an_empty_split_stops_the_run(tmp_path):
    write_chats(tmp_path / "data" / "train.jsonl", range(5))
    report = run_check(tmp_path / "data", tmp_path / "out", heldout_fraction=0.0)
    with pytest.raises(BadData, match="no heldout rows"):
        row_limits.check_limits(report, 0.01, "report.json")


def test_a_file_in_two_held_out_sets_is_refused(tmp_path):
    write_chats(tmp_path / "data" / "train.jsonl", range(5))
    write_chats(tmp_path / "data" / "hard.jsonl", range(100, 103))
    with pytest.raises(BadData, match='held-out set "heldout" already belongs to the set "hard"'):
        run_check(tmp_path / "data", tmp_path / "out", heldout=["hard.jsonl"], extra_heldout={"hard": "hard.jsonl"})


def test_a_report_without_training_rows_has_an_empty_profile(tmp_path):
    write_chats(tmp_path / "data" / "train.jsonl", range(3))
    report = run_check(tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["train.jsonl"])
    assert report["profile"] == {} == json.loads((tmp_path / "out" / "report.json").read_text())["profile"]
    assert CheckReport.model_validate(report).profile is None
    with pytest.raises(BadData, match="no train rows"):
        row_limits.check_limits(report, 0.01, "report.json")


def test_the_quickstarts_splits_share_no_phrase():
    from examples import tickets

    for train, heldout in (*tickets.REQUESTS.values(), *tickets.URGENCY.values(), tickets.GREETINGS, tickets.CLOSES,
                           tickets.NO_PRODUCT, tickets.ORDER_FORMS):  # fmt: skip
        assert not (set(train) & set(heldout)) - {""}
    assert not set(tickets.PRODUCTS.train) & set(tickets.PRODUCTS.heldout)
    assert len(tickets.REQUESTS) >= 8


def test_the_quickstarts_generated_files_equal_the_pinned_files(tmp_path):
    """The generator is deterministic: a new version of Python or a reordered phrase must not change data.dvc."""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "examples/tickets.py", str(tmp_path / "data")], cwd=root, check=True)
    pin = dvc.read_pin(str(root), "data.dvc", None).md5
    listed = json.loads((root / ".dvc" / "remote" / "files" / "md5" / pin[:2] / pin[2:]).read_text())
    pinned = {entry["relpath"]: entry["md5"] for entry in listed}
    generated = {file.name: dvc.dvc_md5(file) for file in (tmp_path / "data").iterdir()}
    assert generated == {name: pinned[name] for name in ("train.jsonl", "heldout.jsonl")}


def write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_limit_is_a_sample_that_adding_rows_hardly_changes(tmp_path):
    rows = [{"prompt": f"question {n}", "completion": f"label {n // 40}"} for n in range(77 * 40)]  # sorted by label
    taken = []
    for name, part in (("a", rows), ("b", [{"prompt": "new", "completion": "x"}, *reversed(rows)])):
        write_rows(tmp_path / name / "data" / "train.jsonl", part)
        report = run_check(tmp_path / name / "data", tmp_path / name / "out", limit=200)
        assert report["rows"]["train"] == 200 and report["counts"]["over_limit"] > 2000
        train = [json.loads(line) for line in (tmp_path / name / "out" / "train.jsonl").open()]
        taken.append({row["id"] for row in train})
        assert len({row["messages"][-1]["content"] for row in train}) > 60, "of 77; the first 200 rows have 5 or 6"
    assert len(taken[0] & taken[1]) >= 199


@pytest.mark.parametrize("count", [2, 3, 8, 20])
def test_of_a_few_rows_one_prompt_at_least_is_held_out(tmp_path, count):
    rows = [{"prompt": f"What is {n}?", "completion": str(n)} for n in range(count)]
    held = []
    for name, part in (("a", rows), ("b", rows[::-1])):
        write_rows(tmp_path / name / "data" / "train.jsonl", part)
        report = run_check(tmp_path / name / "data", tmp_path / name / "out", heldout_fraction=0.001)
        row_limits.check_limits(report, 0.01, "report.json")
        assert report["sets"] == {"heldout": 1} and report["counts"]["held_out_of_few"] == 1
        assert report["rows"]["train"] == count - 1
        held += ids(tmp_path / name / "out" / "heldout.jsonl")
    assert held[0] == held[1], "whatever the order of the rows"


def test_a_dataset_without_held_out_rows_is_named_with_what_to_do(tmp_path):
    write_rows(tmp_path / "data" / "train.jsonl", [{"prompt": "q", "completion": str(n)} for n in range(5)])
    report = run_check(tmp_path / "data", tmp_path / "out")
    with pytest.raises(BadData) as caught:
        row_limits.check_limits(report, 0.01, "report.json", "mine.dvc")
    assert str(caught.value).startswith("mine.dvc has no heldout rows.") and "data.heldout" in str(caught.value)
    assert "5 rows read, 5 left to train on" in str(caught.value)


def test_a_refusal_has_at_most_ten_lines(tmp_path):
    text = "".join(json.dumps({"prompt": "q", "no\nsuch" * 900: str(n)}) + "\n" for n in range(50))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(text)
    report = run_check(tmp_path / "data", tmp_path / "out")
    for limit, kind in ((0.01, LimitExceeded), (1.0, BadData)):
        with pytest.raises(kind) as caught:
            row_limits.check_limits(report, limit, "report.json")
        lines = str(caught.value).splitlines()
        assert len(lines) <= 10 and max(map(len, lines)) < 260


def test_near_copies_of_held_out_prompts_and_disputed_prompts_are_counted_and_kept(tmp_path):
    held = [{"prompt": "What is the ﬁrst  color?", "completion": "red"}, {"prompt": "Naïve Straße", "completion": "x"}]
    train = [
        {"prompt": "WHAT IS THE FIRST COLOR? ", "completion": "red"},
        {"prompt": "What is\nthe first color?", "completion": "blue"},
        {"prompt": "nai\u0308ve STRASSE", "completion": "x"},
        {"prompt": "other", "completion": "a"},
        {"prompt": "Other", "completion": "A"},
        {"prompt": "third", "completion": "a"},
    ]
    write_rows(tmp_path / "data" / "train.jsonl", train)
    write_rows(tmp_path / "data" / "heldout.jsonl", held)
    report = run_check(tmp_path / "data", tmp_path / "out", train=["train.jsonl"], heldout=["heldout.jsonl"])
    similar = CheckReport.model_validate(report).similar
    assert (similar.near_leaks, similar.near_leak) == (3, "train.jsonl:1 and heldout.jsonl:1")
    assert (similar.disputed_prompts, similar.disputed_rows) == (1, 2)
    assert similar.disputed == "train.jsonl:1 and train.jsonl:2"
    assert report["rows"]["train"] == 6, "counted, not dropped"


def test_the_first_problems_are_those_that_stop_the_run(tmp_path):
    rows = [{"prompt": f"q{n}", "completion": "a", "label": n > 20} for n in range(60)]
    write_rows(tmp_path / "data" / "train.jsonl", [*rows, {"nonsense": 1}])
    report = run_check(tmp_path / "data", tmp_path / "out")
    assert report["counts"]["marked_false"] == 21 and report["counts"]["malformed"] == 1
    assert report["first_problems"][0].startswith("train.jsonl:61: expected messages")
    with pytest.raises(LimitExceeded, match="train.jsonl:61"):
        row_limits.check_limits(report, 0.01, "report.json")


def test_keys_that_are_not_read_are_in_the_report(tmp_path):
    write_rows(
        tmp_path / "data" / "train.jsonl", [{"prompt": f"q{n}", "completion": "a", "note": "TEXT"} for n in range(9)]
    )
    assert run_check(tmp_path / "data", tmp_path / "out")["unread"] == {"note": 9}


def test_rows_kept_for_tests_are_left_out_of_training_files_only(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train", "heldout"):
        rows = [{"prompt": f"{name} {part}", "completion": "a", "split": part} for part in ("train", "test", "test")]
        rows[2]["prompt"] += " again"
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run_check(tmp_path / "data", tmp_path / "out", heldout=["heldout.jsonl"])
    assert report["rows"] == {"train": 1, "validation": 0, "heldout": 3}
    assert report["marks"] == {"split: test": 2} and report["counts"]["marked_false"] == 2
