"""Let another process act before a step of an action: every order in which an action is interrupted once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loraflow.store import LocalStore

STEPS = ("rename", "replace", "link", "unlink", "mkdir", "open", "scandir")  # of the module os
READS = ("read_document", "documents")  # of the store
Act = Callable[[LocalStore], object]


def each_preemption(folder: Path, action: Act, other: Act) -> Iterator[LocalStore]:
    """Yield the store after each order: `other` happens as a whole before the first step of `action`, the second, and so on.

    A step changes or reads the disk. Each order begins with an empty store below `folder`. While `action` holds a lock of
    the store, `other` waits for its end, as another process does.
    """
    for step in itertools.count():
        preemption = _Preemption(LocalStore(folder / str(step)), step, other)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", lambda _: None)
            patch.setattr(LocalStore, "lock", preemption.lock(LocalStore.lock))
            for owner, names in ((os, STEPS), (LocalStore, READS)):
                for name in names:
                    patch.setattr(owner, name, preemption.before(getattr(owner, name)))
            action(preemption.store)
        if preemption.steps <= step:
            return
        yield preemption.store


class _Preemption:
    def __init__(self, store, step, other):
        self.store, self.step, self.other = store, step, other
        self.steps, self.is_locked, self.is_due = 0, False, False

    def before(self, call):
        def act_first(*arguments, **options):
            self.steps += 1
            if self.steps == self.step + 1:
                self.is_due = True
            self._act()
            return call(*arguments, **options)

        return act_first

    def lock(self, lock):
        @contextmanager
        def locked(*names):
            with lock(*names):
                outside, self.is_locked = self.is_locked, True
                yield
            self.is_locked = outside
            self._act()

        return locked

    def _act(self):
        if self.is_due and not self.is_locked:
            self.is_due = False
            self.other(self.store)
