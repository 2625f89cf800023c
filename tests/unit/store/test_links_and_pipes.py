"""Links, pipes and disks that are gone, in the places where a store has files and folders of its own."""

import errno
import os
import shutil
import time
from pathlib import Path, PurePosixPath

import pytest

from loraflow.failures import StorageError
from loraflow.registry.cleanup import remove_unused
from loraflow.store import LocalStore, lock, staging
from loraflow.store.chunk_cache import ChunkCache
from loraflow.store.files import HashMemo
from loraflow.store.s3_artifacts import ObjectMemo
from tests.promoted_models import commit
from tests.stored_artifacts import FP, PAYLOAD, put

DAY = 86400


def link_elsewhere(folder, elsewhere):
    """Move a folder, and put a link to it in its place, as for a disk with more room."""
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def test_cleanup_removes_the_link_to_an_artifact_and_not_what_it_names(tmp_path):
    store = LocalStore(tmp_path / "store")
    refs = [commit(store, "merge", name) for name in ("a", "b")]
    for ref in refs:
        link_elsewhere(store.path(ref), tmp_path / ref.digest)
        assert store.verify(ref) == []
    removed = list(remove_unused(store, keep=0))
    assert {item.name.name for item in removed} == {ref.digest for ref in refs}
    assert list(store.artifacts()) == [] and list((store.root / "staging").iterdir()) == []
    assert all((tmp_path / ref.digest / "weights").exists() for ref in refs)


@pytest.mark.parametrize("place", ["staging", "work/train", "set-aside"])
def test_an_old_link_among_unfinished_work_does_not_end_a_cleanup_and_is_left(tmp_path, place):
    store = LocalStore(tmp_path / "store")
    old = time.time() - 40 * DAY
    for folder in (tmp_path / "precious", store.root / place / "old"):
        folder.mkdir(parents=True)
        (folder / "file").write_text("content")
        os.utime(folder, (old, old))
    (store.root / place / "link").symlink_to(tmp_path / "precious")
    removed = list(store.stale_items(time.time() - 14 * DAY, remove=True))
    assert removed == [(PurePosixPath(place, "old"), 7)]
    assert (store.root / place / "link").is_symlink() and (tmp_path / "precious" / "file").exists()


def test_an_artifact_on_a_disk_that_is_gone_is_computed_again_in_its_place(tmp_path):
    store = LocalStore(tmp_path / "store")
    ref = put(store)
    link_elsewhere(store.path(ref), tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "not mounted")
    assert store.find("tokenize", FP) is None
    assert put(store) == ref and store.verify(ref) == [] and not store.path(ref).is_symlink()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "folder", "failing"])
def test_what_is_no_file_in_the_place_of_a_cache_costs_time_only(tmp_path, kind, monkeypatch):
    file, content = tmp_path / "file", tmp_path / "content"
    content.write_text("content")
    os.utime(content, (1, 1))
    cache = ChunkCache(tmp_path / "cache")
    cache.write("key", b"entry")
    entry = next(path for path in cache.folder.rglob("key") if path.is_file())
    entry.unlink()
    for path in (file, entry):
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.write_text("{}")
    if kind == "failing":

        def fail(self):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

        monkeypatch.setattr(Path, "read_bytes", fail)
    assert cache.read("key") is None
    assert HashMemo(file).known == {} and ObjectMemo(file).known == {}
    assert len(HashMemo(file).hash(content)) == 64


@pytest.mark.parametrize("holder", ["lock", "staging"])
def test_a_lock_whose_file_is_always_stale_is_a_failure_of_the_file_system(tmp_path, monkeypatch, holder):
    """NFS answers so if another machine replaced the file. It ended in a RecursionError, or never."""

    def stale(path, other):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os.path, "samestat", stale)

    def open_files():
        return sum(1 for _ in Path("/dev/fd").iterdir())

    store, before = LocalStore(tmp_path), open_files()
    with pytest.raises(StorageError, match="network file system"):
        if holder == "lock":
            with store.lock("tokenize", FP):
                pass
        else:
            store.staging("tokenize", FP)
    assert open_files() == before, "no descriptor is left open"
    monkeypatch.setattr(lock, "_ATTEMPTS", 3)
    calls = []
    monkeypatch.setattr(os.path, "samestat", lambda *_: calls.append(1) or len(calls) > 2)
    with store.lock("tokenize", FP):
        assert len(calls) == 3, "one that is stale for a moment is locked"


def test_what_explains_a_miss_skips_what_cannot_be_read(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    refs = [commit(store, "tokenize", name) for name in "abc"]
    for number, ref in enumerate(refs):
        os.utime(store.path(ref) / "manifest.json", (number + 1, number + 1))
    newest = store.manifest(refs[2])
    assert store.newest("tokenize") == newest
    assert store.newest_payload("tokenize", {**newest.payload, "x": 1}) == newest.payload
    (store.path(refs[2]) / "manifest.json").write_text("{")
    assert store.newest("tokenize") == store.manifest(refs[1])
    stat = Path.stat

    def vanish(self, **options):
        if self.name == "manifest.json" and store.path(refs[1]) == self.parent:
            raise FileNotFoundError(errno.ENOENT, "removed by a cleanup", str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", vanish)
    payload = store.manifest(refs[0]).payload
    assert store.newest_payload("tokenize", payload) == payload

    def fail(self):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))

    monkeypatch.setattr(Path, "iterdir", fail)
    assert store.newest("tokenize") is None and store.newest_payload("tokenize", payload) is None


def test_a_folder_on_a_failing_disk_is_not_taken_for_removed_as_path_exists_of_python_3_14_does(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    staged = store.staging("tokenize", FP)
    owner = staged.with_name(f"{staged.name}.owner")
    lstat = Path.lstat

    def fail(self):
        if self == staged:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return lstat(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self, **_: os.path.lexists(self) and self != staged)
        patch.setattr(Path, "lstat", fail)
        staging.release(staged)
    assert owner.exists() and staged.exists(), "so the next job removes both"
    store.staging("tokenize", FP)
    assert not owner.exists() and not staged.exists()
    ref = put(store)
    target = store.path(ref)
    shutil.rmtree(target / "sub")

    def fail_at_target(self):
        if self == target:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
        return lstat(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda self, **_: os.path.lexists(self) and self != target)
        patch.setattr(Path, "lstat", fail_at_target)
        with pytest.raises((StorageError, OSError), match=r"input/output|Input/output"):
            put(store)
    assert target.is_dir() and put(store) == ref and PAYLOAD
