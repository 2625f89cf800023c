import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from loraflow import failures
from loraflow.config import Runtime
from loraflow.execution import launcher as launch
from loraflow.job import Job
from loraflow.stages import STAGES
from loraflow.store import LocalStore
from tests.fake_worker import FAKE_STAGE

FAKE = [sys.executable, str(Path(__file__).parent.parent / "fake_worker.py")]


@pytest.fixture(autouse=True)
def fake_worker(monkeypatch):
    monkeypatch.setattr(launch, "WORKER", FAKE)
    monkeypatch.setitem(STAGES, FAKE_STAGE.name, FAKE_STAGE)


def job(how: str, **runtime) -> Job:
    values = Runtime().model_dump() | {"grace_seconds": 1.0} | runtime
    return Job(stage=FAKE_STAGE.name, version=1, config={"how": how}, runtime=values)


def work_of(store: LocalStore, one: Job) -> Path:
    return store.root / "work" / one.stage / one.fingerprint


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.exists() and path.read_text():
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def alive_in_group(group: int) -> list[str]:
    rows = subprocess.run(["ps", "-eo", "pgid,stat,cmd"], capture_output=True, text=True).stdout.splitlines()
    return [row for row in rows if row.split()[0] == str(group) and not row.split()[1].startswith("Z")]


@pytest.fixture
def store(tmp_path):
    return LocalStore(tmp_path / "store")


def test_a_finished_job_commits_an_artifact_and_leaves_no_work_folder(store):
    seen = []
    one = job("fine")
    ref = launch.run_job(one, store, seen.append)
    assert (store.path(ref) / "result.txt").read_text() == "done"
    assert [figures["step"] for figures in seen] == [1, 2]
    assert not work_of(store, one).exists()
    assert list((store.root / "staging").iterdir()) == []
    assert launch.run_job(one, store) == ref


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
    one = job(how)
    with pytest.raises(failures.Failure) as caught:
        launch.run_job(one, store)
    assert type(caught.value) is kind
    assert caught.value.retryable is retryable
    assert caught.value.next_step
    assert list(store.artifacts()) == []
    assert list((store.root / "staging").iterdir()) == [], "nothing half-written is left"
    assert (work_of(store, one) / "log.txt").exists(), "the log is still there for a retry or a person"


@pytest.mark.parametrize("how", ["kill-once", "term-once"])
def test_a_second_attempt_resumes_the_work_of_the_first(store, how):
    one = job(how)
    with pytest.raises(failures.Failure):
        launch.run_job(one, store)
    launch.run_job(one, store)
    assert store.find("evaluate", one.fingerprint)


def test_a_failed_job_can_be_rerun_by_hand_with_one_command(store):
    one = job("nan")
    with pytest.raises(failures.NonFiniteLoss):
        launch.run_job(one, store)
    env = {k: v for k, v in os.environ.items() if k != "LORAFLOW_PARENT"}
    done = subprocess.run([*FAKE, str(work_of(store, one) / "job.json")], capture_output=True, text=True, env=env)
    assert done.returncode == 1
    assert "loss became nan." in done.stderr


def test_out_of_memory_halves_the_micro_batch(store):
    ref = launch.run_job(job("oom", eval_batch_size=16), store)
    assert (store.path(ref) / "result.txt").read_text() == "2"


def test_a_deadline_ends_the_process_group(store):
    one = job("sleep", deadline_minutes=0.03)
    with pytest.raises(failures.DeadlineExceeded):
        launch.run_job(one, store)
    assert alive_in_group(int((work_of(store, one) / "pid").read_text())) == []


def test_a_worker_that_ignores_sigterm_is_killed(store):
    one = job("stubborn", deadline_minutes=0.03)
    started = time.monotonic()
    with pytest.raises(failures.DeadlineExceeded):
        launch.run_job(one, store)
    assert time.monotonic() - started < 15
    assert alive_in_group(int((work_of(store, one) / "pid").read_text())) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_to_the_launcher_end_the_worker_and_its_children(tmp_path, how):
    root = tmp_path / "store"
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from loraflow.execution import launcher as launch
from loraflow.store import LocalStore
from loraflow.stages import STAGES
from tests.fake_worker import FAKE_STAGE
from tests.unit.test_launcher import FAKE, job
STAGES[FAKE_STAGE.name] = FAKE_STAGE
launch.WORKER = FAKE
import signal
signal.signal(signal.SIGTERM, lambda *a: sys.exit(143))
launch.run_job(job("sleep"), LocalStore({str(root)!r}))
"""
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
    one, found = job("fine"), []
    threads = [
        threading.Thread(target=lambda: found.append(launch.run_job(one, LocalStore(store.root)))) for _ in range(2)
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
    one = job("kill-once")
    with pytest.raises(failures.Killed):
        launch.run_job(one, store)
    first = launch.run_job(one, store)
    with pytest.raises(failures.Killed):  # forced: it begins anew, as if nothing had been computed
        launch.run_job(one, store, force=True)
    assert (work_of(store, one) / "attempts").read_text() == "1"
    assert launch.run_job(one, store, force=True) == first, "the retry resumes the forced attempt"


def test_an_error_in_the_progress_callback_does_not_end_the_job(store):
    def broken(figures):
        raise ConnectionError("the server is unavailable")

    assert launch.run_job(job("fine"), store, broken)


def test_a_full_disk_is_reported_before_the_job_starts(store, monkeypatch, tmp_path):
    import shutil
    from types import SimpleNamespace

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    values = Runtime().model_dump() | {"origin": {"folder": str(tmp_path / "base")}}
    config = {"source": {}, "repack": None, "trust_remote_code": False}
    with pytest.raises(failures.DiskFull, match="more disk space"):
        launch.run_job(Job(stage="resolve_base", version=1, config=config, runtime=values), store)
