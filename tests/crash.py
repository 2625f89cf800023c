"""Let a function crash between two steps that change the disk, as a killed process does: nothing is tidied up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

STEPS = ("rename", "replace", "link", "unlink", "rmdir", "fsync", "mkdir")


class Crash(BaseException):
    """The process is dead: every later step raises this too, so that no `finally` changes the disk."""


@contextmanager
def crash_at(step: int | None) -> Iterator[list[str]]:
    """Crash before the step of this number, counted from 0; yield the names of the steps that were done.

    With None nothing crashes. `fsync` is a step, but does nothing: the tests' disk does not lose power.
    """
    done: list[str] = []
    real = {name: getattr(os, name) for name in STEPS}
    dead = False

    def replaced(name):
        def call(*args, **options):
            nonlocal dead
            dead = dead or len(done) == step
            if dead:
                raise Crash(f"before step {step}: {name}")
            done.append(name)
            return None if name == "fsync" else real[name](*args, **options)

        return call

    for name in STEPS:
        setattr(os, name, replaced(name))
    try:
        yield done
    finally:
        for name in STEPS:
            setattr(os, name, real[name])
