"""Hashing and durable writing of plain files, and a folder of small documents."""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path, PurePosixPath
from typing import Generic, TypeAlias, TypeVar

from pydantic import TypeAdapter

from loraflow.failures import MACHINE_FAULTS, Failure, StorageError, from_os_error

log = logging.getLogger(__name__)

_T = TypeVar("_T")
BLOCK = 4 * 2**20  # bytes that are read or written at a time
# What `json.dumps` writes. Unlike pydantic's JsonValue, read-only: a dict[str, str] is one too.
Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | int | float | bool | None"

_Stamp: TypeAlias = tuple[int, int, int, int]  # size, mtime in nanoseconds, inode, ctime in nanoseconds
_MEMO = TypeAdapter(dict[str, tuple[int, int, int, int, str]])  # by algorithm and path: the stamp and the hash
SETTLED = 2_000_000_000  # nanoseconds; the coarsest clocks of file systems have ticks of two seconds


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Return the hex digest of a file's content.

    Raises:
        Failure: see `ask_again`.
    """

    def read() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()

    return ask_again(read, path)


def ask_again(read: Callable[[], _T], path: Path) -> _T:
    """Return what a read of a path returns. It is repeated twice if the disk or the system fails.

    Raises:
        Failure: it failed each time. The file need not be damaged.
    """
    for pause in (0.1, 0.1, None):
        try:
            return read()
        except OSError as error:
            error.filename = error.filename or str(path)  # an error of `read` has none
            if error.errno not in MACHINE_FAULTS:
                raise
            if pause is None:
                raise _machine_fault(error) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


def _machine_fault(error: OSError) -> Failure:
    file = str(error.filename)
    # With the file as `where`, a missing permission would be reported as a store that cannot be written.
    return from_os_error(error, f"{file}/") or StorageError(
        "A file cannot be read.", where=file, got=str(error.strerror), next_step="check its disk, then run again"
    )


# What the read of a damaged artifact may raise, beside what `read_file` raises for a pipe.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def raise_machine_fault(error: Exception) -> None:
    """Raise a failure if an error says nothing about the file, which may be intact; else do nothing.

    Raises:
        Failure: an OSError, unless the file is missing or no regular file.
    """
    if isinstance(error, OSError) and not isinstance(error, ValueError) and error.errno not in _DAMAGE:
        raise _machine_fault(error) from error


def file_type(path: Path) -> int:
    """Return the `stat.S_IFMT` of a path, 0 if it does not exist. `Path.exists` of Python 3.14 is False for any error.

    Raises:
        Failure: see `ask_again`.
    """
    try:
        return stat.S_IFMT(ask_again(path.stat, path).st_mode)
    except OSError as error:
        raise_machine_fault(error)
        return 0


def is_there(path: Path) -> bool:
    """Tell whether a path exists, if only as a link that names nothing. An OSError says that it is not known."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def remove_tree(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a folder; if it is a link, the link only."""
    try:
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors)
    except OSError:
        if not ignore_errors:
            raise


def folders_in(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted; none if it does not exist.

    Raises:
        Failure: the folder exists and cannot be listed; `Path.glob` would take it for an empty one.
    """
    try:
        return sorted(path for path in folder.iterdir() if file_type(path) == stat.S_IFDIR)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise_machine_fault(error)
        raise


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a folder from the top like `os.walk`, but do not take a folder that cannot be listed for an empty one.

    Raises:
        OSError, Failure: a folder below it exists and cannot be listed.
    """

    def refuse(error: OSError) -> None:
        if error.errno in MACHINE_FAULTS:
            raise _machine_fault(error) from error
        if not isinstance(error, FileNotFoundError):
            raise error

    for root, folders, names in os.walk(folder, onerror=refuse):
        yield Path(root), folders, names


def read_file(path: Path) -> bytes:
    """Return a file's content.

    Raises:
        OSError: it cannot be read.
        UnsupportedOperation: it is no regular file: a pipe may never end.
        Failure: see `ask_again`.
    """

    def read() -> bytes:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UnsupportedOperation(errno.EINVAL, "not a regular file", str(path))
        return path.read_bytes()

    return ask_again(read, path)


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative posix path, path) of each regular file below a folder, sorted.

    Raises:
        ValueError: for anything that is neither a folder nor a regular file: a link could point out of the store.
    """
    for root, dirs, names in walk(folder):
        dirs.sort()
        for name in sorted(dirs + names):
            path = root / name
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise ValueError(f"{path} is neither a folder nor a regular file")
            yield path.relative_to(folder).as_posix(), path


def is_inside(name: str) -> bool:
    """Tell whether a relative name, read from a file or the network, stays inside the folder that it is joined to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(path.parts)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below a folder, and the folder itself."""
    for root, _, names in walk(folder):
        for name in names:
            fsync_path(root / name)
        fsync_path(root)


def write_atomic(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replace a file atomically: after a crash, as for a reader, it has the old content or the new.

    As for any new file, the umask decides who may read it, unless a `mode` is given.
    """
    draft = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(fd, "wb") as file:
            if mode is not None:
                os.fchmod(fd, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def replace_file(file: Path, data: bytes) -> None:
    """Replace a file of a person atomically, with its permissions; a link stays a link. Else write it in place.

    Raises:
        OSError: it cannot be written, for example because it is read-only.
    """
    mode = None
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):
            file.write_bytes(data)
            return
        os.close(os.open(file, os.O_WRONLY))
    except FileNotFoundError:
        pass
    try:
        write_atomic(Path(os.path.realpath(file)), data, mode and stat.S_IMODE(mode))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.ENOENT):
            error.filename = str(file)
            raise
        file.write_bytes(data)


def set_default_modes(folder: Path) -> None:
    """Give all files and folders below a folder the modes that new ones get: the umask decides, files are not executable.

    Libraries write weights by temporary files, which only their owner may read. A file with several hard links may belong
    to someone else's folder: it is replaced by a copy if others could not read it, and left as it is otherwise.
    """
    probe = folder.parent / f".mode-{secrets.token_hex(4)}"
    probe.mkdir()
    try:
        (probe / "file").touch()
        folder_mode = stat.S_IMODE(probe.stat().st_mode)
        file_mode = stat.S_IMODE((probe / "file").stat().st_mode) & 0o666
    finally:
        shutil.rmtree(probe)
    for root, _, names in walk(folder):
        _set_mode(root, folder_mode)
        for name in names:
            path = root / name
            found = path.lstat()
            if not stat.S_ISREG(found.st_mode):
                continue  # `files_below` refuses it
            if found.st_nlink == 1:
                _set_mode(path, file_mode)
            elif found.st_mode & file_mode & 0o444 != file_mode & 0o444:
                draft = path.with_name(f".{name[:200]}.{secrets.token_hex(4)}")
                shutil.copyfile(path, draft)
                os.replace(draft, path)


def _set_mode(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        try:
            path.chmod(mode)
        except PermissionError as error:  # another user's process wrote it, on another node
            log.warning("the mode of %s could not be set: %s", path, error.strerror)


def json_bytes(value: Json) -> bytes:
    """Return a value as readable JSON with sorted keys."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Json) -> None:
    """Write a JSON file atomically, readable and with sorted keys."""
    write_atomic(path, json_bytes(value))


@contextmanager
def translate_os_errors(where: str) -> Iterator[None]:
    """Translate "disk full" and "permission denied" into failures with a next step.

    Raises:
        Failure: the disk is full, or permission is missing. Any other OSError passes unchanged.
    """
    try:
        yield
    except OSError as error:
        failure = from_os_error(error, where)
        if failure is None:
            raise
        raise failure from error


def stale_folders(root: Path, patterns: tuple[str, ...], before: float) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield (relative path, bytes) of folders that match a pattern and were last changed before a time."""
    for pattern in patterns:
        for path in root.glob(pattern):
            if file_type(path) == stat.S_IFDIR and not path.is_symlink() and path.stat().st_mtime < before:
                yield PurePosixPath(path.relative_to(root).as_posix()), folder_size(path)


_DRAFT = re.compile(r"\.(draft-[0-9a-f]{8}|.+\.[a-z0-9_]{8})")  # of `write_atomic`, of today and before


def stale_drafts(root: Path, patterns: tuple[str, ...], before: float) -> Iterator[tuple[PurePosixPath, int]]:
    """Yield (relative path, bytes) of files that an interrupted atomic write left before a time."""
    for pattern in patterns:
        for path in root.glob(pattern):
            if _DRAFT.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < before:
                yield PurePosixPath(path.relative_to(root).as_posix()), path.stat().st_size


def folder_size(folder: Path) -> int:
    """Return the size in bytes of the files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


class Memo(Generic[_T]):
    """What this machine remembers, by key, in a JSON file. Without the file, only time is lost."""

    def __init__(self, path: Path | None, values: TypeAdapter[dict[str, _T]]):
        self.path, self.changed = path, False
        self.known: dict[str, _T] = {}
        with suppress(OSError, ValueError, Failure):
            if path is not None:
                self.known = values.validate_json(read_file(path))

    def save(self) -> None:
        """Write it, if it changed. An error is only logged."""
        if self.changed and self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, json.dumps(self.known).encode())
                self.changed = False
            except OSError as error:
                log.debug("hashes are not remembered: %s", error)


class HashMemo(Memo[tuple[int, int, int, int, str]]):
    """Remember hashes of files by path, size, mtime, inode and ctime, so that an unchanged file is not hashed again.

    The kernel sets a file's ctime at each write and at each change of its mtime, so a write is seen even if its author
    restores the mtime. The hash of a file whose mtime is younger than two seconds is not remembered: it could be written
    again within the same clock tick.
    """

    def __init__(self, path: Path | None):
        super().__init__(path, _MEMO)

    def hash(self, path: Path, algorithm: str = "sha256") -> str:
        """Return a file's hash, from memory if the file has not changed since it was hashed."""
        known = self._remembered(path, algorithm)
        return self.rehash(path, algorithm) if known is None else known

    def rehash(self, path: Path, algorithm: str = "sha256") -> str:
        """Hash a file even if its hash is remembered, and remember the new one."""
        before, key = _stamp(path), f"{algorithm}:{path.resolve()}"
        value = hash_file(path, algorithm)
        if _stamp(path) == before and time.time_ns() - before[1] > SETTLED:
            self.known[key] = (*before, value)
            self.changed = True
        return value

    def has_hash(self, path: Path, sha256: str) -> bool:
        """Tell whether a file has a hash. Memory can confirm it; a mismatch is only reported after hashing the file."""
        return self.remembers(path, sha256) or self.rehash(path) == sha256

    def remembers(self, path: Path, sha256: str) -> bool:
        """Tell whether a file had a hash when it was hashed, and has not changed since. Nothing is read."""
        return self._remembered(path, "sha256") == sha256

    def _remembered(self, path: Path, algorithm: str) -> str | None:
        known = self.known.get(f"{algorithm}:{path.resolve()}")
        return known[4] if known is not None and known[:4] == _stamp(path) else None


def _stamp(path: Path) -> _Stamp:
    status = path.stat()
    return (status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)


class LocalDocuments:
    """Documents below `root`. `uri` names the store in messages."""

    root: Path
    uri: str

    def read_document(self, name: str) -> bytes | None:
        """Return a document, None if it does not exist."""
        try:
            return read_file(self.root / name)
        except FileNotFoundError:
            return None

    def create_document(self, name: str, data: bytes) -> bool:
        """Write a document that does not exist, by a hard link, which fails if it exists. Return False then."""
        with translate_os_errors(self.uri):
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".draft-{secrets.token_hex(4)}")
            try:
                write_atomic(draft, data)
                os.link(draft, path)
            except FileExistsError:
                return False
            finally:
                draft.unlink(missing_ok=True)
            fsync_path(path.parent)
            return True

    def write_document(self, name: str, data: bytes) -> None:
        """Write or replace a document atomically."""
        with translate_os_errors(self.uri):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.root / name, data)

    def remove_document(self, name: str) -> None:
        """Delete a document, if it exists."""
        with translate_os_errors(self.uri):
            (self.root / name).unlink(missing_ok=True)

    def documents(self, prefix: str) -> list[str]:
        """Return the names of all documents below a prefix, sorted."""
        found = (root / name for root, _, names in walk(self.root / prefix) for name in names if name[0] != ".")
        return sorted(path.relative_to(self.root).as_posix() for path in found if file_type(path) == stat.S_IFREG)

    def read_documents(self, prefix: str, suffix: str = "") -> dict[str, bytes]:
        """Return documents below a prefix, by name."""
        found = ((name, self.read_document(name)) for name in self.documents(prefix) if name.endswith(suffix))
        return {name: data for name, data in found if data is not None}
