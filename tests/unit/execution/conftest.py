"""Fixtures for tests of the launcher."""

from __future__ import annotations

import pytest

from loraflow.execution import launcher
from loraflow.stages import STAGES
from tests.fake_jobs import FAKE
from tests.fake_worker import FAKE_STAGE


@pytest.fixture
def fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the launcher start `tests/fake_worker.py` for jobs of a stage that only tests have."""
    monkeypatch.setattr(launcher, "WORKER", FAKE)
    monkeypatch.setitem(STAGES, FAKE_STAGE.name, FAKE_STAGE)
