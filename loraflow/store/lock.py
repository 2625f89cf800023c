"""Locks between processes of one host: `flock`, which the kernel releases when its holder dies."""

import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loraflow.failures import Failure

log = logging.getLogger(__name__)
_REMOVED = (errno.ENOENT, errno.ESTALE)  # the latter from NFS, if another machine removed the file
_ATTEMPTS = 1000  # a holder may remove the file meanwhile


class LockHeld(Exception):
    """Another process holds the lock, and the caller asked not to wait."""


@contextmanager
def flock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file. Its holder may remove the file.

    Raises:
        Failure: the file is a link.
        OSError: it cannot be opened.
        LockHeld: with `wait=False`, if another process has it.
    """
    fd = acquire(path, shared=shared, wait=wait)
    try:
        if not shared:
            with suppress(OSError):  # a full disk: the holder is only for messages
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps({"pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(fd)


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> int:
    """Lock a file as `flock` does, until the descriptor that is returned is closed."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    for _ in range(_ATTEMPTS):
        try:
            fd = _open(path, os.O_RDWR | os.O_CREAT)
        except PermissionError:
            if not shared:
                raise
            fd = _open(path, os.O_RDONLY)  # the file of another user can be locked for reading
        try:
            try:
                _lock(fd, mode | fcntl.LOCK_NB, path)
            except BlockingIOError:
                if not wait:
                    raise LockHeld(str(path)) from None
                log.info("waiting for %s, held by %s", path.name, _holder(path))
                _lock(fd, mode, path)
            if _is_at(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its holder removed the file before it was locked
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))


def _open(path: Path, flags: int) -> int:
    """Open a lock's file. A link is not followed: who can write to the folder would choose a file that is overwritten."""
    for attempt in range(10):
        with suppress(FileExistsError):  # a holder removed the folder meanwhile, or it is a file, which `os.open` tells
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno in _REMOVED and attempt < 9:  # a holder removed the folder
                flags |= os.O_CREAT
                continue
            if error.errno != errno.ELOOP or not path.is_symlink():
                raise
            raise Failure(
                "The lock file is a link.",
                where=str(path),
                expected="a file",
                next_step="remove it; it is created again",
            ) from error
    raise AssertionError("the last attempt returns or raises")


def _is_at(path: Path, fd: int) -> bool:
    """Tell whether an open file is still the one at its path. Where NFS or FUSE removed it, its number of links stays 1."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError as error:
        if error.errno in _REMOVED:
            return False
        raise


def _lock(fd: int, mode: int, path: Path) -> None:
    try:
        fcntl.flock(fd, mode)
    except BlockingIOError:
        raise
    except OSError as error:  # Linux and macOS have several numbers for a file system without locks
        number = errno.ENOLCK if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL) else error.errno
        raise OSError(number, error.strerror, str(path)) from error


def _holder(path: Path) -> str:
    try:
        return f"process {json.loads(path.read_bytes())['pid']}"
    except (OSError, ValueError, KeyError, TypeError):  # the message names no process then
        return "another process"
