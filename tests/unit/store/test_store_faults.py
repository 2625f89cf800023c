"""A full, failing, read-only or unmounted disk: one failure with a next step, and no artifact is lost or believed."""

import errno
import io
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from loraflow.cli import main
from loraflow.data.templates import tokenizer_config
from loraflow.execution import launcher, worker
from loraflow.failures import CorruptArtifact, DiskFull, Failure, ReadOnlyStore, StorageError, from_os_error
from loraflow.registry.cleanup import remove_unused
from loraflow.store import (
    LocalStore,
    Ref,
    Summary,
    open_store,
    read_intact,
    require_intact,
    staging,
)
from loraflow.store.checkpoints import finalize_checkpoint, prune_to_newest_intact
from loraflow.store.files import replace_file
from loraflow.store.lock import flock
from tests.stored_artifacts import FP, PAYLOAD, put


def current_umask():
    umask = os.umask(0)
    os.umask(umask)
    return umask


REPOSITORY = Path(__file__).absolute().parents[3]


def test_a_full_disk_is_a_failure_with_a_next_step_and_leaves_nothing(tmp_path, monkeypatch):
    store = LocalStore(tmp_path / "store")
    import loraflow.store.local as local

    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(local, "write_atomic", full)
    with pytest.raises(DiskFull) as caught:
        put(store)
    assert "loraflow gc" in str(caught.value)
    assert list(store.artifacts()) == []


def test_a_disk_that_is_full_before_the_job_starts_is_named_by_a_folder_of_the_stage(tmp_path, monkeypatch):
    """An error of a write has no file name, unlike one of an open."""

    def full(*_):
        raise OSError(28, "No space left on device")

    store = LocalStore(tmp_path / "store")
    monkeypatch.setattr("loraflow.store.staging.claim", full)
    monkeypatch.setattr("loraflow.store.local.flock", full)
    monkeypatch.setattr("loraflow.store.local.recompute_digest", full)
    ref = Ref(stage="tokenize", fingerprint=FP, digest="d" * 64, uri=store.uri)
    for start in (
        lambda: store.staging("tokenize", FP),
        lambda: store.lock("tokenize", FP).__enter__(),
        lambda: store.work_folder("tokenize", FP, ref),
    ):
        with pytest.raises(DiskFull) as caught:
            start()
        assert "tokenize" in Path(caught.value.where).relative_to(store.root).as_posix()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/usr/bin/unshare").exists(), reason="root writes everywhere")
def test_a_read_only_store_can_be_read_and_a_write_reports_it(tmp_path):
    root = tmp_path / "store"
    ref = put(LocalStore(root))
    script = (
        "import sys\nsys.path.insert(0, sys.argv[2])\nfrom loraflow.store import LocalStore\n"
        "from loraflow.failures import ReadOnlyStore\nfrom tests.stored_artifacts import put, FP, PAYLOAD\n"
        "from loraflow import identity\nstore = LocalStore(sys.argv[1])\n"
        "assert store.find('tokenize', FP) is not None\n"
        "with store.reader_lock():\n pass\n"
        "try:\n put(store, payload=identity.payload('tokenize', 1, {}, {'x': 9}))\n"
        "except ReadOnlyStore as failure:\n print('refused', 'runtime.store' in str(failure))\n"
    )
    mount = f"mount --bind {root} {root} && mount -o remount,ro,bind {root}"
    command = f"{mount} && {sys.executable} -c '{script.replace(chr(39), chr(34))}' {root} {REPOSITORY}"
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", command], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()[:80]}")
    assert done.stdout.strip() == "refused True", done.stderr
    assert LocalStore(root).verify(ref) == []
    assert ReadOnlyStore.exit_code == 1


FAULTS = {"EIO": errno.EIO, "EMFILE": errno.EMFILE, "ESTALE": errno.ESTALE, "EACCES": errno.EACCES}


def test_a_file_system_that_is_read_only_is_the_stores_whichever_folder_the_error_names():
    """A store's lock is named by its own path, and the folder that cannot be made is the one above."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), "/mnt/store")
    failure = from_os_error(error, "/mnt/store/locks/train.lock")
    assert isinstance(failure, ReadOnlyStore) and "runtime.store" in failure.next_step


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["pointer", "manifest", "list", "size"])
def test_a_lookup_that_the_machine_cannot_answer_is_a_failure_and_no_miss(tmp_path, monkeypatch, fault, call):
    store = LocalStore(tmp_path)
    ref = put(store)
    names = {"pointer": "current.json", "manifest": "manifest.json", "list": ref.digest, "size": "a.txt"}
    failing = {
        "pointer": ("read_bytes", Path),
        "manifest": ("read_bytes", Path),
        "list": ("scandir", os),
        "size": ("stat", Path),
    }
    name, owner = failing[call]
    real = getattr(owner, name)

    def fail(path, *args, **options):
        if Path(path).name == names[call]:
            raise OSError(FAULTS[fault], os.strerror(FAULTS[fault]), str(path))
        return real(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(Failure) as caught:
            store.find("tokenize", FP)
        assert not isinstance(caught.value, CorruptArtifact) and caught.value.where and caught.value.next_step
    assert store.find("tokenize", FP) == ref


READS = {
    "file of an artifact": ("a.txt", lambda store, ref: store.read(ref, "sub/a.txt")),
    "content": ("a.txt", lambda store, ref: store.verify(ref)),
    "manifest": ("manifest.json", lambda store, ref: store.manifest(ref)),
    "artifacts": ("manifest.json", lambda store, ref: [str(found) for found in store.artifacts()]),
    "time": (None, lambda store, ref: store.committed_at(ref)),
    "document": ("x.json", lambda store, ref: store.read_document("runs/x.json")),
    "documents": ("x.json", lambda store, ref: store.read_documents("runs/")),
}


@pytest.mark.parametrize("call", ["stat", "open"])
@pytest.mark.parametrize("reads", READS)
def test_each_read_of_a_store_is_repeated_and_then_a_failure_with_its_path(tmp_path, monkeypatch, reads, call):
    store = LocalStore(tmp_path)
    ref = put(store)
    store.create_document("runs/x.json", b"{}\n")
    name, read = READS[reads]
    name, expected, calls, owner = name or ref.digest, read(store, ref), [], {"stat": os, "open": io}[call]
    real = getattr(owner, call)

    def fail(path, *arguments, **options):
        if not isinstance(path, int) and Path(path).name == name:
            calls.append(path)
            if len(calls) <= times:
                raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(owner, call, fail)
    times = 0
    assert read(store, ref) == expected
    if not calls:  # such as the open of a file of which only the age is asked
        return
    times, calls[:] = 10**9, []
    with pytest.raises(StorageError) as caught:
        read(store, ref)
    assert name in caught.value.where
    if call == "open":
        times, calls[:] = 2, []
        assert read(store, ref) == expected


def test_a_file_of_a_person_is_replaced_as_a_whole_with_its_mode_and_a_link_stays_a_link(tmp_path, monkeypatch):
    page, link, pipe = tmp_path / "page.html", tmp_path / "link.html", tmp_path / "pipe"
    replace_file(page, b"old")
    assert page.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    page.chmod(0o640)
    link.symlink_to(page.name)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            replace_file(link, b"new")
    assert page.read_bytes() == b"old" and sorted(path.name for path in tmp_path.iterdir()) == [
        "link.html",
        "page.html",
    ]
    replace_file(link, b"new")
    assert link.is_symlink() and page.read_bytes() == b"new" and page.stat().st_mode & 0o777 == 0o640
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, b"new")
    assert os.read(reader, 10) == b"new" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


@contextmanager
def without_root():
    """Give up the right of root to write everywhere, and yield a folder of this user."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
            try:
                yield Path(folder)
            finally:
                os.seteuid(0)
        else:
            yield Path(folder)


def test_a_file_that_is_read_only_is_not_replaced_and_one_in_a_read_only_folder_is_written_in_place():
    with without_root() as folder:
        (folder / "cache").mkdir()
        page, cached, link = folder / "page", folder / "cache" / "0123", folder / "link"
        for file in (page, cached):
            file.write_bytes(b"old")
            file.chmod(0o444)
        link.symlink_to(cached)  # as DVC links a file to its cache
        for file in (page, link):
            with pytest.raises(PermissionError) as caught:
                replace_file(file, b"new")
            assert caught.value.filename == str(file) and file.read_bytes() == b"old"
        cached.chmod(0o644)
        (folder / "cache").chmod(0o555)
        replace_file(link, b"new")
        assert link.is_symlink() and cached.read_bytes() == b"new"
        with pytest.raises(PermissionError) as caught:
            replace_file(folder / "cache" / "other", b"new")
        assert caught.value.filename == str(folder / "cache" / "other"), "not the name of a draft"
        (folder / "cache").chmod(0o755)


def test_a_link_in_a_circle_and_a_missing_folder_are_errors_with_the_name_that_was_given(tmp_path):
    circle, missing = tmp_path / "circle", tmp_path / "missing" / "page"
    circle.symlink_to(circle.name)
    for file, number in ((circle, errno.ELOOP), (missing, errno.ENOENT), (tmp_path, errno.EISDIR)):
        with pytest.raises(OSError) as caught:
            replace_file(file, b"new")
        assert (caught.value.errno, caught.value.filename) == (number, str(file))


def test_a_file_that_is_a_mount_point_is_written_in_place(tmp_path, monkeypatch):
    """As a container has a single file of its host: a rename over it is EBUSY."""
    page = tmp_path / "page"
    page.write_bytes(b"old")

    def busy(*_):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "replace", busy)
    replace_file(page, b"new")
    assert page.read_bytes() == b"new" and list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
def test_a_folder_that_cannot_be_listed_does_not_count_as_empty(tmp_path, monkeypatch, number):
    """`Path.glob` of Python 3.13 skips it: verify, gc, backup and the promotion log would see less than there is."""
    store = LocalStore(tmp_path)
    ref = put(store)
    store.create_document("registry/tickets/log/000001.json", b"{}")
    assert list(store.artifacts()) == [ref.model_copy(update={"facets": {}})]
    listdir, scandir = os.listdir, os.scandir
    for name in (FP, "log"):

        def fail(real, path, name=name):
            if Path(path).name == name:
                raise OSError(number, os.strerror(number), str(path))
            return real(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", lambda path: fail(listdir, path))
            patch.setattr(os, "scandir", lambda path: fail(scandir, path))
            with pytest.raises(Failure):
                list(store.artifacts()) if name == FP else store.documents("registry/")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOSYS])
@pytest.mark.parametrize("call", ["open", "read_bytes"])
def test_a_checkpoint_is_not_removed_because_the_system_fails(tmp_path, monkeypatch, number, call):
    checkpoint = tmp_path / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("w")
    finalize_checkpoint(checkpoint)

    real = getattr(Path, call)

    def fail(path, *arguments, **options):
        if call == "open" and path.name != "weights":
            return real(path, *arguments, **options)
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, call, fail)
        with pytest.raises(Failure) as caught:
            prune_to_newest_intact(tmp_path)
    assert Path(caught.value.where).parent == checkpoint
    assert prune_to_newest_intact(tmp_path) == checkpoint
    with monkeypatch.context() as patch:  # of a failing disk, an older checkpoint is better than none
        number = errno.EIO
        patch.setattr(Path, call, fail)
        assert prune_to_newest_intact(tmp_path) is None


def test_a_copy_to_a_full_disk_names_the_disk_that_is_full_and_not_the_file_that_is_copied(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "source").write_bytes(b"x")
    monkeypatch.setattr(os, "sendfile", fail)
    with pytest.raises(OSError) as caught:
        shutil.copyfile(tmp_path / "source", tmp_path / "copy")
    failure = from_os_error(caught.value, "store")
    assert isinstance(failure, DiskFull) and failure.where == str(tmp_path / "copy")


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EIO, StorageError, "input/output error"),
        (errno.ESTALE, StorageError, "network file system"),
        (errno.ENOTCONN, StorageError, "not connected"),
        (errno.EMFILE, Failure, "too many open files"),
        (errno.ENFILE, Failure, "too many open files"),
        (errno.ENOLCK, Failure, "cannot lock files"),
        (errno.EROFS, ReadOnlyStore, "cannot be written"),
        (errno.EDQUOT, DiskFull, "quota"),
        (errno.ENOSPC, DiskFull, "disk is full"),
        (errno.EFBIG, DiskFull, "larger than a limit"),
        (errno.ENAMETOOLONG, Failure, "too long"),
        (errno.ELOOP, Failure, "symbolic links"),
        (errno.ENOTDIR, Failure, "not a folder"),
        (errno.EISDIR, Failure, "where a file is expected"),
    ],
)
def test_each_error_of_the_system_is_one_sentence_with_a_next_step(tmp_path, monkeypatch, number, kind, sentence):
    store, opened = LocalStore(tmp_path), os.open

    def fail(path, *args, **kwargs):
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)
    for use in (
        lambda: store.write_document("runs/x.json", b"{}"),
        lambda: store.staging("train", FP),
        lambda: store.lock("train", FP).__enter__(),
        lambda: list(remove_unused(store, keep=1)),
    ):
        with pytest.raises(Failure, match=sentence) as caught:
            use()
        assert type(caught.value) is kind and caught.value.next_step
        assert caught.value.where.startswith(str(tmp_path)) and len(str(caught.value).splitlines()) == 4
    if kind is ReadOnlyStore:  # a read-only store can still be read
        with store.reader_lock():
            pass
    else:
        with pytest.raises(kind), store.reader_lock():
            pass


OF_SYSTEM = [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.EBADMSG]  # asked again
OTHERS = [errno.ENOSYS, errno.EINVAL, errno.ENXIO, errno.ECONNRESET, errno.EACCES]


@pytest.mark.parametrize("number", OF_SYSTEM + OTHERS)
def test_a_fault_of_the_machine_does_not_count_as_a_damaged_artifact(tmp_path, monkeypatch, number):
    store = LocalStore(tmp_path)
    ref, opened, asked = put(store), Path.open, []

    def fail(self, *args, **kwargs):
        if self.name == "a.txt":
            asked.append(self)
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(Failure) as caught:
            require_intact(store, ref)
    assert not isinstance(caught.value, CorruptArtifact) and "a.txt" in caught.value.where
    assert caught.value.got and caught.value.next_step
    assert len(asked) == (3 if number in OF_SYSTEM else 1), "it is asked again first"
    assert store.verify(ref) == [] and not (tmp_path / "set-aside").exists()


@pytest.mark.parametrize("number", OF_SYSTEM + OTHERS)
@pytest.mark.parametrize("name", ["a.txt", "manifest.json", "current.json"])
def test_a_read_that_fails_midway_says_which_file_and_leaves_the_artifact(tmp_path, monkeypatch, number, name):
    """The error of a `read` has no file name, unlike one of an `open`."""
    store = LocalStore(tmp_path)
    ref, real = put(store), Path.read_bytes

    def fail(path):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(Failure) as caught:
            read_intact(store, ref, "sub/a.txt")
    assert not isinstance(caught.value, CorruptArtifact) and caught.value.where.endswith(name)
    assert store.find("tokenize", FP) == ref and not (tmp_path / "set-aside").exists()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "circle", "below a file"])
@pytest.mark.parametrize("check", [lambda store, ref: read_intact(store, ref, "sub/a.txt"), require_intact])
def test_an_artifact_with_something_other_than_files_is_quarantined_as_damaged(tmp_path, kind, check):
    store = LocalStore(tmp_path)
    ref = put(store)
    file = store.path(ref) / "sub" / "a.txt"
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "circle":
        file.symlink_to(file.name)
    elif kind == "below a file":
        shutil.rmtree(file.parent)
        file.parent.write_text("x")
    with pytest.raises(CorruptArtifact):
        check(store, ref)
    assert store.find("tokenize", FP) is None and any((tmp_path / "set-aside").glob("tokenize-*/"))


@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT, errno.ENOSYS])
def test_a_path_whose_state_cannot_be_read_does_not_count_as_missing(tmp_path, monkeypatch, number):
    """As `Path.exists`, `is_file` and `is_dir` of Python 3.14 do, which are False for any error."""
    store = LocalStore(tmp_path)
    put(store)
    store.create_document("runs/x.json", b"{}\n")
    real = Path.stat

    def fail(path, **options):
        if path.name in ("manifest.json", "x.json"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", fail)
    for name in ("exists", "is_file", "is_dir"):
        monkeypatch.setattr(Path, name, lambda path, name=name: getattr(os.path, name.replace("_", ""))(path))
    for ask in (lambda: list(store.artifacts()), lambda: store.documents("runs/")):
        with pytest.raises(Failure) as caught:
            ask()
        assert caught.value.where.endswith(".json")


def test_a_folder_that_cannot_be_listed_is_not_committed_as_empty(tmp_path, monkeypatch):
    scandir = os.scandir

    def fail(path):
        if str(path).endswith("sub"):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(Failure, match="too many open files"):
        put(LocalStore(tmp_path))
    assert list(LocalStore(tmp_path).artifacts()) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE])
@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_fault_of_the_machine_does_not_count_as_a_damaged_base_in_worker_launcher_and_command(
    tmp_path, monkeypatch, capsys, number, file
):
    """ "Fetch the base again" would not help: the file may be intact."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    readers = {
        "chat_template.jinja": tokenizer_config.find_template,
        "tokenizer_config.json": tokenizer_config.TokenizerConfig.read,
        "special_tokens_map.json": lambda folder: tokenizer_config._object(folder / file),
    }
    opened = Path.open

    def fail(self, *args, **options):
        if self.name == file:
            raise OSError(number, os.strerror(number), str(self))
        return opened(self, *args, **options)

    def read(*_, **__):
        readers[file](tmp_path)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Exception) as raised:
        read()
    found = [worker._failure_of(raised.value, SimpleNamespace())]
    job, store = (
        SimpleNamespace(stage="train", fingerprint="f"),
        SimpleNamespace(staging=lambda *_: tmp_path / "staged"),
    )
    with pytest.raises(Failure) as caught, launcher._staging_folder(job, store, tmp_path, 0.0):
        read()
    found.append(caught.value)
    kind = StorageError if number == errno.EIO else Failure
    assert [type(failure) for failure in found] == [kind, kind]
    assert all(failure.where == str(tmp_path / file) for failure in found)
    if number == errno.EIO:
        advice = r"check the disk \(`dmesg`\); if only this file is damaged: (download|fetch) the base( model)? again"
        assert all(re.fullmatch(advice, failure.next_step) for failure in found), "no run recomputes a base"
    else:
        assert all("base" not in failure.next_step for failure in found)
    monkeypatch.setattr("loraflow.cli.cli.main", read)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1 and found[0].what in capsys.readouterr().err


def test_a_failing_disk_at_the_end_of_a_job_does_not_replace_the_jobs_own_error(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    folder, lstat = store.staging("tokenize", FP), Path.lstat

    def fail(self):
        if self == folder:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return lstat(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", fail)
        staging.discard(folder)
    assert list(staging.abandoned(folder.parent)) == [folder], "its lock is free"


@pytest.mark.parametrize("file", ["current.json", "manifest.json"])
def test_a_fault_of_the_machine_is_no_cache_miss(tmp_path, monkeypatch, file):
    """EIO and EMFILE say nothing about the artifact: it is neither recomputed nor quarantined."""
    store = LocalStore(tmp_path / "store")
    staged = store.staging("tokenize", FP)
    (staged / "a").write_text("a")
    ref = store.commit(staged, payload=PAYLOAD, inputs={}, summary=Summary(), provenance={})
    real = Path.read_bytes

    def fail(path):
        if path.name == file:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    for look in (lambda: store.find("tokenize", FP), lambda: store.check(ref), lambda: store.manifest(ref)):
        with pytest.raises(StorageError) as caught:
            look()
        assert file in caught.value.where
    monkeypatch.undo()
    assert store.find("tokenize", FP) == ref


def test_a_store_below_a_file_is_refused_when_it_is_opened(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/store"):
        with pytest.raises(Failure, match="is a file and not a folder"):
            open_store(str(tmp_path / folder))
    assert open_store(str(tmp_path / "not yet" / "store")).find("tokenize", FP) is None


def test_a_store_on_a_disk_that_is_not_mounted_is_no_empty_store(tmp_path):
    """`loraflow runs` would say that there are no runs, and `plan` that all stages run."""
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    for folder in ("store", "store/team"):
        with pytest.raises(Failure, match="link to a folder that does not exist"):
            open_store(str(tmp_path / folder))
    (tmp_path / "disk").mkdir()
    assert open_store(str(tmp_path / "store" / "team")).find("tokenize", FP) is None
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(Failure, match="too many symbolic links"):
        open_store(str(tmp_path / "circle"))


def test_a_link_in_the_place_of_a_lock_is_refused_and_its_target_is_not_overwritten(tmp_path):
    """The folder of locks may be the system's folder for temporary files, or belong to a team."""
    target = tmp_path / "of a person"
    target.write_text("precious")
    (tmp_path / "lock").symlink_to(target)
    (tmp_path / "folder.owner").symlink_to(target)
    with pytest.raises(Failure, match="lock file is a link") as caught, flock(tmp_path / "lock"):
        pass
    assert caught.value.where == str(tmp_path / "lock") and "remove it" in caught.value.next_step
    with pytest.raises(Failure, match="lock file is a link"):
        staging.claim(tmp_path / "folder")
    assert target.read_text() == "precious"
