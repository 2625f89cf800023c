"""How the training rows changed since the champion: what is counted, the largest shift, and when a retraining waits."""

import base64
import json
import re
import sqlite3
from contextlib import closing, contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ks_2samp

from loraflow.config import load_recipe
from loraflow.data.checks.check_report import CheckReport, DataDrift, NearDuplicates, SplitCounts, why_wait
from loraflow.data.checks.compare import CheckedRows, measure_drift
from loraflow.data.checks.split import row_id
from loraflow.execution.launcher import run_job
from loraflow.execution.workspace import Workspace
from loraflow.flows import retrain as flow
from loraflow.reporting.markdown import drift_lines
from loraflow.stages import CHECK_DATASET, VERSION_DATASET
from loraflow.tasks import drift as drift_task
from loraflow.tasks import run as run_module
from loraflow.tasks.drift import compare_data
from loraflow.tasks.run import Run
from tests.promoted_models import commit, promote


def report(rows, near=None, heldout=5, **counts):
    return CheckReport(
        rows=SplitCounts(train=rows, validation=0, heldout=heldout), sets={}, counts={"read": rows, **counts},
        malformed_share=0.0, first_problems=[], near=near,
    )  # fmt: skip


def checked(chats, fields=(), **more):
    """Return rows as check_dataset writes them; chats are (prompt, answer)."""
    rows = CheckedRows(report(len(chats), **more))
    lines = []
    for prompt, answer in chats:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"id": row_id(messages), "set": "train", "place": "x", "messages": messages}))
    rows.add("".join(line + "\n" for line in lines).encode())
    rows.add(b"")
    rows.version.read = len(chats)
    rows.version.fields.update(dict(fields))
    return rows


def test_rows_that_were_added_removed_and_edited_are_counted():
    old = [(f"q{i}", "a") for i in range(10)]
    drift = measure_drift(checked(old), checked([*old[2:9], ("q9", "other"), ("new", "a")]))
    assert (drift.before, drift.after, drift.added, drift.removed, drift.edited, drift.changed) == (10, 9, 1, 2, 1, 4)
    assert drift.lines[0] == "training rows: 10 → 9 rows, 1 added, 2 removed, 1 edited"


def test_the_shift_of_a_length_is_the_largest_difference_of_the_shares_of_rows_up_to_it():
    rng = np.random.default_rng(0)
    was, now = rng.integers(1, 50, 200), rng.integers(10, 90, 150)
    drift = measure_drift(
        *(checked([(f"q{i:04d}", "x" * size) for i, size in enumerate(sizes)]) for sizes in (was, now))
    )
    assert drift.shifted == "length of the answers" and drift.shift == pytest.approx(
        ks_2samp(was, now).statistic, abs=1e-6
    )
    assert drift.lines[-1] == f"largest shift: {drift.shift:.3f} (length of the answers)"


def test_the_shift_of_labels_is_the_share_of_rows_that_would_need_another_label():
    def labelled(*counts):
        labels = [name for name, count in zip(("aa", "bb", "cc"), counts, strict=True) for _ in range(count)]
        return checked([(f"q{i:04d}", label) for i, label in enumerate(labels)])

    drift = measure_drift(labelled(50, 50, 0), labelled(50, 20, 30))
    assert (drift.shift, drift.shifted) == (0.3, "labels")
    assert "label bb: 50.0% → 20.0% of the rows" in drift.lines and "label cc: 0.0% → 30.0% of the rows" in drift.lines


def test_the_shift_of_a_field_is_the_change_of_the_share_of_rows_that_have_it():
    chats = [(f"q{i}", f"answer {i}") for i in range(10)]
    drift = measure_drift(checked(chats, fields={"note": 1}), checked(chats, fields={"note": 9}))
    assert (drift.shift, drift.shifted, drift.changed) == (0.8, "field note", 0)


def test_what_the_check_left_out_and_near_duplicates_are_compared():
    chats = [(f"q{i}", "a") for i in range(10)]
    old = checked(chats, duplicate=1, near=NearDuplicates(rows=4, clusters=2))
    new = checked(chats, duplicate=7, heldout=9, near=NearDuplicates(rows=8, clusters=3))
    lines = measure_drift(old, new).lines
    assert "duplicate: 1 of 10 → 7 of 10 rows that were read" in lines and "held-out rows: 5 → 9" in lines
    assert "near-duplicates: 4 rows in 2 clusters → 8 in 3" in lines


def test_equal_rows_have_no_shift_and_a_version_without_rows_is_compared():
    chats = [(f"q{i}", "a") for i in range(10)]
    same = measure_drift(checked(chats), checked(chats[::-1]))
    assert (same.shift, same.changed, same.shifted) == (0.0, 0, "")
    assert measure_drift(checked([]), checked(chats)).added == 10


DRIFT = DataDrift(before=100, after=110, added=8, removed=1, edited=2, shift=0.12, shifted="labels")


@pytest.mark.parametrize(
    ("rows", "shift", "waits"),
    [(0, 0.0, False), (11, 0.0, False), (12, 0.0, True), (0, 0.12, False), (0, 0.13, True), (12, 0.1, False),
     (11, 0.9, False), (12, 0.13, True)],
)  # fmt: skip
def test_a_retraining_waits_only_until_one_of_the_thresholds_is_reached(rows, shift, waits):
    why = why_wait(DRIFT, rows, shift)
    assert bool(why) == waits
    if waits:
        assert "11 training rows" in why and "0.120, labels" in why
    assert why_wait(None, rows, shift) == "", "without a champion nothing waits"


def test_the_report_lists_what_changed():
    lines = list(drift_lines(measure_drift(checked([("q|1", "a")]), checked([("q", "a")]))))
    assert lines[0] == "## Training rows since the champion" and lines[2].startswith("- training rows: 1 → 1 rows")
    assert not list(drift_lines(None))


def test_the_report_draws_the_lengths_of_the_answers_before_and_now():
    old = [(f"q{n}", "a" * n) for n in range(1, 101)]
    drift = measure_drift(checked(old), checked([(prompt, completion * 2) for prompt, completion in old]))
    was, now = drift.lengths.values()
    assert was[10] == (pytest.approx(1 + 99 * 0.5), pytest.approx(0.5))
    assert [x for x, _ in now] == pytest.approx([2 * x for x, _ in was])
    stored = DataDrift.model_validate_json(drift.model_dump_json())
    drawing = base64.b64decode(re.search(r"base64,([^)]*)", "".join(drift_lines(stored, image=True)))[1]).decode()
    assert (
        drawing.count("<polyline") == 2 and "characters of an answer" in drawing and "the rows of this run" in drawing
    )
    assert "base64" not in "".join(drift_lines(measure_drift(checked(old), checked(old)), image=True))


def check(workspace):
    dataset = run_job(workspace.job(VERSION_DATASET, {}), workspace.store)
    return run_job(workspace.job(CHECK_DATASET, {"dataset": dataset}), workspace.store)


def test_new_rows_are_compared_with_those_that_the_champion_was_trained_on(recipe, dataset):
    workspace = Workspace(load_recipe(recipe))
    before = check(workspace)
    assert compare_data.fn(workspace, before) is None, "there is no champion"
    tokens = commit(workspace.store, "tokenize", "t", inputs={"rows": before})
    adapter = commit(workspace.store, "train", "a", inputs={"tokens": tokens})
    promote(workspace.log, commit(workspace.store, "merge", "m", inputs={"adapter": adapter}))
    same = compare_data.fn(workspace, before)
    assert same.changed == 0 and same.lines == ["the training rows are those of the champion"]
    file = dataset / "train.jsonl"
    row = {"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "a"}], "note": "n"}
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    after = check(Workspace(load_recipe(recipe)))
    drift = compare_data.fn(workspace, after)
    assert (drift.added, drift.changed) == (1, 1)
    workspace.store.remove(before)
    assert compare_data.fn(workspace, after) is None, "its rows are gone: nothing waits for a comparison"


def test_a_retraining_that_waits_trains_nothing_and_says_why(monkeypatch):
    asked = []
    run = SimpleNamespace(
        id="r",
        drift=None,
        stages={},
        workspace=SimpleNamespace(recipe=SimpleNamespace(name="tiny"), log=SimpleNamespace(entries=list)),
    )

    @contextmanager
    def opened(*_):
        yield run

    replaced = {"open_run": opened, "version_dataset": lambda run: "d", "check_dataset": lambda run, dataset: "rows",
                "compare_data": lambda workspace, rows: DRIFT, "publish_waiting": lambda run, why: asked.append(why),
                "pipeline": lambda run: pytest.fail("it trains")}  # fmt: skip
    for name, function in replaced.items():
        monkeypatch.setattr(flow, name, function)
    state = flow.retrain.fn("tiny", min_changed_rows=12)
    assert state.name == "WaitsForData" and state.message == asked[0] and "12 changed rows" in state.message
    assert state.data["drift"]["added"] == 8
    with pytest.raises(pytest.fail.Exception, match="it trains"):
        flow.retrain.fn("tiny", min_changed_rows=11)


def test_a_stage_that_a_run_computed_and_then_found_is_recorded_as_computed(monkeypatch, tmp_path):
    refs = iter([None, "cached"])
    ref = SimpleNamespace(fingerprint="f", digest="d")
    monkeypatch.setattr(
        run_module, "look_up",
        lambda *_, **__: SimpleNamespace(ref=ref if next(refs) else None, why=list, by_other_code=lambda: False),
    )  # fmt: skip
    job = SimpleNamespace(stage="check_dataset", fingerprint="f", inputs={}, pool=None)
    workspace = SimpleNamespace(store=SimpleNamespace(location=lambda ref: "here"), job=lambda *_: job)
    run = Run(workspace, None, [])
    monkeypatch.setattr(run_module, "run_job", lambda *_, **__: ref)
    for _ in range(2):
        run.find_or_run(CHECK_DATASET)
    assert run.stages["check_dataset"].state == "computed"


def test_fields_of_a_database_with_several_tables_are_those_of_each_sources_query(tmp_path, monkeypatch):
    monkeypatch.setattr(drift_task, "require_intact", lambda *of: None)
    folder = tmp_path / "files" / "faq"
    folder.mkdir(parents=True)
    with closing(sqlite3.connect(folder / "faq.db")) as database:
        database.execute("CREATE TABLE chats (prompt, completion, note)")
        database.executemany("INSERT INTO chats VALUES ('q', 'a', ?)", [(None,), ("n",)])
        database.execute("CREATE TABLE others (x)")
        database.commit()
    config = {"sources": [{"name": "faq", "query": "SELECT * FROM chats", "weight": 2.0}], "format": "auto"}
    payload, of_rows = {"config": config}, report(2).model_dump(mode="json")
    manifest = SimpleNamespace(payload=payload, report=of_rows, input_refs=lambda uri: {"dataset": "dataset"})
    store = SimpleNamespace(
        uri="", manifest=lambda rows: manifest, read=lambda rows, name: b"", path=lambda dataset: tmp_path
    )
    found = drift_task._read(SimpleNamespace(store=store, memo=None), "rows").version
    assert found.read == 2 and found.fields == {"prompt": 2, "completion": 2, "note": 1}
