"""The lock of a project's folder: commands that write its files do so one after another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click

from loraflow.store.lock import LockHeld, flock

FILE = Path(".loraflow", "project.lock")


@contextmanager
def project_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a project's folder; say so before waiting for another command that holds it."""
    with ExitStack() as held:
        try:
            held.enter_context(flock(folder / FILE, wait=False))
        except LockHeld:
            click.echo("waiting for another loraflow command that writes the files of this project", err=True)
            held.enter_context(flock(folder / FILE))
        yield
