"""Faults that no other test injects: crashes and power losses at each step, a clock that jumps, kills for lack of memory."""

import itertools
import json
import os
import time
from pathlib import Path

import pytest

from loraflow import failures, identity
from loraflow.data.tokens import tokenization
from loraflow.execution import launcher, worker_process
from loraflow.failures import BadData, OutOfMemory
from loraflow.job import Inputs, Progress
from loraflow.registry import PromotionLog
from loraflow.stages import STAGES
from loraflow.store import LocalStore, Summary
from tests.crash import Crash, crash_at
from tests.fake_jobs import FAKE, job
from tests.fake_worker import FAKE_STAGE
from tests.job_factory import make_job
from tests.unit.training.test_training import REF, recipe

PAYLOAD = identity.payload("tokenize", 1, {}, {"x": 1})
NAME = ("tokenize", identity.fingerprint(PAYLOAD))


def put(store, content="content", replace=False):
    staged = store.staging(*NAME)
    (staged / "part").mkdir()
    for name in ("a", "part/b"):
        (staged / name).write_text(content)
    return store.commit(
        staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={"seconds": 1}, replace=replace
    )


def crashes(tmp_path, commit, after_crash):
    """Commit again and again, with a crash before another step each time, until a commit completes."""
    for step in itertools.count():
        store = LocalStore(tmp_path / str(step))
        try:
            with crash_at(step):
                commit(store)
        except Crash:
            after_crash(store)
        else:
            return step
    raise AssertionError


def expect_old_or_new(store, old, new):
    found = LocalStore(store.root).find(*NAME)
    assert (found.digest if found else None) in (old, new)
    assert found is None or store.verify(found) == [], "an artifact that is found has all of its bytes"
    assert put(store, "new", replace=True).digest == new and store.verify(store.find(*NAME)) == []


def test_a_crash_before_any_step_of_a_commit_leaves_old_or_new(tmp_path):
    old, new = (put(LocalStore(tmp_path / name), name).digest for name in ("old", "new"))
    steps = crashes(tmp_path, lambda store: put(store, "new"), lambda store: expect_old_or_new(store, None, new))
    assert steps > 10

    def replace(store):
        put(store, "new", replace=True)

    for step in range(steps):
        store = LocalStore(tmp_path / f"replaced-{step}")
        put(store, "old")
        try:
            with crash_at(step):
                replace(store)
        except Crash:
            expect_old_or_new(store, old, new)


def test_a_power_loss_at_any_step_of_a_commit_leaves_old_or_new(tmp_path, monkeypatch):
    """What was not flushed is gone: the file has its name and no content, as on a journalling file system."""
    new = put(LocalStore(tmp_path / "new"), "new").digest
    flushed: dict[int, int] = {}  # inode → mtime in nanoseconds, at the time of the flush

    def fsync(fd):
        flushed[os.fstat(fd).st_ino] = os.fstat(fd).st_mtime_ns

    def lose_power(store):
        for path in store.root.rglob("*"):
            status = path.lstat()
            if path.is_file() and flushed.get(status.st_ino) != status.st_mtime_ns:
                path.write_bytes(b"")
        found = LocalStore(store.root).find(*NAME)
        assert found is None or (found.digest == new and store.verify(found) == [])
        assert put(store, "new").digest == new

    monkeypatch.setattr("tests.crash.STEPS", ("rename", "replace", "link", "unlink", "rmdir", "mkdir"))
    monkeypatch.setattr(os, "fsync", fsync)
    assert crashes(tmp_path, lambda store: put(store, "new"), lose_power) > 5


def test_a_crash_while_a_decision_is_written_leaves_all_of_it_or_nothing(tmp_path):
    decision = {"verdict": "reject", "reasons": ["worse"], "comparisons": []}

    def decide(store):
        PromotionLog(store, "tickets").write_decision(None, "d" * 64, "p" * 64, decision)

    def look(store):
        assert PromotionLog(store, "tickets").read_decision(None, "d" * 64, "p" * 64) in (None, decision)
        decide(store)
        assert PromotionLog(store, "tickets").read_decision(None, "d" * 64, "p" * 64) == decision

    assert crashes(tmp_path, decide, look) > 2


@pytest.mark.parametrize("days", [-1, 1])
def test_a_clock_that_jumps_by_a_day_changes_no_result_and_removes_nothing(tmp_path, monkeypatch, days):
    store, now = LocalStore(tmp_path), time.time
    before = put(store)
    staged = store.staging("train", "f" * 64)
    work = store.work_folder("train", "f" * 64)
    monkeypatch.setattr(time, "time", lambda: now() + days * 86400)
    assert store.find(*NAME) == before and put(store) == before
    assert put(LocalStore(tmp_path / "other")).digest == before.digest
    assert list(store.stale_items(time.time() - 14 * 86400, remove=True)) == [] and staged.exists() and work.exists()


def test_a_worker_that_the_kernel_killed_for_memory_is_named_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "WORKER", FAKE)
    monkeypatch.setitem(STAGES, FAKE_STAGE.name, FAKE_STAGE)
    store, counts = LocalStore(tmp_path), itertools.count()
    monkeypatch.setattr(worker_process, "_oom_kills", lambda: next(counts))
    with pytest.raises(OutOfMemory, match=r"killed the worker|a single row does not fit") as caught:
        launcher.run_job(job("kill-once", eval_batch_size=1), store)
    assert not isinstance(caught.value, failures.Killed) and caught.value.next_step
    assert launcher.run_job(job("kill-once", eval_batch_size=2), LocalStore(tmp_path / "other")), (
        "tried again with less"
    )


def test_rows_without_a_token_to_learn_are_refused_before_training(tmp_path, phi3):
    messages = [{"role": "user", "content": "red " * 300}, {"role": "assistant", "content": "blue"}]
    row = {"id": "1", "set": "train", "place": "train.jsonl:1", "messages": messages}
    rows = tmp_path / "rows"
    rows.mkdir()
    (tmp_path / "tokens").mkdir()
    (rows / "train.jsonl").write_text(json.dumps(row) + "\n")
    (rows / "validation.jsonl").touch()
    job = make_job("tokenize", recipe(data__too_long="drop"), {"rows": REF, "base": REF})
    with pytest.raises(BadData, match="No training row has a token to learn") as caught:
        tokenization.run(job, Inputs({"rows": rows, "base": phi3}), Path(tmp_path, "tokens"), Progress())
    assert "too_long: 1" in caught.value.got
