"""How the launcher watches a worker: stalls, its log, its progress file."""

import tracemalloc
from types import SimpleNamespace

import pytest

from loraflow import failures
from loraflow.execution import launcher as launch
from loraflow.execution import log_file
from loraflow.execution.log_file import ProgressReader
from loraflow.execution.stall_watch import AwakeClock, StallWatch, _is_progress, _Sample
from loraflow.execution.worker_process import _stall_minutes
from tests.fake_jobs import alive_in_group, job, work_of

pytestmark = pytest.mark.usefixtures("fake_worker")


def test_a_worker_without_progress_is_warned_about_with_its_stacks_then_ended_and_retried(store, caplog):
    submitted = job("sleep", stall_minutes=0.1)
    with pytest.raises(failures.Stalled) as caught:
        launch.run_job(submitted, store)
    assert caught.value.retryable and "runtime.stall_minutes" in caught.value.next_step
    warning = next(record.getMessage() for record in caplog.records if "no progress" in record.getMessage())
    assert "fake_worker.py" in warning and " in run" in warning, warning
    assert "fake_worker.py" in caught.value.got
    assert alive_in_group(int((work_of(store, submitted) / "pid").read_text())) == []


def test_a_stopped_worker_is_named_as_such_and_a_retry_resumes(store, caplog):
    submitted = job("stop-once", stall_minutes=0.05)
    with pytest.raises(failures.Stalled, match="no progress") as caught:
        launch.run_job(submitted, store)
    assert "is stopped by a signal (state T)" in caught.value.got and "kill -CONT" in caught.value.got
    assert any("state T" in record.getMessage() for record in caplog.records)
    assert launch.run_job(submitted.with_runtime(stall_minutes=None), store)


def test_a_worker_that_only_uses_the_processor_is_warned_about_with_its_stacks_and_not_ended(store, caplog):
    assert launch.run_job(job("spin", stall_minutes=0.03), store)
    (warning,) = (record.getMessage() for record in caplog.records if "used the processor" in record.getMessage())
    assert "runtime.silent_minutes" in warning and "fake_worker.py" in warning and " in run" in warning, warning


def test_a_worker_that_only_uses_the_processor_is_ended_after_silent_minutes_if_the_recipe_sets_it(
    tmp_path, monkeypatch
):
    watch, silent = StallWatch(7, tmp_path, None, silent_minutes=1.0), _Sample((), frozenset({7}), 0.0, 0, frozenset())
    monkeypatch.setattr(watch, "_dump_stacks", lambda pids: "")

    def use_the_processor(until, files):
        for second in range(until - 58, until, 3):
            monkeypatch.setattr(
                watch, "_sample", lambda second=second: silent._replace(cpu_seconds=second, files=files)
            )
            watch.check(second)

    use_the_processor(58, ())
    use_the_processor(116, ((1, 1),))  # it reported a batch
    with pytest.raises(failures.Stalled, match="used the processor for 1 minutes") as caught:
        use_the_processor(140, ((1, 1),))
    assert caught.value.retryable and "runtime.silent_minutes" in caught.value.next_step


def test_minutes_in_which_a_worker_waits_are_none_of_silent_minutes(tmp_path, monkeypatch):
    """A worker that waits is left to stall_minutes, and one that computes after it has waited has its whole time."""
    watch, silent = StallWatch(7, tmp_path, 30, silent_minutes=0.05), _Sample((), frozenset({7}), 0, 0, frozenset())
    monkeypatch.setattr(watch, "_dump_stacks", lambda pids: "")

    def check(now, **sample):
        monkeypatch.setattr(watch, "_sample", lambda: silent._replace(**sample))
        watch.check(now)

    for second in range(60):
        check(second)
    for tenth in range(600, 628, 2):
        check(tenth / 10, cpu_seconds=tenth)
    check(62.9, cpu_seconds=700, stopped=frozenset({8}))
    with pytest.raises(failures.Stalled, match="used the processor") as caught:
        check(63.2, cpu_seconds=800, stopped=frozenset({8}))
    assert "process 8 is stopped" in caught.value.got


def test_the_wait_for_other_nodes_is_added_to_both_limits():
    values = {"stall_minutes": 30, "silent_minutes": 20, "rendezvous": {"wait_minutes": 15}}
    alone, of_two_nodes = (SimpleNamespace(job=job("ok", **values), nodes=nodes) for nodes in (1, 2))
    assert (_stall_minutes(alone), _stall_minutes(of_two_nodes)) == ([30, 20], [45, 35])
    assert _stall_minutes(SimpleNamespace(job=job("ok", **values | {"silent_minutes": None}), nodes=2)) == [45, None]


def test_a_suspended_machine_is_not_taken_for_a_stalled_worker(tmp_path):
    times = iter([0.0, 1.0, 100_000.0, 100_001.0])
    clock = AwakeClock(lambda: next(times))
    assert [clock.seconds() for _ in range(3)] == [1.0, 6.0, 7.0]


def test_signs_of_progress_are_output_processes_processor_time_and_reads():
    idle = _Sample(((1, 1),), frozenset({7}), 1.0, 0, frozenset())
    assert not _is_progress(idle, idle._replace(cpu_seconds=1.3), 60.0), "idle threads"
    for change in ({"files": ((2, 1),)}, {"pids": frozenset({7, 8})}, {"cpu_seconds": 2.0}, {"io_bytes": 2**21}):
        assert _is_progress(idle, idle._replace(**change), 60.0), change
    spinning = idle._replace(cpu_seconds=60.0, stopped=frozenset({8}))
    assert not _is_progress(idle, spinning, 60.0), "one of several devices is stopped, and the others wait for it"


def test_a_log_of_3_gb_is_neither_read_whole_nor_kept(store):
    submitted = job("large-log")
    tracemalloc.start()
    try:
        with pytest.raises(failures.Crashed) as caught:
            launch.run_job(submitted, store)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 5000
    logs = [work_of(store, submitted) / name for name in ("log.txt", "log-before.txt")]
    assert sum(path.stat().st_size for path in logs) < 2 * 64 * 2**20
    assert "the last line" in "".join(path.read_text()[-2000:] for path in logs)


def test_what_libraries_and_programs_print_in_a_worker_is_masked_in_its_log(store, monkeypatch):
    monkeypatch.setenv("CANARY", "c4nary-0f-16-token")
    submitted = job("leak")
    with pytest.raises(failures.Crashed) as caught:
        launch.run_job(submitted, store)
    text = (work_of(store, submitted) / "log.txt").read_text()
    assert "c4nary" not in text and "c4nary" not in str(caught.value)
    assert text.count("https://***@host/data.git") >= 4 and "a program: " in text and "the last line" in text
    assert not list(work_of(store, submitted).glob(".*masked"))


def test_progress_is_read_line_by_line_whatever_a_worker_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(log_file, "MAX_PROGRESS", 1000)
    path = tmp_path / "progress.jsonl"
    reader = ProgressReader(path)
    assert reader.new_lines() == []
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert reader.new_lines() == [b'{"step": 1}']
    with path.open("ab") as file:
        file.write(b": 2}\n" + b"x" * 5 * 2**20)
    found = [line for _ in range(10) for line in reader.new_lines()]
    with path.open("ab") as file:
        file.write(b'yz\n{"step": 3}\n')
    found += [line for _ in range(3) for line in reader.new_lines()]
    assert found == [b'{"step": 2}', b'{"step": 3}']
    assert path.stat().st_size < 1000, "what was read is removed when the file is large"
    path.write_bytes(b'{"step": 4}\n')
    assert reader.new_lines() == [b'{"step": 4}']
