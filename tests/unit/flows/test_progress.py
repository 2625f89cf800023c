"""The progress of a stage, in the log and in Prefect's UI."""

from types import SimpleNamespace
from uuid import uuid4

import pytest

from loraflow.tasks import events


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time in seconds, which a test sets."""
    now = [1000.0]
    monkeypatch.setattr(events, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(events, "create_progress_artifact", lambda **_: uuid4())
    monkeypatch.setattr(events, "update_progress_artifact", lambda *_, **__: None)
    return now


def test_a_stage_that_names_no_time_left_gets_one_from_its_progress(clock, caplog):
    """Answers for 160 rows, of which 40 are those of an interrupted evaluation."""
    caplog.set_level("INFO")
    progress = events.ProgressArtifact("evaluate base")
    for seconds, done in ((0, 40), (60, 70), (120, 100), (240, 160)):
        clock[0] = 1000.0 + seconds
        progress.show_figures({"done": done, "total": 160})
    assert [record.message for record in caplog.records] == [
        "evaluate base 40/160",
        "evaluate base 70/160, 180 s left",
        "evaluate base 100/160, 120 s left",
        "evaluate base 160/160",
    ]


def test_a_training_names_its_own(clock, caplog):
    caplog.set_level("INFO")
    progress = events.ProgressArtifact("train")
    for seconds, step in ((0, 1), (60, 2)):
        clock[0] = 1000.0 + seconds
        progress.show_figures({"step": step, "total": 9, "loss": 0.5, "tokens_per_second": 1234.0, "eta_seconds": 77.0})
    assert caplog.records[-1].message == "train 2/9, loss 0.5000, 1,234 tokens/s, 77 s left"
