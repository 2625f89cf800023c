"""Rows of check_dataset: what a row takes in memory, and that its text is that of the json module."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraflow.config.recipe import Recipe
from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import with_system, without_system
from loraflow.data.checks import check
from loraflow.data.checks.chat_table import ChatTable
from loraflow.data.checks.row_drops import _first
from loraflow.data.checks.row_segment import SegmentBuilder, message_json
from loraflow.data.checks.split import row_id, to_json
from loraflow.data.files.readers import Row
from loraflow.job import Inputs, Job, Progress
from loraflow.store import Summary
from tests.job_factory import Outside


def run_check(folder: Path, lines: list[str], **settings) -> Summary:
    (folder / "files").mkdir()
    with (folder / "files/train.jsonl").open("w") as file:
        file.writelines(f"{line}\n" for line in lines)
    (folder / "out").mkdir()
    recipe = Recipe.model_validate({"name": "x", "base": {"model": "b"}, "data": settings})
    job = Job(stage="check_dataset", version=1, config=CheckDatasetConfig.from_recipe(recipe, Outside()))
    return check.run(job, Inputs({"dataset": folder}), folder / "out", Progress())


@pytest.mark.parametrize("row", [{"prompt": "x", "completion": "TEXT"}, {"nothing": "TEXT"}])
def test_the_texts_of_rows_are_not_in_memory(tmp_path, row):
    """150 rows of 50 kB, valid or malformed."""
    rng = np.random.default_rng(0)
    lines = [json.dumps(row).replace("x", f"question {n}").replace("TEXT", rng.bytes(25_000).hex()) for n in range(150)]
    (tmp_path / "first").mkdir()
    run_check(tmp_path / "first", lines[:1])  # imports modules, whose memory does not count
    tracemalloc.start()
    try:
        report = run_check(tmp_path, lines, heldout_fraction=0.1).report
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report["counts"]["read"] == 150
    assert peak < 4e6, peak


def test_of_the_rows_of_a_large_dataset_a_few_numbers_are_in_memory(tmp_path):
    config = CheckDatasetConfig.from_recipe(
        Recipe.model_validate({"name": "x", "base": {"model": "b"}, "data": {"near_duplicates": "report"}}), Outside()
    )
    builder = SegmentBuilder(config, is_training=True, is_pinned=False)
    chat = [{"role": "user", "content": "question " * 20}, {"role": "assistant", "content": "answer"}]
    for number in range(1000):
        builder.add(number, Row(f"x.jsonl:{number}", chat))
    segment = builder.segment({})
    tracemalloc.start()
    try:
        with ChatTable(tmp_path, config) as table:
            in_memory = []
            for number in range(50):
                table.extend(segment, "x.jsonl:", 1 + 1000 * number, "train", None)
                in_memory.append(tracemalloc.get_traced_memory()[0])
            assert table.columns.turns.tolist() == [2] * 50_000 and table.place(49_999) == "x.jsonl:50000"
            assert table.id_of(0) == table.id_of(49_000) == row_id(chat) and table.messages(31_234) == chat
    finally:
        tracemalloc.stop()
    assert in_memory[-1] - in_memory[9] < 40 * 40_000, in_memory


def test_a_dataset_without_a_valid_row_has_a_report_with_near_duplicates(tmp_path):
    report = run_check(tmp_path, ['{"x": 1}'], heldout_fraction=0.1, near_duplicates="report").report
    assert report["counts"] == {"read": 1, "malformed": 1}
    assert report["near"]["rows"] == 0


def test_no_temporary_file_is_left_in_the_artifact(tmp_path):
    run_check(tmp_path, ['{"prompt": "a", "completion": "b"}'], near_duplicates="report")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"{name}.jsonl" for name in ("train", "validation", "heldout", "quarantine", "clusters")} | {
        "report.json"
    }


@pytest.mark.parametrize("content", ["", "plain", 'a "quoted" \\ text', "\x00\x1f\t\n\x7f", "é \u2028 日本 😀"])
def test_a_message_is_written_as_the_json_module_writes_it(content):
    message = {"role": "user", "content": content}
    assert message_json(message) == to_json(message) == json.dumps(message, ensure_ascii=False)


def test_a_chat_without_its_added_system_message_is_the_chat_with_its_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    for first in ({"role": "user", "content": "q"}, {"role": "user", "content": "q", "tools": [tool]}):
        chat = [first, {"role": "assistant", "content": "a"}]
        assert to_json(without_system(with_system(chat, "s"))) == to_json(chat)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30))
def test_the_first_of_equal_rows_is_that_of_a_dictionary(rows):
    seen: dict[tuple[int, int], int] = {}
    expected = [seen.setdefault(row, number) for number, row in enumerate(rows)]
    columns = np.array(rows, np.int64).reshape(-1, 2)
    assert _first(columns[:, 0].astype(np.uint64), columns[:, 1]).tolist() == expected
