"""Staging folders: each is locked by the processes that use it, and removed as soon as all of them have ended.

Beside a folder `<name>` is the file `<name>.owner`. Its users hold a shared `flock` on it, which the kernel releases when
they die. A process that gets an exclusive lock therefore knows that the folder has no user, if the users were on this
machine: network file systems may keep locks to one machine. So the file also names the machine and its boot.
"""

import fcntl
import json
import logging
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock

from pydantic import JsonValue

from loraflow.store.files import is_there, remove_tree
from loraflow.store.lock import acquire

log = logging.getLogger(__name__)

_SUFFIX = ".owner"
_held: dict[Path, int] = {}  # the locks of this process, as file descriptors by folder
_guard = Lock()


def create(root: Path, name: str) -> Path:
    """Make a new empty folder below `root`, whose name begins with `name`, and lock it for this process."""
    root.mkdir(parents=True, exist_ok=True)
    remove_abandoned(root)
    folder = root / f"{name}-{uuid.uuid4().hex[:8]}"
    claim(folder)
    folder.mkdir()
    return folder


def claim(folder: Path) -> None:
    """Lock a folder for this process, until it is released or the process ends. The folder need not exist.

    Raises:
        Failure: the file of the lock is a link.
    """
    path = _owner_file(folder)
    fd = acquire(path, shared=True)
    try:
        if os.fstat(fd).st_size == 0:
            os.write(fd, json.dumps({**_this_machine(), "pid": os.getpid()}).encode())
    except OSError:  # a full disk
        path.unlink(missing_ok=True)
        os.close(fd)
        raise
    with _guard:
        before = _held.pop(folder, None)
        _held[folder] = fd
    if before is not None:
        os.close(before)


def discard(folder: Path) -> None:
    """Remove a folder if it is still there, and release its lock."""
    remove_tree(folder, ignore_errors=True)
    release(folder)


def release(folder: Path) -> None:
    """Release the lock of a folder that was renamed or removed."""
    with _guard:
        fd = _held.pop(folder, None)
    with suppress(OSError):  # the error that ended the job says more
        if not is_there(folder):
            _owner_file(folder).unlink(missing_ok=True)
    if fd is not None:
        os.close(fd)


def remove(root: Path, folder: Path) -> None:
    """Delete a folder, renamed into `root` first, so that no reader finds a part of it."""
    removed = root / f"gone-{uuid.uuid4().hex[:12]}"
    claim(removed)
    try:
        folder.rename(removed)
        remove_tree(removed)
    finally:
        release(removed)


def remove_abandoned(root: Path) -> None:
    """Remove the folders below `root` whose users have all ended. A folder of another machine is left alone."""
    for folder in abandoned(root):
        log.info("%s is removed: the process that made it has ended", folder.name)
        discard(folder)


def abandoned(root: Path) -> Iterator[Path]:
    """Yield the folders below `root` whose users have all ended, each locked against new users meanwhile."""
    for path in sorted(root.glob(f"*{_SUFFIX}")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:  # another process was faster, or it belongs to another user
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder, owner = path.with_suffix(""), os.read(fd, 4096)
            if _is_of_this_machine(owner) or not (owner or is_there(folder)):
                yield folder
        except OSError:  # it is in use; or the file system has no locks
            continue
        finally:
            os.close(fd)


def _owner_file(folder: Path) -> Path:
    return folder.with_name(folder.name + _SUFFIX)


def _is_of_this_machine(data: bytes) -> bool:
    """Tell whether an owner file was written on this machine, where a free lock means that its owner has ended."""
    try:
        owner: JsonValue = json.loads(data)
    except ValueError:
        return False
    if not isinstance(owner, dict):
        return False
    here = _this_machine()
    if here["boot"] and owner.get("boot") == here["boot"]:  # the same kernel: a container's lock is seen too
        return True
    is_rebooted = bool(here["machine"]) and owner.get("machine") == here["machine"]
    return owner.get("host") == here["host"] and (is_rebooted or not here["boot"])


@cache
def _this_machine() -> dict[str, str]:
    """Name this machine by its host, its installation, and the id that the kernel draws when it boots."""
    files = {"machine": "/etc/machine-id", "boot": "/proc/sys/kernel/random/boot_id"}
    return {"host": platform.node(), **{name: _first_line(file) for name, file in files.items()}}


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
