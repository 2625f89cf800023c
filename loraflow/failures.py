"""The ways in which a stage can fail. A failure says what happened and where, what was expected, and what to do next.

A failure passes between processes as JSON (`to_dict`, `from_dict`): the worker writes it, and the launcher raises it
again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loraflow.credentials import mask, mask_json

if TYPE_CHECKING:
    from pydantic import JsonValue


class Failure(Exception):
    """A failure with a next step. Prefect retries `retryable` failures; the stage then resumes where it stopped.

    Args:
        what: what is wrong, in one sentence.
        where: the file, key or stage that is concerned.
        expected: what would be right.
        got: what was found instead.
        next_step: what to do next, preferably a command.
        details: further JSON values for the code that handles the failure.
    """

    kind: ClassVar[str] = "failure"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        expected: str = "",
        got: str = "",
        next_step: str = "",
        **details: JsonValue,
    ):
        # git, DVC and boto3 repeat URLs and headers in their errors, and a failure goes to terminal, logs and database.
        self.what, self.where, self.expected = mask(what), mask(where), mask(expected)
        self.got, self.next_step = mask(got), mask(next_step)
        self.details = {key: mask_json(value) for key, value in details.items()}
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = {"where": self.where, "expected": self.expected, "got": self.got, "next": self.next_step}
        return "\n".join([self.what, *(f"  {name + ':':<10}{text}" for name, text in lines.items() if text)])

    def __reduce__(self) -> tuple[Callable[[Mapping[str, JsonValue]], Failure], tuple[dict[str, JsonValue]]]:
        return (from_dict, (self.to_dict(),))

    def to_dict(self) -> dict[str, JsonValue]:
        """Return the failure as JSON values."""
        return {
            "kind": self.kind,
            "what": self.what,
            "where": self.where,
            "expected": self.expected,
            "got": self.got,
            "next_step": self.next_step,
            "details": self.details,
        }


class BadConfig(Failure):
    """The recipe or the command line is wrong."""

    kind, exit_code = "bad_config", 2


class BadPlacement(BadConfig):
    """The recipe places a stage on a work pool that cannot run it: no deployment, no worker, or another store."""

    kind = "bad_placement"


class BadData(Failure):
    """The dataset cannot be used: it is unreadable or malformed, or no row is left to train on."""

    kind = "bad_data"


class DirtyData(BadData):
    """The files in the work tree differ from the version that the `.dvc` file pins."""

    kind = "dirty_data"


class MissingData(BadData):
    """A pinned file is not in the work tree, in the DVC cache, or in the DVC remote."""

    kind = "missing_data"


class BadModel(Failure):
    """The base model or adapter cannot be used."""

    kind = "bad_model"


class MissingExtra(Failure):
    """An optional dependency, or the hardware that it needs, is missing."""

    kind, exit_code = "missing_extra", 2


class CorruptArtifact(Failure):
    """An artifact's content differs from its manifest. The artifact was moved to `set-aside/` and will be recomputed."""

    kind = "corrupt_artifact"


class DamagedLog(CorruptArtifact):
    """A promotion log lost entries or was changed. Unlike an artifact, it cannot be recomputed: a person must decide."""

    kind = "damaged_log"


class LimitExceeded(Failure):
    """A report exceeds a limit of the recipe, so the run stops."""

    kind = "inadmissible"


class DiskFull(Failure):
    """The store's disk is full, or has too little space for the result."""

    kind = "disk_full"


class StorageError(Failure):
    """A disk or a network file system failed to read or write. It may work again in a moment."""

    kind, retryable = "storage_error", True


class ReadOnlyStore(Failure):
    """The store cannot be written."""

    kind = "read_only_store"


class OutOfMemory(Failure):
    """The device or the host ran out of memory. The launcher tries again with half the micro-batch."""

    kind = "out_of_memory"


class CannotGroup(Failure):
    """Trials of a sweep cannot be trained in one process. A sweep then trains each by itself."""

    kind = "cannot_group"


class NonFiniteLoss(Failure):
    """The loss or a gradient became NaN or infinite."""

    kind = "non_finite_loss"


class DeadlineExceeded(Failure):
    """The stage ran longer than its deadline."""

    kind = "deadline"


class Crashed(Failure):
    """The worker ended for an unknown reason."""

    kind = "crashed"


class Preempted(Failure):
    """The worker was asked to stop (SIGTERM). A retry resumes from the last checkpoint."""

    kind, retryable = "preempted", True


class Killed(Failure):
    """The worker was killed (SIGKILL). A retry resumes from the last checkpoint."""

    kind, retryable = "killed", True


class BudgetSpent(Preempted):
    """The run used the time of `runtime.max_hours`. Another run resumes from the last checkpoint; a retry would not help."""

    kind, retryable = "budget_spent", False


class Stalled(Failure):
    """The worker made no progress for too long. A retry resumes from the last checkpoint."""

    kind, retryable = "stalled", True


class Network(Failure):
    """A remote service did not answer."""

    kind, retryable = "network", True


_CLASSES: dict[str, type[Failure]] = {}


def _collect(cls: type[Failure]) -> None:
    _CLASSES[cls.kind] = cls
    for sub in cls.__subclasses__():
        _collect(sub)


_collect(Failure)


@contextmanager
def mask_errors() -> Iterator[None]:
    """Replace an unexpected exception whose message has a credential: Prefect saves messages in its database.

    Raises:
        Crashed: in its place, with the masked message.
    """
    try:
        yield
    except Failure:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if mask(text) == text:
            raise
        raise Crashed(
            "An unexpected error occurred.", got=text[:2000], next_step="this is probably a bug in loraflow: report it"
        ) from None


def failure_names() -> list[str]:
    """Return the names of all classes of failures."""
    return [cls.__name__ for cls in _CLASSES.values()]


def from_dict(data: Mapping[str, JsonValue]) -> Failure:
    """Rebuild a failure from the values of `to_dict`."""
    cls = _CLASSES.get(str(data.get("kind", "")), Failure)
    texts = {key: str(data.get(key, "")) for key in ("where", "expected", "got", "next_step")}
    failure = cls(str(data["what"]), **texts)
    details = data.get("details")
    if isinstance(details, dict):
        failure.details.update(details)
    return failure


def from_os_error(error: OSError, where: str) -> Failure | None:
    """Return the failure for an error of a disk, a file system or a limit of the process; None for any other OSError.

    `where` is the store's folder, or the stage if the folder is unknown.
    """
    number, path = error.errno, error.filename if isinstance(error.filename, str) and error.filename else where
    got = error.strerror or type(error).__name__
    if number in _NO_SPACE:
        target = error.filename2  # the target of a copy, link or rename: its disk is the one that is full
        return disk_full(target if isinstance(target, str) and target else path, number)
    if number in (errno.EACCES, errno.EPERM) and not path.startswith(where):
        return Failure("A file cannot be read or written.", where=path, got=got, next_step="correct its permissions")
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReadOnlyStore(
            "The store cannot be written.",
            where=path,
            got=got,
            next_step="set runtime.store to a folder that you may write to, or correct its permissions",
        )
    known = _SENTENCES.get(number or 0)
    if known is None:
        return None
    cls, what, next_step = known
    if isinstance(error.filename2, str):
        path += f" → {error.filename2}"
    return cls(what, where=path, got=got, next_step=next_step)


def from_library_error(error: BaseException, where: str) -> Failure | None:
    """Return the failure of a disk behind an error of a library; None for any other cause."""
    for cause in (error, error.__cause__):
        known = from_os_error(cause, where) if isinstance(cause, OSError) else None
        if isinstance(known, ReadOnlyStore):  # a remote refused it; but for a library's cache, a file is named
            if known.where == where:
                continue
            known = Failure(
                "A file cannot be written.", where=known.where, got=known.got, next_step="name another cache"
            )
        if known is not None:
            return known
    return None


def of_machine(failure: Failure) -> Failure:
    """Return the fault of the machine behind a failure that takes a file for damaged; else the failure."""
    cause = failure.__cause__
    if isinstance(cause, OSError) and cause.errno in MACHINE_FAULTS and isinstance(failure, BadData | BadModel):
        found = from_os_error(cause, failure.where) or failure
        if cause.errno in DISK_FAULTS:  # the file is not of the store, so no run recomputes it
            found.next_step = f"check the disk (`dmesg`); if only this file is damaged: {failure.next_step}"
        return found
    return failure


def first_line(error: BaseException) -> str:
    """Return an error's type and first line, masked before it is cut."""
    return mask(f"{type(error).__name__}: {error}".splitlines()[0])[:300]


def disk_full(where: str, number: int = errno.ENOSPC) -> DiskFull:
    """Return the failure for a disk, a quota or a file that cannot take more bytes, with what is free at `where`."""
    what, next_step = _NO_SPACE[number]
    return DiskFull(what, where=where, got=free_space(where), next_step=next_step)


def free_space(location: str) -> str:
    """Return what is free on the disk of a path, for a message; an empty string if that is unknown."""
    path = Path(location)
    if not path.is_absolute():
        return ""
    try:
        found = os.statvfs(next(folder for folder in (path, *path.parents) if folder.exists()))
    except OSError:
        return ""
    free = found.f_bavail * found.f_frsize
    inodes = ", but no inode: a file system has a limit of files too" if found.f_files and not found.f_favail else ""
    return f"{free / 2**20:,.1f} MiB free{inodes}"


_MAKE_SPACE = (
    "free space (`loraflow gc` removes what no run needs), or set runtime.store to another disk; then run again"
)
# What is wrong and what to do, by the errors that mean "no more bytes".
_NO_SPACE = {
    errno.ENOSPC: ("The disk is full.", _MAKE_SPACE),
    errno.EDQUOT: ("The disk quota is used up.", _MAKE_SPACE),
    errno.EFBIG: (
        "The file is larger than a limit of the file system or of this process allows.",
        "raise the limit (`ulimit -f unlimited`), or set runtime.store to another file system; then run again",
    ),
}
_FILE_SYSTEM_GONE = "check that the file system is mounted and its server answers; then run again"
_TOO_MANY_FILES = "raise the limit (`ulimit -n 65536`), or lower runtime.processes and runtime.threads; then run again"
# The class, what is wrong and what to do, by the other errors that say something about the machine and not about our code.
_SENTENCES: dict[int, tuple[type[Failure], str, str]] = {
    errno.EIO: (
        StorageError,
        "The disk reported an input/output error.",
        "check the disk (`dmesg`); if only a file of the store is damaged, remove its folder: the next run recomputes it",
    ),
    errno.ESTALE: (StorageError, "The network file system replaced a file that is in use.", _FILE_SYSTEM_GONE),
    errno.ENOTCONN: (StorageError, "The file system is not connected.", _FILE_SYSTEM_GONE),
    errno.EHOSTDOWN: (StorageError, "The file system's server is down.", _FILE_SYSTEM_GONE),
    errno.EMFILE: (Failure, "This process has too many open files.", _TOO_MANY_FILES),
    errno.ENFILE: (
        Failure,
        "The system has too many open files.",
        "close other programs, or raise `sysctl fs.file-max`",
    ),
    errno.ENOMEM: (
        OutOfMemory,
        "The system has no memory left.",
        "close other programs, or use a machine with more memory",
    ),
    errno.ENOLCK: (
        Failure,
        "The file system cannot lock files.",
        "set runtime.store to a folder on a local disk, or mount it with locks (NFS: with lockd, not `nolock`)",
    ),
    errno.ENAMETOOLONG: (
        Failure,
        "A path is too long for the file system.",
        "use shorter names, or a shorter runtime.store",
    ),
    errno.ELOOP: (Failure, "A path has too many symbolic links, perhaps in a circle.", "correct the links"),
    errno.EMLINK: (
        Failure,
        "The file system allows no more links to a file or folders in one.",
        "set runtime.store to another file system",
    ),
    errno.ENOTDIR: (Failure, "A part of the path is a file and not a folder.", "correct the path, or remove the file"),
    errno.EISDIR: (Failure, "A folder exists where a file is expected.", "correct the path, or remove the folder"),
}
# Errors of a disk, which may never read the file again. macOS lacks two of them.
DISK_FAULTS = frozenset(getattr(errno, name, errno.EIO) for name in ("EIO", "EBADMSG", "EREMOTEIO", "EUCLEAN"))
_SENTENCES |= dict.fromkeys(DISK_FAULTS, _SENTENCES[errno.EIO])
# Errors that say nothing about the file: it may be intact, and is not to be taken for missing or damaged.
MACHINE_FAULTS = DISK_FAULTS | {
    errno.ESTALE, errno.ENOTCONN, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOLCK,
    errno.ENOMEM,
}  # fmt: skip
