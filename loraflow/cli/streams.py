"""Make the standard streams usable, however the command was started."""

from __future__ import annotations

import io
import os
import sys


def prepare_streams() -> None:
    """Open streams that are closed, and let no character stop the output.

    With a closed descriptor 1, the next file that is opened would get that number, and output would be written into it.
    JSON is UTF-8 whatever the locale is; in other output a character that the locale lacks is replaced.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        if "--json" in sys.argv:
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        else:
            sys.stdout.reconfigure(errors="replace")


def can_flush() -> bool:
    """Return whether what was printed can be written; not if its disk is full, for example."""
    try:
        sys.stdout.flush()
    except OSError:
        return False
    return True


def drop_output() -> None:
    """Send what was and will be printed nowhere, as its target is gone. Python flushes the stream when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
