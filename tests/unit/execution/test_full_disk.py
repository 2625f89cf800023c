"""A full disk is recognized, whatever library reports it, and named with what is needed."""

import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from loraflow import failures
from loraflow.config import Runtime
from loraflow.execution import launcher as launch
from loraflow.execution.classify import classify
from loraflow.execution.outcome import FILE, read_outcome, report_outcome
from loraflow.job import Job
from loraflow.store import Summary
from tests.fake_jobs import job, work_of

pytestmark = pytest.mark.usefixtures("fake_worker")


@pytest.mark.parametrize("how", ["fsize", "no-outcome"])
def test_a_worker_that_cannot_write_says_so_even_if_its_outcome_has_no_room(store, how):
    submitted = job(how)
    with pytest.raises(failures.DiskFull) as caught:
        launch.run_job(submitted, store)
    assert caught.value.where.startswith(str(store.root))
    assert "free" in caught.value.got and caught.value.expected and "run again" in caught.value.next_step
    assert len(str(caught.value).splitlines()) == 5
    assert list((store.root / "staging").iterdir()) == []


def test_a_full_disk_in_a_checkpoint_names_its_size_and_training_resumes_from_the_one_before(store):
    submitted = job("checkpoint")
    with pytest.raises(failures.DiskFull) as caught:
        launch.run_job(submitted, store)
    assert "about 1.0 MiB for a checkpoint, as checkpoint-2 has" in caught.value.expected
    assert "resumes from checkpoint-2" in caught.value.next_step
    checkpoints = work_of(store, submitted) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"], "the one that was cut off takes no space"
    assert launch.run_job(submitted, store)


@pytest.mark.parametrize("damage", ["mkdir", "symlink_to"])
def test_a_lock_that_cannot_be_taken_does_not_replace_the_full_disk_that_is_explained(store, tmp_path, damage):
    getattr(tmp_path / "worker.lock", damage)(*["/nowhere"] * (damage == "symlink_to"))
    full = failures.DiskFull("The disk is full.", where=str(tmp_path))
    launch.explain_disk_full(full, job("ok"), store, tmp_path / "staged", tmp_path)
    assert "that the job had written" in full.expected


def test_a_real_full_disk_is_named_by_the_stage_that_fills_it(tmp_path):
    """On a file system of 2 MiB: the worker can write neither its outcome nor its log."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from loraflow import failures
from loraflow.execution import launcher as launch
from loraflow.store import LocalStore
from loraflow.stages import STAGES
from tests.fake_worker import FAKE_STAGE
from tests.fake_jobs import FAKE, job
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


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.EIO, failures.StorageError), (errno.ENOSPC, failures.DiskFull), (errno.EMFILE, failures.Failure)],
)
def test_an_outcome_that_was_written_and_could_not_be_flushed_is_the_disks_error(tmp_path, monkeypatch, number, kind):
    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    file = SimpleNamespace(work=tmp_path, out=tmp_path / "out", job=SimpleNamespace(stage="tokenize", short="abc"))
    reader, writer = os.pipe()
    monkeypatch.setattr("loraflow.store.files.fsync_path", fail)
    reported = report_outcome(file, FILE, writer, None, Summary())
    with pytest.raises(failures.Failure) as caught:
        read_outcome(file, reader, 1, oom_killed=False)
    os.close(reader)
    os.close(writer)
    assert (tmp_path / FILE).exists() and type(caught.value) is type(reported) is kind
    assert str(caught.value) == str(reported) and caught.value.where == str(tmp_path)


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
    arguments = ["sh", str(tmp_path), sys.executable, REAL_WRITES, str(Path(__file__).parents[3])]
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


def test_a_disk_that_is_full_while_dvc_reads_a_dataset_is_not_reported_as_missing_data(tmp_path):
    from loraflow.data.versions.dvc_storage import _translate_errors

    pin = SimpleNamespace(path="data", md5="0" * 32)
    with pytest.raises(failures.DiskFull), _translate_errors(str(tmp_path), pin, None, None):
        raise OSError(28, "No space left on device", str(tmp_path / "rows.jsonl"))
    with pytest.raises(failures.MissingData), _translate_errors(str(tmp_path), pin, None, None):
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "rows.jsonl"))
    with pytest.raises(failures.StorageError), _translate_errors(str(tmp_path), pin, None, None):
        raise sqlite3.OperationalError("database or disk is full")  # of DVC's own files
