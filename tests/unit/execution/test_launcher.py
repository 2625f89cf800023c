"""Run a job in a worker process: its outcome, retries, deadlines, signals and progress. The worker is a fake one."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loraflow import failures
from loraflow.execution import launcher as launch
from loraflow.execution import worker_process
from loraflow.execution.job_file import JobFile
from loraflow.execution.worker_process import _Display
from loraflow.store import LocalStore
from tests.fake_jobs import FAKE, alive_in_group, job, wait_for, work_of

pytestmark = pytest.mark.usefixtures("fake_worker")


def test_a_finished_job_commits_an_artifact_and_leaves_no_work_folder(store):
    seen = []
    submitted = job("fine")
    ref = launch.run_job(submitted, store, seen.append)
    assert (store.path(ref) / "result.txt").read_text() == "done"
    assert [figures["step"] for figures in seen] == [1, 2]
    assert not work_of(store, submitted).exists()
    assert list((store.root / "staging").iterdir()) == []
    assert launch.run_job(submitted, store) == ref


def test_a_worker_computes_scores_where_the_home_cannot_be_written(tmp_path, monkeypatch):
    """`evaluate` writes into two folders of the home. Its error was taken for one of the store."""
    monkeypatch.setenv("HOME", os.devnull)  # no folder, so that root cannot write into it either
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_MODULES_CACHE", "HF_METRICS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    script = (
        "from loraflow.evaluation.metric_modules import compute; print(compute('exact_match', ['a'], ['a']).values)"
    )
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    root = str(Path(__file__).parents[3])
    file = JobFile(job("fine"), tmp_path, {}, tmp_path / "work")
    env = {**worker_process._environment_of(file), "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script], env=env, **options)
    assert "'exact_match': 1.0" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_metrics_find_the_modules_of_a_home_that_can_be_written(tmp_path, monkeypatch):
    """A metric of one's own may load a metric of the hub that is cached there."""
    import evaluate

    from loraflow.evaluation.metric_modules import compute

    folders = {name: str(tmp_path / name) for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE")}
    for name, folder in folders.items():
        monkeypatch.setattr(evaluate.config, name, Path(folder))
    assert compute("exact_match", ["a"], ["a"]).values["exact_match"] == 1.0
    assert {name: str(getattr(evaluate.config, name)) for name in folders} == folders


@pytest.mark.parametrize(
    ("how", "kind", "retryable"),
    [
        ("kill-once", failures.Killed, True),
        ("term-once", failures.Preempted, True),
        ("exit", failures.Crashed, False),
        ("nan", failures.NonFiniteLoss, False),
        ("full", failures.DiskFull, False),
        ("import", failures.MissingExtra, False),
        ("raise", failures.Crashed, False),
    ],
)
def test_each_exit_has_its_failure_class_and_next_step(store, how, kind, retryable):
    submitted = job(how)
    with pytest.raises(failures.Failure) as caught:
        launch.run_job(submitted, store)
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable
    assert caught.value.next_step
    assert list(store.artifacts()) == []
    assert list((store.root / "staging").iterdir()) == [], "nothing half-written is left"
    assert (work_of(store, submitted) / "log.txt").exists(), "the log is still there for a retry or a person"


@pytest.mark.parametrize("how", ["kill-once", "term-once"])
def test_a_second_attempt_resumes_the_work_of_the_first(store, how):
    submitted = job(how)
    with pytest.raises(failures.Failure):
        launch.run_job(submitted, store)
    launch.run_job(submitted, store)
    assert store.find("evaluate", submitted.fingerprint)


def test_a_failed_job_can_be_rerun_by_hand_with_one_command(store):
    submitted = job("nan")
    with pytest.raises(failures.NonFiniteLoss):
        launch.run_job(submitted, store)
    env = {k: v for k, v in os.environ.items() if k != "LORAFLOW_PARENT"}
    done = subprocess.run([*FAKE, str(work_of(store, submitted) / "job.json")], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "loss became nan." in done.stderr


def test_out_of_memory_halves_the_micro_batch(store):
    ref = launch.run_job(job("oom", eval_batch_size=16), store)
    assert (store.path(ref) / "result.txt").read_text() == "2"


def test_a_deadline_ends_the_process_group(store):
    submitted = job("sleep", deadline_minutes=0.1)
    with pytest.raises(failures.DeadlineExceeded):
        launch.run_job(submitted, store)
    assert alive_in_group(int((work_of(store, submitted) / "pid").read_text())) == []


def test_a_worker_that_ignores_sigterm_is_killed(store):
    submitted = job("stubborn", deadline_minutes=0.1)
    started = time.monotonic()
    with pytest.raises(failures.DeadlineExceeded):
        launch.run_job(submitted, store)
    assert time.monotonic() - started < 20
    assert alive_in_group(int((work_of(store, submitted) / "pid").read_text())) == []


LAUNCHER = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from loraflow.execution import launcher as launch
from loraflow.execution import worker_process
from loraflow.store import LocalStore
from loraflow.stages import STAGES
from tests.fake_worker import FAKE_STAGE
from tests.fake_jobs import FAKE, job
STAGES[FAKE_STAGE.name] = FAKE_STAGE
launch.WORKER = FAKE
import signal
signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))
launch.run_job(job("{{how}}", {{options}}), LocalStore("{{root}}"))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_launcher_end_the_worker_and_its_children(tmp_path, how):
    root = tmp_path / "store"
    script = LAUNCHER.format(how="sleep", root=root, options="")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    group = int(wait_for(root / "work" / "evaluate" / job("sleep").fingerprint / "pid"))
    assert len(alive_in_group(group)) >= 2
    process.send_signal(how)
    process.wait(timeout=20)
    for _ in range(100):
        if not alive_in_group(group):
            break
        time.sleep(0.1)
    assert alive_in_group(group) == []


def test_two_runs_of_one_job_compute_it_once(store):
    submitted, found = job("fine"), []
    threads = [
        threading.Thread(target=lambda: found.append(launch.run_job(submitted, LocalStore(store.root))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert len(list(store.artifacts())) == 1


def test_the_worker_imports_no_prefect():
    code = "import loraflow.execution.worker, loraflow.stages, sys; assert not {'prefect', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_failures_survive_serialization_between_processes():
    import pickle

    failure = failures.BadData("what", where="w", expected="e", got="g", next_step="n", row=3)
    for copy in (failures.from_dict(failure.to_dict()), pickle.loads(pickle.dumps(failure))):
        assert type(copy) is failures.BadData and str(copy) == str(failure) and copy.details == {"row": 3}


def test_a_forced_computation_resumes(store):
    submitted = job("kill-once")
    with pytest.raises(failures.Killed):
        launch.run_job(submitted, store)
    first = launch.run_job(submitted, store)
    with pytest.raises(failures.Killed):  # forced: it starts from scratch
        launch.run_job(submitted, store, force=True)
    assert (work_of(store, submitted) / "attempts").read_text() == "1"
    assert launch.run_job(submitted, store, force=True) == first, "the retry resumes the forced attempt"


def test_an_error_in_the_progress_callback_does_not_end_the_job_and_is_logged_once(store, caplog, monkeypatch):
    def broken(figures):
        raise ConnectionError("the server is unavailable")

    assert launch.run_job(job("fine"), store, broken)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    display, now, calls = _Display(lambda figures: (calls.append(figures), broken(figures))), 100.0, []
    caplog.clear()
    display.show([b'{"step": 1}', b'{"step": 2}'])
    now = 161.0
    display.show([b'{"step": 3}'])
    assert calls == [{"step": 1}, {"step": 3}], "a call may take half a minute, so there is none for a minute"
    assert [record.getMessage() for record in caplog.records] == [
        "progress is not shown for a minute: ConnectionError: the server is unavailable"
    ]


def test_the_time_of_a_run_ends_in_a_failure_that_is_not_retried_and_resumes(store):
    submitted = job("stubborn", max_hours=5 / 3600, grace_seconds=1.0)
    started = time.time()
    with pytest.raises(failures.BudgetSpent) as caught:
        launch.run_job(submitted, store)
    assert isinstance(caught.value, failures.Preempted) and not caught.value.retryable
    assert caught.value.details["saved"] is False
    assert "resumes" in caught.value.next_step and time.time() - started < 60
    with pytest.raises(failures.BudgetSpent):  # the next stage of the same run does not start
        launch.run_job(job("fine", max_hours=1), store, run_started=started - 3600)
    assert launch.run_job(job("fine", max_hours=1), store)


def test_a_worker_that_is_done_within_the_grace_period_has_its_result_committed(store, monkeypatch):
    pid = store.root / "work" / "evaluate" / job("late").fingerprint / "pid"
    checks = []

    def is_over(submitted, ends):
        if pid.exists():
            checks.append(ends)
            raise failures.BudgetSpent("The run reached its time limit.")

    monkeypatch.setattr(worker_process, "check_budget", is_over)
    ref = launch.run_job(job("late", max_hours=1, grace_seconds=60.0), store)
    assert len(checks) == 1 and store.verify(ref) == []


@pytest.mark.parametrize("how", ["swallow", "rename"])
def test_a_result_that_the_request_to_stop_has_changed_is_not_committed(store, monkeypatch, how):
    """A metric with `except Exception: return 0.0` catches Preempted, wherever the worker is asked to stop."""
    work = work_of(store, job(how))

    def is_over(submitted, ends):
        if (work / "pid").exists():
            raise failures.BudgetSpent("The run reached its time limit.")

    with monkeypatch.context() as patch, pytest.raises(failures.BudgetSpent):
        patch.setattr(worker_process, "check_budget", is_over)
        launch.run_job(job(how, max_hours=1, grace_seconds=60.0), store)
    assert list(store.artifacts()) == []
    (work / "pid").unlink()
    preempt = threading.Thread(target=lambda: os.kill(int(wait_for(work / "pid")), signal.SIGTERM))
    preempt.start()
    with pytest.raises(failures.Preempted) as caught:  # also without a limit: a machine that is taken away
        launch.run_job(job(how), store)
    preempt.join()
    assert caught.value.retryable and list(store.artifacts()) == []


def test_a_second_interruption_kills_the_worker_at_once(tmp_path):
    root = tmp_path / "store"
    script = LAUNCHER.format(how="stubborn", root=root, options="grace_seconds=300.0")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    group = int(wait_for(root / "work" / "evaluate" / job("stubborn").fingerprint / "pid"))
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None and alive_in_group(group), "the worker may still save a checkpoint"
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    assert alive_in_group(group) == []


def test_a_line_that_is_not_json_does_not_stop_the_progress_and_another_kind_of_error_is_logged(monkeypatch, caplog):
    shown, errors, now = [], [], [0.0]
    monkeypatch.setattr("loraflow.execution.worker_process.time.monotonic", lambda: now[0])

    def show(figures):
        shown.append(figures["step"])
        if errors:
            raise errors.pop()

    display = _Display(show)
    display.show([b'{"step": 1}', b"a warning of a library", b"\xff", b'{"step": 2}'])
    assert shown == [1, 2]
    errors.append(ValueError("bad"))
    display.show([b'{"step": 3}', b'{"step": 4}'])
    now[0] += 61
    errors.append(KeyError("other"))
    display.show([b'{"step": 5}'])
    now[0] += 61
    errors.append(KeyError("again"))
    display.show([b'{"step": 6}'])
    assert shown == [1, 2, 3, 5, 6]
    messages = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[1] for text in messages] == [
        "JSONDecodeError",
        "UnicodeDecodeError",
        "ValueError",
        "KeyError",
    ]
