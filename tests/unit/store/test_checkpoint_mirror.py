"""The newest checkpoint of an unfinished job in the bucket: another machine resumes from it, and only from a valid one."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from loraflow.execution import launcher as launch
from loraflow.registry.cleanup import remove_unused
from loraflow.store import Ref
from loraflow.store import bucket as buckets
from loraflow.store import checkpoint_mirror as mirror
from loraflow.store.checkpoints import FOLDER, finalize_checkpoint
from loraflow.store.s3 import S3Store
from tests.s3_proxy import Answer, Proxy, Request, s3_proxy  # noqa: F401
from tests.unit.execution.test_devices import base, job_of, result, shards, store_of  # noqa: F401
from tests.unit.training.test_training import same

ROOT = Path(__file__).parents[3]
JOB = ("train", "f" * 64)
PREFIX = f"work/train/{'f' * 64}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.05)


@pytest.fixture
def machine(bucket_uri, tmp_path, monkeypatch):
    """Open the store as the machine of some name: each has its own cache."""

    def machine(name: str, kind=S3Store):
        monkeypatch.setenv("LORAFLOW_CACHE", str(tmp_path / f"cache of {name}"))
        return kind(bucket_uri)

    return machine


def save(work: Path, step: int, content: str = "", needs: int | None = None) -> Path:
    """Save and finalize a checkpoint as the trainer does."""
    folder = work / FOLDER / f"checkpoint-{step}"
    (folder / "sub").mkdir(parents=True)
    (folder / "weights").write_text(content or f"of step {step}")
    (folder / "sub" / "more").write_text("more")
    finalize_checkpoint(folder, f"checkpoint-{needs}" if needs else None)
    return folder


def names(work: Path) -> list[str]:
    return sorted(path.name for path in (work / FOLDER).glob("*"))


def in_bucket(store) -> set[str]:
    """Return the names of checkpoints that have a file in the bucket."""
    below = f"{PREFIX}/{FOLDER}/"
    return {found.key.removeprefix(below).split("/")[0] for found in store.bucket.listing(below)}


def wait_until(condition) -> None:
    for _ in range(2400):  # a busy machine takes half a minute to begin a training
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("the condition never became true")


def attempt(store, *steps, recompute_of: Ref | None = None, **options) -> Path:
    """Run an attempt that saves checkpoints and fails."""
    work = store.work_folder(*JOB, recompute_of)
    with pytest.raises(RuntimeError), store.mirror_checkpoints(*JOB):
        for step in steps:
            save(work, step, **options)
        raise RuntimeError
    return work


def test_each_new_checkpoint_replaces_the_older_one_in_the_bucket(machine):
    store = machine("one")
    work = store.work_folder(*JOB)
    with store.mirror_checkpoints(*JOB):
        for step in (2, 4):
            save(work, step)
            wait_until(lambda step=step: in_bucket(store) == {f"checkpoint-{step}"})
    two = machine("two").work_folder(*JOB)
    assert names(two) == ["checkpoint-4"]
    assert (two / FOLDER / "checkpoint-4" / "weights").read_text() == "of step 4"
    store.remove_work_folder(*JOB)
    assert not work.exists() and list(store.bucket.listing("work/")) == []


def test_the_last_checkpoint_is_uploaded_if_the_attempt_fails_and_not_if_it_succeeds(machine, monkeypatch):
    monkeypatch.setattr(mirror, "POLL_SECONDS", 60.0)
    attempt(machine("one"), 2)
    assert in_bucket(machine("one")) == {"checkpoint-2"}
    store = machine("two")
    with store.mirror_checkpoints(*JOB):
        save(store.work_folder(*JOB), 4)
    assert in_bucket(store) == {"checkpoint-2"}


def puts(proxy: Proxy) -> list[str]:
    """Return the keys of the files that were written below the job's prefix, relative to it."""
    written = (request.key.partition(f"{PREFIX}/") for request in proxy.requests if request.operation == "PutObject")
    return [name for _, found, name in written if found]


def test_a_finished_job_does_not_wait_for_the_rest_of_an_upload(machine, proxy):
    begun, done = threading.Event(), threading.Event()

    def slow(request: Request) -> None:
        if request.operation == "PutObject":
            begun.set()
            assert done.wait(20)

    proxy.fault = slow
    store = machine("one")
    with store.mirror_checkpoints(*JOB):
        save(store.work_folder(*JOB), 2)
        assert begun.wait(20)
        threading.Timer(0.5, done.set).start()
    assert len(puts(proxy)) == 1, "a checkpoint has two files"


def test_the_checkpoint_that_a_resume_needs_is_downloaded_too(machine):
    """The best checkpoint so far, with load_best_model_at_end; what that one needed in its time is not asked for."""
    work = attempt(machine("one"), 2)
    best = save(work, 4, needs=2)
    shutil.rmtree(work / FOLDER / "checkpoint-2")
    attempt(machine("one"), 6, needs=4)
    two = machine("two").work_folder(*JOB)
    assert names(two) == ["checkpoint-4", "checkpoint-6"]
    assert (two / FOLDER / "checkpoint-4" / "weights").read_text() == (best / "weights").read_text()
    by_age = sorted((two / FOLDER).iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in by_age] == ["checkpoint-4", "checkpoint-6"], "the trainer removes the older one first"


def test_a_newer_local_checkpoint_is_used_and_an_older_one_is_not(machine):
    attempt(machine("one"), 4)
    two = machine("two")
    save(two.scratch / PREFIX, 6, "mine")
    assert names(two.work_folder(*JOB)) == ["checkpoint-6"], "nothing was fetched"
    three = machine("three")
    save(three.scratch / PREFIX, 2, "mine")
    assert "checkpoint-4" in names(three.work_folder(*JOB))


@pytest.mark.parametrize("harm", ["flipped", "missing", "not finalized", "outside", "no manifest"])
def test_an_incomplete_checkpoint_in_the_bucket_is_not_used(machine, harm, caplog, tmp_path):
    store = machine("one")
    attempt(store, 4)
    prefix = f"{PREFIX}/{FOLDER}/checkpoint-4"
    if harm == "flipped":
        store.bucket.put(f"{prefix}/weights", b"of step 5")
    elif harm == "missing":
        store.bucket.delete([f"{prefix}/sub/more"])
    elif harm == "not finalized":
        store.bucket.delete([f"{prefix}/complete.json"])
    elif harm == "outside":
        manifest = {"files": {"../../../../stray": "0" * 64}, "needs": None}
        store.bucket.put(f"{prefix}/complete.json", json.dumps(manifest).encode())
        store.bucket.put(f"{PREFIX}/stray", b"stray")
    else:
        store.bucket.put(f"{prefix}/complete.json", b"[]")
    two = machine("two").work_folder(*JOB)
    assert names(two) == [] and [path.name for path in two.iterdir() if path.name != FOLDER] == []
    assert ("is incomplete and not used" in caplog.text) == (harm != "not finalized")
    assert list(tmp_path.rglob("stray")) == []


def test_only_attempts_that_recompute_the_same_artifact_resume_from_each_other(machine):
    first, second = (Ref(stage="train", fingerprint=JOB[1], digest=digest * 64, uri="") for digest in "ab")
    attempt(machine("one"), 2, content="not forced")
    folder = attempt(machine("one"), 4, recompute_of=first)
    assert names(folder) == ["checkpoint-4"], "the earlier checkpoints are of another computation"
    assert names(machine("two").work_folder(*JOB, first)) == ["checkpoint-4"]
    assert names(machine("two").work_folder(*JOB, second)) == []
    two = attempt(machine("two"), 3, recompute_of=second, content="over the second")
    assert names(two) == ["checkpoint-3"]
    again = machine("one").work_folder(*JOB, second)
    assert names(again) == ["checkpoint-3"], "its own checkpoint of step 4 is of an older computation"


def test_no_attempt_resumes_from_a_computation_finished_on_another_machine(machine):
    """The second machine's result has the digest of the first one's: a third force is over the same artifact again."""
    ref = Ref(stage="train", fingerprint=JOB[1], digest="a" * 64, uri="")
    attempt(machine("one"), 4, recompute_of=ref)
    two = machine("two")
    assert names(two.work_folder(*JOB, ref)) == ["checkpoint-4"]
    two.remove_work_folder(*JOB)
    assert names(machine("one").work_folder(*JOB, ref)) == []


def test_training_continues_if_the_bucket_refuses_checkpoints(machine, proxy, caplog):
    proxy.fault = lambda request: Answer(403, "AccessDenied") if request.operation == "PutObject" else None
    store = machine("one")
    work = store.work_folder(*JOB)
    with store.mirror_checkpoints(*JOB):
        save(work, 2)
        wait_until(lambda: "not uploaded" in caplog.text)
    assert caplog.text.count("not uploaded") == 1


def rotating(work: Path, steps: range, every: float) -> list[str]:
    """Save checkpoints and remove older ones, as the trainer does with a save_total_limit of 2; return all names."""
    saved: list[Path] = []
    for step in steps:
        saved.append(save(work, step))
        for old in saved[-3:-2]:
            shutil.rmtree(old)
        time.sleep(every)
    return [path.name for path in saved]


@pytest.mark.parametrize("links", [True, False])
def test_checkpoints_that_are_removed_faster_than_an_upload_are_uploaded_too(
    machine, proxy, monkeypatch, caplog, links
):
    """Each is removed before its upload ends, so without links no upload would be complete."""
    store = machine("one")
    work = store.work_folder(*JOB)

    def slow(request: Request) -> None:
        _, found, name = request.key.partition(f"{PREFIX}/")
        until = time.monotonic() + 0.8
        while found and request.operation == "PutObject" and (work / name).exists() and time.monotonic() < until:
            time.sleep(0.02)

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    proxy.fault = slow
    if not links:  # then at least the last one
        monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(RuntimeError), store.mirror_checkpoints(*JOB):
        last = rotating(work, range(2, 18, 2), 0.15)[-1]
        during = sum(name.endswith("/complete.json") for name in puts(proxy))
        raise RuntimeError
    assert (during > 0) == links, "not only the last one was uploaded"
    assert in_bucket(store) == {last} and names(machine("two").work_folder(*JOB)) == [last]
    assert list(work.glob(".upload-*")) == [] and "not uploaded" not in caplog.text


def test_temporary_folders_of_a_killed_attempt_are_removed(machine):
    store = machine("one")
    for name in (".fetch-1", ".upload-1"):
        (store.work_folder(*JOB) / name / "checkpoint-2").mkdir(parents=True)
    assert list(store.work_folder(*JOB).glob(".*")) == []


def test_a_checkpoint_is_uploaded_once_the_bucket_is_back(machine, proxy, monkeypatch, caplog):
    """The next checkpoint may be hours later."""
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 0.0)
    unavailable = threading.Event()
    unavailable.set()
    proxy.fault = lambda request: (
        Answer(503, "SlowDown") if unavailable.is_set() and request.operation == "PutObject" else None
    )
    store = machine("one")
    with store.mirror_checkpoints(*JOB):
        save(store.work_folder(*JOB), 2)
        wait_until(lambda: "not in the bucket yet" in caplog.text)
        unavailable.clear()
        wait_until(lambda: in_bucket(store) == {"checkpoint-2"})


def test_an_interrupted_upload_is_not_resumed_with_other_content(machine, proxy, monkeypatch, caplog):
    """The upload carries the hash of the dead machine's file, and other bits of the same step would never arrive."""
    monkeypatch.setattr(buckets, "PART_SIZE", 5 * 2**20)
    proxy.fault = lambda request: Answer(400, "InvalidRequest") if request.part == 2 else None
    attempt(machine("one"), 2, content="a" * (6 * 2**20))
    assert len(buckets.unfinished_uploads(machine("one").bucket, f"{PREFIX}/")) == 1
    proxy.fault = lambda request: None
    caplog.clear()
    attempt(machine("two"), 2, content="b" * (6 * 2**20))
    three = machine("three").work_folder(*JOB)
    assert (three / FOLDER / "checkpoint-2" / "weights").read_text()[:1] == "b" and "not uploaded" not in caplog.text


def test_cleanup_removes_stale_checkpoints(machine, monkeypatch):
    store = machine("one")
    attempt(store, 2)
    assert list(remove_unused(store, keep=3)) == []
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 15 * 86400)
    assert {str(name) for name, _, _ in remove_unused(store, keep=3)} >= {PREFIX}
    assert list(store.bucket.listing("work/")) == []


# with a training

LONG = {"training_config__max_steps": 20, "training_config__save_steps": 2}


class Inputs(S3Store):
    """A store whose inputs are folders of this test."""

    def path(self, ref):
        folder = os.environ.get(f"TEST_{ref.stage.upper()}")
        return Path(folder) if folder else super().path(ref)


def train(uri: str) -> None:
    """Run the training on the machine that dies."""
    mirror.POLL_SECONDS = 0.05
    launch.run_job(job_of(**LONG), Inputs(uri))


def test_another_machine_finishes_the_training_of_a_dead_one_bit_for_bit(
    machine, base, shards, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    alone, job = store_of(tmp_path, base, shards), job_of(**LONG)
    expected = result(alone, launch.run_job(job, alone))

    for name, folder in {"TOKENS": shards, "BASE": base}.items():
        monkeypatch.setenv(f"TEST_{name}", str(folder))
    store = machine("one", Inputs)
    script = f"from tests.unit.store.test_checkpoint_mirror import train; train({store.uri!r})"
    with (tmp_path / "log").open("wb") as log:
        dying = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=log, start_new_session=True)
    prefix = f"work/train/{job.fingerprint}/{FOLDER}/"
    wait_until(lambda: dying.poll() is not None or any("complete.json" in k.key for k in store.bucket.listing(prefix)))
    for process in (*psutil.Process(dying.pid).children(recursive=True), psutil.Process(dying.pid)):
        process.kill()
    dying.wait()

    two = machine("two", Inputs)
    two.lease_seconds = 2.0  # the dead machine's lease ends by itself
    ref = launch.run_job(job, two)
    assert 2 <= two.manifest(ref).figures["resumed_at"] < 20, (tmp_path / "log").read_text()
    found = result(two, ref)
    assert same(expected[0], found[0]), "bit for bit"
    assert expected[1] == found[1], "the curve has every step once"
    assert list(two.bucket.listing("work/")) == []
