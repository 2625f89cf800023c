import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from loraflow import failures
from loraflow.config import Runtime
from loraflow.execution import launcher as launch
from loraflow.execution import log_file
from loraflow.execution.classify import classify
from loraflow.execution.log_file import ProgressReader
from loraflow.execution.stall_watch import AwakeClock, _is_progress, _Sample
from loraflow.execution.worker_process import _Display
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
    for _ in range(1200):  # a minute: on a loaded machine a process takes many seconds to start
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
    one = job("sleep", deadline_minutes=0.1)
    with pytest.raises(failures.DeadlineExceeded):
        launch.run_job(one, store)
    assert alive_in_group(int((work_of(store, one) / "pid").read_text())) == []


def test_a_worker_that_ignores_sigterm_is_killed(store):
    one = job("stubborn", deadline_minutes=0.1)
    started = time.monotonic()
    with pytest.raises(failures.DeadlineExceeded):
        launch.run_job(one, store)
    assert time.monotonic() - started < 20
    assert alive_in_group(int((work_of(store, one) / "pid").read_text())) == []


LAUNCHER = f"""
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
    with pytest.raises(failures.Killed):  # forced: it starts from scratch
        launch.run_job(one, store, force=True)
    assert (work_of(store, one) / "attempts").read_text() == "1"
    assert launch.run_job(one, store, force=True) == first, "the retry resumes the forced attempt"


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
    assert [record.getMessage() for record in caplog.records] == ["progress is not shown: the server is unavailable"]


@pytest.mark.parametrize("how", ["fsize", "no-outcome"])
def test_a_worker_that_cannot_write_says_so_even_if_its_outcome_has_no_room(store, how):
    one = job(how)
    with pytest.raises(failures.DiskFull) as caught:
        launch.run_job(one, store)
    assert caught.value.where.startswith(str(store.root))
    assert "free" in caught.value.got and caught.value.expected and "run again" in caught.value.next_step
    assert len(str(caught.value).splitlines()) == 5
    assert list((store.root / "staging").iterdir()) == []


def test_a_full_disk_in_a_checkpoint_names_its_size_and_training_resumes_from_the_one_before(store):
    one = job("checkpoint")
    with pytest.raises(failures.DiskFull) as caught:
        launch.run_job(one, store)
    assert "about 1.0 MiB for a checkpoint, as checkpoint-2 has" in caught.value.expected
    assert "resumes from checkpoint-2" in caught.value.next_step
    checkpoints = work_of(store, one) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"], "the one that was cut off takes no space"
    assert launch.run_job(one, store)


def test_a_real_full_disk_is_named_by_the_stage_that_fills_it(tmp_path):
    """On a file system of 2 MiB: the worker can write neither its outcome nor its log."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent.parent.parent)!r})
from loraflow import failures
from loraflow.execution import launcher as launch
from loraflow.store import LocalStore
from loraflow.stages import STAGES
from tests.fake_worker import FAKE_STAGE
from tests.unit.test_launcher import FAKE, job
STAGES[FAKE_STAGE.name] = FAKE_STAGE
launch.WORKER = FAKE
try:
    launch.run_job(job("fill"), LocalStore({str(disk)!r}))
except failures.DiskFull as failure:
    print("named", failure.got)
next(Path({str(disk)!r}).rglob("large")).unlink()
print(launch.run_job(job("fine"), LocalStore({str(disk)!r})).stage)
"""
    command = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=2m none "$1" && exec "$2" -c "$3"']
    done = subprocess.run([*command, "sh", str(disk), sys.executable, script], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()[:80]}")
    assert done.stdout.split() == ["named", "0.0", "MiB", "free", "evaluate"], done.stderr


SAFETENSORS = "Error while serializing: I/O error: No space left on device (os error 28)"
ARROW = "[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"
TORCH = "[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SafetensorError(SAFETENSORS), failures.DiskFull),
        (OSError(ARROW), failures.DiskFull),
        (OSError(28, "full"), failures.DiskFull),
        (OSError(122, "quota"), failures.DiskFull),
        (RuntimeError("Disk quota exceeded (os error 122)"), failures.DiskFull),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), failures.DiskFull),
        (RuntimeError("read failed: Input/output error (os error 5)"), failures.StorageError),
        (RuntimeError("Too many open files"), failures.Failure),
        (ImportError("x", name="y"), failures.MissingExtra),
        (RuntimeError(TORCH), failures.Crashed),
    ],
)
def test_an_exception_is_classified_by_its_number_or_its_text(tmp_path, error, kind):
    failure = classify(error, "train", [tmp_path])
    assert type(failure) is kind and len(str(failure).splitlines()) <= 5
    if kind is failures.DiskFull:
        assert failure.where.startswith("/") and "free" in failure.got and failure.next_step


REAL_WRITES = """
import sys
from pathlib import Path
import numpy, pyarrow, torch
from pyarrow import parquet
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[2])
from loraflow.execution.classify import classify
folder, large = Path(sys.argv[1]), torch.ones(1_000_000)
table = pyarrow.table({"x": numpy.random.rand(1_000_000)})
for write in (
    lambda: torch.save(large, folder / "optimizer.pt"),
    lambda: save_file({"x": large}, folder / "adapter_model.safetensors"),
    lambda: parquet.write_table(table, folder / "rows.parquet"),
    lambda: numpy.save(folder / "rows.npy", large.numpy()),
):
    try:
        write()
    except Exception as error:
        print(type(classify(error, "train", [folder])).__name__)
    for file in folder.iterdir():
        file.unlink()
"""


def test_what_torch_safetensors_arrow_and_numpy_raise_on_a_real_full_disk_is_recognized(tmp_path):
    command = ["unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1" "$4"']
    arguments = ["sh", str(tmp_path), sys.executable, REAL_WRITES, str(Path(__file__).parents[2])]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()[:80]}")
    assert done.stdout.split() == ["DiskFull"] * 4, done.stderr


def test_a_failed_write_of_torch_means_a_full_disk_where_the_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=4096, f_files=9, f_favail=9))
    failure = classify(RuntimeError(TORCH), "train", [tmp_path])
    assert type(failure) is failures.DiskFull and failure.where == str(tmp_path) and "0.0 MiB free" in failure.got


def test_a_full_disk_that_a_library_wrapped_is_found_in_the_chain(tmp_path):
    try:
        try:
            raise OSError(28, "No space left on device", str(tmp_path / "data.arrow"))
        except OSError as error:
            raise ValueError("An error occurred while generating the dataset") from error
    except ValueError as error:
        assert classify(error, "tokenize", [tmp_path]).where == str(tmp_path / "data.arrow")


def test_an_exception_that_was_handled_before_does_not_classify_the_next_one():
    try:
        try:
            raise PermissionError(13, "Permission denied", "/cache")
        except PermissionError:
            raise TypeError("a bug")  # noqa: B904
    except TypeError as error:
        assert type(classify(error, "train")) is failures.Crashed


def test_a_full_disk_is_reported_before_the_job_starts(store, monkeypatch, tmp_path):
    import shutil

    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"0" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    values = Runtime().model_dump() | {"origin": {"folder": str(tmp_path / "base")}}
    config = {"source": {}, "repack": None, "trust_remote_code": False}
    with pytest.raises(failures.DiskFull, match="more disk space"):
        launch.run_job(Job(stage="resolve_base", version=1, config=config, runtime=values), store)


def test_a_worker_without_progress_is_warned_about_with_its_stacks_then_ended_and_retried(store, caplog):
    one = job("sleep", stall_minutes=0.1)
    with pytest.raises(failures.Stalled) as caught:
        launch.run_job(one, store)
    assert caught.value.retryable and "runtime.stall_minutes" in caught.value.next_step
    warning = next(record.getMessage() for record in caplog.records if "no progress" in record.getMessage())
    assert "fake_worker.py" in warning and " in run" in warning, warning
    assert "fake_worker.py" in caught.value.got
    assert alive_in_group(int((work_of(store, one) / "pid").read_text())) == []


def test_a_stopped_worker_is_named_as_such_and_a_retry_resumes(store, caplog):
    one = job("stop-once", stall_minutes=0.05)
    with pytest.raises(failures.Stalled, match="no progress") as caught:
        launch.run_job(one, store)
    assert "is stopped by a signal (state T)" in caught.value.got and "kill -CONT" in caught.value.got
    assert any("state T" in record.getMessage() for record in caplog.records)
    assert launch.run_job(one.with_runtime(stall_minutes=None), store)


def test_a_worker_that_only_uses_the_processor_is_warned_about_with_its_stacks_and_not_ended(store, caplog):
    assert launch.run_job(job("spin", stall_minutes=0.03), store)
    (warning,) = (record.getMessage() for record in caplog.records if "used the processor" in record.getMessage())
    assert "runtime.deadline_minutes" in warning and "fake_worker.py" in warning and " in run" in warning, warning


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
    one = job("large-log")
    tracemalloc.start()
    try:
        with pytest.raises(failures.Crashed) as caught:
            launch.run_job(one, store)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 5000
    logs = [work_of(store, one) / name for name in ("log.txt", "log-before.txt")]
    assert sum(path.stat().st_size for path in logs) < 2 * 64 * 2**20
    assert "the last line" in "".join(path.read_text()[-2000:] for path in logs)


def test_what_libraries_and_programs_print_in_a_worker_is_masked_in_its_log(store, monkeypatch):
    monkeypatch.setenv("CANARY", "c4nary-0f-16-token")
    one = job("leak")
    with pytest.raises(failures.Crashed) as caught:
        launch.run_job(one, store)
    text = (work_of(store, one) / "log.txt").read_text()
    assert "c4nary" not in text and "c4nary" not in str(caught.value)
    assert text.count("https://***@host/data.git") >= 4 and "a program: " in text and "the last line" in text
    assert not list(work_of(store, one).glob(".*masked"))


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


def test_the_time_of_a_run_ends_in_a_failure_that_is_not_retried_and_resumes(store):
    one = job("stubborn", max_hours=5 / 3600, grace_seconds=1.0)
    started = time.time()
    with pytest.raises(failures.BudgetSpent) as caught:
        launch.run_job(one, store)
    assert isinstance(caught.value, failures.Preempted) and not caught.value.retryable
    assert caught.value.details["saved"] is False
    assert "resumes" in caught.value.next_step and time.time() - started < 60
    with pytest.raises(failures.BudgetSpent):  # the next stage of the same run does not start
        launch.run_job(job("fine", max_hours=1), store, run_started=started - 3600)
    assert launch.run_job(job("fine", max_hours=1), store)


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
