"""Locks between processes of one host: `flock`, which the kernel releases when its holder dies."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


class LockHeld(Exception):
    """Another process holds the lock, and the caller asked not to wait."""


@contextmanager
def flock(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Hold a lock on a file.

    Raises:
        LockHeld: with `wait=False`, if another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a+") as file:
        try:
            fcntl.flock(file, mode | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise LockHeld(str(path)) from None
            log.info("waiting for %s, held by %s", path.name, _holder(path))
            fcntl.flock(file, mode)
        if not shared:
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid()}))
            file.flush()
        yield


def _holder(path: Path) -> str:
    text = path.read_text().strip()
    return f"process {json.loads(text)['pid']}" if text.startswith("{") and text.endswith("}") else "another process"
