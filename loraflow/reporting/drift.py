"""The part of a run's report about the training rows since the champion."""

from __future__ import annotations

from collections.abc import Iterator

from loraflow.data.drift import DataDrift


def drift_lines(drift: DataDrift | None) -> Iterator[str]:
    """Yield what changed since the champion's training rows, as markdown; nothing if it was not measured."""
    if drift is not None:
        yield from ("## Training rows since the champion", "")
        yield from (f"- {line.replace('|', chr(92) + '|')}" for line in drift.lines)
        yield ""
