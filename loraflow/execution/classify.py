"""Find out what an unexpected exception of a stage means: a full disk, no memory, no network, a missing package, or a bug.

Libraries wrap the system's errors: safetensors, torch and arrow report a full disk by classes of their own, some of them
only in a text. So the whole chain of exceptions is read. Where a text could mean several things, the disk is probed.
"""

import errno
import os
import re
import resource
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from loraflow import failures

# What Rust and C++ libraries write: "No space left on device (os error 28)".
_TEXTS = {
    errno.ENOSPC: re.compile(r"no space left on device|os error 28\b|errno 28\b", re.IGNORECASE),
    errno.EDQUOT: re.compile(r"disk quota exceeded|os error 122\b|errno 122\b", re.IGNORECASE),
    errno.EFBIG: re.compile(r"file too large|os error 27\b|errno 27\b", re.IGNORECASE),
    errno.EIO: re.compile(r"input/output error|os error 5\b|errno 5\b", re.IGNORECASE),
    errno.EMFILE: re.compile(r"too many open files|os error 24\b|errno 24\b", re.IGNORECASE),
    errno.EROFS: re.compile(r"read-only file system|os error 30\b|errno 30\b", re.IGNORECASE),
    errno.ESTALE: re.compile(r"stale (nfs )?file handle|os error 116\b|errno 116\b", re.IGNORECASE),
}
# A write that failed for a reason that the library does not say: torch.save, numpy.save, C++ streams, mapped files.
_FAILED_WRITE = re.compile(
    r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs|iostream error|basic_ios::clear|Bus error"
    r"|\d+ requested and \d+ written",
    re.IGNORECASE,
)
_NEARLY_FULL = 16 * 2**20  # with fewer free bytes, a failed write means a full disk
_PROBE = 4 * 2**20  # bytes that are written to see whether a disk is full: quotas are not in the free space


def classify(error: BaseException, stage: str, folders: Sequence[Path] = ()) -> failures.Failure:
    """Return the failure for an unexpected exception.

    Args:
        folders: where the stage writes, the most likely place first.
    """
    where = str(folders[0]) if folders else stage
    for link, is_cause in _chain(error):
        known = link if isinstance(link, failures.Failure) else storage_failure(link, where, folders)
        # An exception that was handled before may have nothing to do with this one, unless it makes all work fail.
        if known and (is_cause or isinstance(known, failures.DiskFull | failures.StorageError | failures.Preempted)):
            return known
    text, name = f"{type(error).__name__}: {error}", type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in text.lower():
        return failures.OutOfMemory(
            "There is not enough memory.",
            where=stage,
            got=text[:500],
            next_step="close other programs, or use a machine with more memory",
        )
    if isinstance(error, ImportError) and getattr(error, "name", None):
        return failures.MissingExtra(
            f"The Python package {error.name} is missing.", where=stage, got=text[:300], next_step="loraflow doctor"
        )
    if name in ("ConnectionError", "ConnectTimeout", "ReadTimeout", "LocalEntryNotFoundError", "ConnectError"):
        return failures.Network(
            "A remote did not answer.",
            where=stage,
            got=text[:500],
            next_step="check the network, then run again: finished stages are cached",
        )
    return failures.Crashed(
        "The stage ended with an unexpected exception.",
        where=stage,
        got=text[:2000],
        next_step="read the traceback in the stage's log",
    )


def storage_failure(error: BaseException, where: str, folders: Sequence[Path] = ()) -> failures.Failure | None:
    """Return the failure of a disk that an exception reports by its number or its text; None if it reports none."""
    if isinstance(error, OSError) and (known := failures.from_os_error(error, where)):
        if known.where == where and error.errno == errno.ENOSPC and (folder := full_folder(folders)):
            return _disk_full(folder)
        return known
    text = str(error)[:10_000]
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in text:
        return _disk_full(_temporary_folder())
    if isinstance(error, OSError) and error.errno is not None:
        return None
    for number, pattern in _TEXTS.items():
        if pattern.search(text):
            if number == errno.ENOSPC and (folder := full_folder(folders)):
                return _disk_full(folder)
            return failures.from_os_error(OSError(number, os.strerror(number)), where)
    if _FAILED_WRITE.search(text):
        if folder := full_folder(folders):
            return _disk_full(folder)
        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            return failures.disk_full(where, errno.EFBIG)
    return None


def _disk_full(folder: Path) -> failures.DiskFull:
    failure = failures.disk_full(str(folder))
    if folder == _temporary_folder():
        failure.next_step = "free space there, or set TMPDIR to a folder on another disk; then run again"
    return failure


def full_folder(folders: Sequence[Path]) -> Path | None:
    """Return the first folder whose disk or quota is full, the folder for temporary files last; None if none is."""
    for folder in [*folders, _temporary_folder()]:
        existing = next((path for path in (folder, *folder.parents) if path.is_dir()), None)
        if existing is not None and _is_full(existing):
            return folder
    return None


def _is_full(folder: Path) -> bool:
    found = os.statvfs(folder)
    if found.f_bavail * found.f_frsize < _NEARLY_FULL or (found.f_files and not found.f_favail):
        return True
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"0" * _PROBE)
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return False


def _temporary_folder() -> Path:
    return Path(os.environ.get("TMPDIR", "/tmp"))


def _chain(error: BaseException) -> Iterator[tuple[BaseException, bool]]:
    """Yield an exception and those before it, each once, with whether it is the exception itself or a named cause."""
    seen: set[int] = set()
    link, is_cause = error, True
    while id(link) not in seen:
        seen.add(id(link))
        yield link, is_cause
        before = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
        if before is None:
            return
        is_cause = is_cause and link.__cause__ is not None
        link = before
