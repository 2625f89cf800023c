"""The ways a stage can fail. Each says what happened, where, what was expected, and what to do next.

A failure crosses a process border as JSON (`to_dict`, `from_dict`): the worker writes it, the launcher raises
it again. Whether a retry can help belongs to the class, not to the place that catches it.
"""

from __future__ import annotations

import errno
from typing import Any, ClassVar


class Failure(Exception):
    """A failure with a next step. `retryable` failures are repeated by Prefect and resume where they stopped."""

    kind: ClassVar[str] = "failure"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(
        self, what: str, *, where: str = "", expected: str = "", got: str = "", next_step: str = "", **details: Any
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

    def __reduce__(self):
        return (from_dict, (self.to_dict(),))

    def to_dict(self) -> dict[str, Any]:
        """Return the failure as plain JSON values."""
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
    """The dataset is wrong: unreadable, malformed, or nothing is left to train on."""

    kind = "bad_data"


class DirtyData(BadData):
    """The files in the work tree are not the ones that the `.dvc` file pins."""

    kind = "dirty_data"


class MissingData(BadData):
    """A pinned file is neither in the work tree nor in the DVC cache nor in its remote."""

    kind = "missing_data"


class BadModel(Failure):
    """The base model or adapter cannot be used."""

    kind = "bad_model"


class MissingExtra(Failure):
    """An optional dependency, or the hardware that it needs, is not there."""

    kind, exit_code = "missing_extra", 2


class CorruptArtifact(Failure):
    """An artifact's content is not what its manifest says. It was set aside and will be made again."""

    kind = "corrupt_artifact"


class Inadmissible(Failure):
    """A report is outside the bounds that the recipe sets, so the run does not go on."""

    kind = "inadmissible"


class DiskFull(Failure):
    """The store's disk is full, or would be."""

    kind = "disk_full"


class ReadOnlyStore(Failure):
    """The store cannot be written."""

    kind = "read_only_store"


class OutOfMemory(Failure):
    """The device's or the host's memory did not suffice. The launcher answers it with half the micro-batch."""

    kind = "out_of_memory"


class NonFiniteLoss(Failure):
    """The loss or a gradient became NaN or infinite."""

    kind = "non_finite_loss"


class DeadlineExceeded(Failure):
    """The stage ran past its deadline."""

    kind = "deadline"


class Crashed(Failure):
    """The worker ended in a way that we do not know."""

    kind = "crashed"


class Preempted(Failure):
    """The worker was asked to end (SIGTERM). A retry resumes from the last checkpoint."""

    kind, retryable = "preempted", True


class Killed(Failure):
    """The worker was killed (SIGKILL). A retry resumes from the last checkpoint."""

    kind, retryable = "killed", True


class Network(Failure):
    """A remote did not answer."""

    kind, retryable = "network", True


_CLASSES: dict[str, type[Failure]] = {}


def _collect(cls: type[Failure]) -> None:
    _CLASSES[cls.kind] = cls
    for sub in cls.__subclasses__():
        _collect(sub)


_collect(Failure)


def from_dict(data: dict[str, Any]) -> Failure:
    """Rebuild a failure that `to_dict` wrote. An unknown kind becomes a plain `Failure`."""
    cls = _CLASSES.get(data.get("kind", ""), Failure)
    return cls(
        data["what"],
        where=data.get("where", ""),
        expected=data.get("expected", ""),
        got=data.get("got", ""),
        next_step=data.get("next_step", ""),
        **data.get("details", {}),
    )


def from_os_error(error: OSError, where: str) -> Failure | None:
    """Translate a full disk, a read-only store or a file of somebody else's; return None for any other OSError.

    `where` is the store's folder, or the stage where that is not known.
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
            next_step="mend its permissions",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ReadOnlyStore(
            "The store cannot be written.",
            where=str(error.filename or where),
            got=error.strerror or type(error).__name__,
            next_step="set runtime.store to a folder that you may write, or mend its permissions",
        )
    return None
