"""The ways in which a stage can fail. A failure says what happened and where, what was expected, and what to do next.

A failure passes between processes as JSON (`to_dict`, `from_dict`): the worker writes it, and the launcher raises it
again. Whether a retry can help is a property of the class, not a decision of the code that catches the failure.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

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
        self.what, self.where, self.expected, self.got, self.next_step = what, where, expected, got, next_step
        self.details = details
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:    {self.where}")
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.got:
            lines.append(f"  got:      {self.got}")
        if self.next_step:
            lines.append(f"  next:     {self.next_step}")
        return "\n".join(lines)

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


class LimitExceeded(Failure):
    """A report exceeds a limit of the recipe, so the run stops."""

    kind = "inadmissible"


class DiskFull(Failure):
    """The store's disk is full, or has too little space for the result."""

    kind = "disk_full"


class ReadOnlyStore(Failure):
    """The store cannot be written."""

    kind = "read_only_store"


class OutOfMemory(Failure):
    """The device or the host ran out of memory. The launcher tries again with half the micro-batch."""

    kind = "out_of_memory"


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


class Network(Failure):
    """A remote service did not answer."""

    kind, retryable = "network", True


_CLASSES: dict[str, type[Failure]] = {}


def _collect(cls: type[Failure]) -> None:
    _CLASSES[cls.kind] = cls
    for sub in cls.__subclasses__():
        _collect(sub)


_collect(Failure)


def failure_names() -> list[str]:
    """Return the names of all classes of failures."""
    return [cls.__name__ for cls in _CLASSES.values()]


def from_dict(data: Mapping[str, JsonValue]) -> Failure:
    """Rebuild a failure from the values of `to_dict`. An unknown kind becomes a plain `Failure`."""
    cls = _CLASSES.get(str(data.get("kind", "")), Failure)
    texts = {key: str(data.get(key, "")) for key in ("where", "expected", "got", "next_step")}
    failure = cls(str(data["what"]), **texts)
    details = data.get("details")
    if isinstance(details, dict):
        failure.details.update(details)
    return failure


def from_os_error(error: OSError, where: str) -> Failure | None:
    """Return the failure for a full disk, a read-only store or a file without permission; None for any other OSError.

    `where` is the store's folder, or the stage if the folder is unknown.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            "The disk is full.",
            where=str(error.filename or where),
            next_step="free space (`loraflow gc` removes what no run needs), or set runtime.store to another disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM) and error.filename and not str(error.filename).startswith(where):
        return Failure(
            "A file cannot be read or written.",
            where=str(error.filename),
            got=error.strerror or type(error).__name__,
            next_step="correct its permissions",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReadOnlyStore(
            "The store cannot be written.",
            where=str(error.filename or where),
            got=error.strerror or type(error).__name__,
            next_step="set runtime.store to a folder that you may write to, or correct its permissions",
        )
    return None
