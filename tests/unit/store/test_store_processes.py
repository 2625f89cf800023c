"""Several processes at one store: kills, locks, staging folders and cleanups."""

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loraflow import identity
from loraflow.registry.cleanup import remove_unused
from loraflow.store import LocalStore, lock, staging
from tests.stored_artifacts import FP, put

REPOSITORY = Path(__file__).absolute().parents[3]


COMMITTER = """
import sys, itertools
from pathlib import Path
sys.path.insert(0, {repository!r})
from loraflow import identity
from loraflow.store import LocalStore
from tests.stored_artifacts import put
store = LocalStore({root!r})
for i in itertools.count(int(sys.argv[1])):
    put(store, payload=identity.payload("tokenize", 1, {{}}, {{"x": i}}), content="c" * 4000)
    print(i, flush=True)
"""


@pytest.mark.parametrize("seed", range(8))
def test_sigkill_at_a_random_moment_leaves_old_or_new(tmp_path, seed):
    root = tmp_path / "store"
    script = COMMITTER.format(repository=str(REPOSITORY), root=str(root))
    process = subprocess.Popen([sys.executable, "-c", script, "0"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(random.Random(seed).uniform(0.0, 0.15))
    process.send_signal(signal.SIGKILL)
    reported = [int(line) for line in process.stdout.read().split()]
    process.wait()
    store = LocalStore(root)
    found = list(store.artifacts())
    assert len(found) > max(reported, default=0), "every commit that was reported is there"
    assert all(store.verify(ref) == [] for ref in found)
    for i in range(max(reported, default=0) + 1):
        assert store.find("tokenize", identity.fingerprint(identity.payload("tokenize", 1, {}, {"x": i}))) is not None
    # and the next commit succeeds
    put(store, payload=identity.payload("tokenize", 1, {}, {"x": len(found)}), content="c" * 4000)


RACER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {repository!r})
from loraflow.store import LocalStore
from tests.stored_artifacts import put, FP
store = LocalStore({root!r})
with store.lock("tokenize", FP):
    if store.find("tokenize", FP) is None:
        Path({root!r}, "computed-" + sys.argv[1]).write_text("")
        time.sleep(0.3)
        put(store, content=sys.argv[1])
print(store.find("tokenize", FP).digest)
"""


def test_processes_that_need_the_same_artifact_compute_it_once(tmp_path):
    root = tmp_path / "store"
    root.mkdir()
    script = RACER.format(repository=str(REPOSITORY), root=str(root))
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)
    ]
    digests = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert len(digests) == 1
    assert len(list(root.glob("computed-*"))) == 1


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    script = "import sys,time\nfrom loraflow.store import LocalStore\nwith LocalStore(sys.argv[1]).lock('a','b'):\n print(1,flush=True);time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    holder.kill()
    holder.wait()
    with LocalStore(tmp_path).lock("a", "b"):
        pass


@pytest.mark.parametrize("is_renamed", [False, True])
def test_after_a_holder_removed_the_locks_file_a_waiting_and_a_new_process_do_not_both_hold_it(
    tmp_path, monkeypatch, is_renamed
):
    """`merge`, `adapters convert`, `predict` and `init` remove their lock's file with its folder.

    A renamed file keeps its link, as an open file that is removed on NFS or FUSE does.
    """
    file, waits, held, done = tmp_path / "work" / "lock", threading.Event(), threading.Event(), threading.Event()
    monkeypatch.setattr(lock, "_holder", lambda path: waits.set())  # asked between opening the file and waiting for it

    def wait_for_it() -> None:
        with lock.flock(file):
            held.set()
            done.wait(10)

    with ThreadPoolExecutor(1) as pool:
        with lock.flock(file):
            pool.submit(wait_for_it)
            assert waits.wait(10)
            if is_renamed:
                file.rename(tmp_path / ".nfs0001")
            else:
                shutil.rmtree(file.parent)
        assert held.wait(10)
        try:
            with pytest.raises(lock.LockHeld), lock.flock(file, wait=False):
                pass
        finally:
            done.set()


def test_a_lock_is_recreated_if_its_holder_removes_the_folder_at_this_moment(tmp_path, monkeypatch):
    file, opened = tmp_path / "work" / "lock", os.open

    def remove_first(path, *arguments, **options):
        monkeypatch.setattr(os, "open", opened)
        shutil.rmtree(file.parent)
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", remove_first)
    with lock.flock(file), pytest.raises(lock.LockHeld), lock.flock(file, wait=False):
        pass
    assert file.exists()


def test_a_folders_lock_is_recreated_if_a_cleanup_removes_its_file_at_this_moment(tmp_path, monkeypatch):
    folder, owner, locked = tmp_path / "a", tmp_path / "a.owner", fcntl.flock

    def rename_first(*arguments):
        monkeypatch.setattr(fcntl, "flock", locked)
        owner.rename(tmp_path / ".nfs0001")
        locked(*arguments)

    monkeypatch.setattr(fcntl, "flock", rename_first)
    staging.claim(folder)
    folder.mkdir()
    assert owner.exists() and list(staging.abandoned(tmp_path)) == []
    staging.discard(folder)


def test_a_lock_is_recreated_if_its_folder_is_removed_while_it_is_created(tmp_path, monkeypatch):
    file, made = tmp_path / "work" / "lock", os.mkdir

    def remove_first(path, *arguments, **options):
        monkeypatch.setattr(os, "mkdir", made)
        raise FileExistsError(path)  # the folder was there, and `Path.mkdir` no longer finds it

    monkeypatch.setattr(os, "mkdir", remove_first)
    with lock.flock(file), pytest.raises(lock.LockHeld), lock.flock(file, wait=False):
        pass
    (tmp_path / "unmounted").symlink_to(tmp_path / "gone" / "disk")
    with pytest.raises(FileNotFoundError), lock.flock(tmp_path / "unmounted" / "lock"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), lock.flock(tmp_path / "file" / "lock"):
        pass


HOLDER = """
import os, sys, time
sys.path.insert(0, sys.argv[2])
from loraflow.store import LocalStore
folder = LocalStore(sys.argv[1]).staging("train", "f" * 64)
(folder / "weights").write_bytes(b"0" * 1000)
print(folder.name, flush=True)
time.sleep(60)
"""


def holder(root: Path) -> tuple[subprocess.Popen, str]:
    command = [sys.executable, "-c", HOLDER, str(root), str(Path(__file__).parents[3])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def test_thirteen_kills_leave_one_staging_folder_the_one_in_use(tmp_path):
    def kill_one(_):
        process, _name = holder(tmp_path)
        process.kill()
        process.wait()

    for number in range(3):
        kill_one(number)
    for number in range(10):  # a folder of a process that has ended, without waiting for ten more of them
        folder = LocalStore(tmp_path).staging("train", f"{number}" * 64)
        os.close(staging._held.pop(folder))
    mine = LocalStore(tmp_path).staging("merge", FP)
    assert [path.name for path in (tmp_path / "staging").iterdir() if path.is_dir()] == [mine.name]
    staging.discard(mine)
    assert list((tmp_path / "staging").iterdir()) == []


def test_the_staging_folder_of_a_running_process_stays(tmp_path):
    process, name = holder(tmp_path)
    try:
        staging.discard(LocalStore(tmp_path).staging("merge", FP))
        list(remove_unused(LocalStore(tmp_path), keep=1))
        assert (tmp_path / "staging" / name / "weights").exists()
    finally:
        process.kill()
        process.wait()
    removed = [path.name for path, size, _ in remove_unused(LocalStore(tmp_path), keep=1) if size == 1000]
    assert removed == [name] and list((tmp_path / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("owner", "removed"),
    [
        ({"host": "other", "machine": "m", "boot": "b"}, False),
        ({"host": "other", "machine": "m", "boot": "here"}, True),  # a container on this kernel
        ({"host": "me", "machine": "mine", "boot": "before"}, True),  # this machine was restarted
        ({"host": "me", "machine": "another", "boot": "b"}, False),  # two machines of one name
        ([], False),
    ],
)
def test_a_staging_folder_of_another_machine_is_left_to_it(tmp_path, monkeypatch, owner, removed):
    monkeypatch.setattr(staging, "_this_machine", lambda: {"host": "me", "machine": "mine", "boot": "here"})
    folder = tmp_path / "train-0123-abcd"
    folder.mkdir()
    (tmp_path / "train-0123-abcd.owner").write_text(json.dumps(owner))
    staging.remove_abandoned(tmp_path)
    assert folder.exists() is not removed


def test_drafts_of_interrupted_writes_are_cleaned_up(tmp_path):
    store = LocalStore(tmp_path)
    put(store)
    store.write_document("runs/x.json", b"{}")
    old = [tmp_path / "runs" / ".x.json.ab12_cd3", tmp_path / "tokenize" / FP / ".current.json.0123abcd"]
    for path in old:
        path.write_text("{")
        os.utime(path, (1_000_000_000, 1_000_000_000))
    (tmp_path / "runs" / ".new.json.0123abcd").write_text("{")
    assert len(list(remove_unused(store, keep=1))) == 2
    assert not any(path.exists() for path in old) and (tmp_path / "runs" / ".new.json.0123abcd").exists()
    assert store.find("tokenize", FP)
