"""The process that sketches rows beside the reader of a large dataset."""

import errno

import pytest

from loraflow.data import near
from loraflow.data.shingles import sketch
from loraflow.failures import Killed

TEXTS = [f"the text of row {number} {'x' * (number % 7)} é" for number in range(60)] + ["", "a", "\x04", "0"]


def sketches_of(folder, monkeypatch, alone):
    monkeypatch.setattr(near, "_BATCH", 8)
    monkeypatch.setattr(near, "_ALONE", alone)
    monkeypatch.setattr(near.os, "cpu_count", lambda: 2)
    return near.Sketches(folder)


def test_a_process_of_its_own_gives_the_same_sketches(tmp_path, monkeypatch):
    found = []
    for alone in (100, 0, 3):  # no process, one for all texts, one for all but three batches
        sketches = sketches_of(tmp_path, monkeypatch, alone)
        for text in TEXTS:
            sketches.add(text)
        assert (sketches._process is None) is (alone == 100)
        read = []
        monkeypatch.setattr(near, "Candidates", lambda values, keys, order, to=read: to.append(values.tobytes()))
        sketches.candidates()
        found += read
        sketches.close()
    assert found[0] == found[1] == found[2] == sketch(TEXTS).tobytes()


def test_a_sketching_process_that_is_killed_is_a_failure_that_is_retried(tmp_path, monkeypatch):
    sketches = sketches_of(tmp_path, monkeypatch, 0)
    sketches.add("x" * 2_000_000)
    sketches._process._child.kill()
    sketches._process._child.wait()
    with pytest.raises(Killed, match=r"ended early") as caught:
        sketches.candidates()
    assert caught.value.retryable and "exit status -9" in str(caught.value)


def test_the_sketching_process_ends_with_the_table_also_after_an_error(tmp_path, monkeypatch):
    sketches = sketches_of(tmp_path, monkeypatch, 0)
    for text in TEXTS:
        sketches.add(text)
    child = sketches._process._child
    assert child.poll() is None
    sketches.close()
    assert child.poll() is not None


def test_a_full_disk_is_the_same_failure_as_without_the_process(tmp_path, monkeypatch):
    sketches = sketches_of(tmp_path, monkeypatch, 0)
    with open("/dev/full", "r+b", buffering=0) as full:
        sketches._file = full
        for text in TEXTS:
            sketches.add(text)
        with pytest.raises(OSError) as caught:
            sketches.candidates()
    assert caught.value.errno == errno.ENOSPC
