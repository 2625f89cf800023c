"""How training rows changed since the champion, and whether a retraining waits for more. `compare.py` measures it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraflow.frozen import StoredModel

if TYPE_CHECKING:
    from loraflow.data.checks.check_report import CheckReport


class DataDrift(StoredModel):
    """What changed between the champion's training rows and new ones."""

    before: int  # rows
    after: int
    added: int = 0
    removed: int = 0
    edited: int = 0
    shift: float = 0.0  # the largest one, from 0 to 1
    shifted: str = ""  # what has it
    lines: list[str] = []  # for people
    lengths: dict[
        str, list[tuple[float, float]]
    ] = {}  # of answers, before and now: characters, and the share up to them

    @property
    def changed(self) -> int:
        """The number of rows that were added, removed or edited."""
        return self.added + self.removed + self.edited


class StoredSource(StoredModel):
    """A source of a mixture, as an artifact of check_dataset names it, and how its files are read."""

    name: str
    files: list[str] = ["*"]
    query: str | None = None


class StoredSources(StoredModel):
    """The part of check_dataset's config that names its sources. Those of earlier versions are read too."""

    sources: list[StoredSource] = []


def unchanged_rows(report: CheckReport) -> DataDrift:
    """Return the drift of a dataset whose training rows are the champion's."""
    rows = report.rows.train + report.rows.validation
    return DataDrift(before=rows, after=rows, lines=["the training rows are those of the champion"])


def why_wait(drift: DataDrift | None, min_changed_rows: int, min_shift: float) -> str:
    """Return why a retraining waits for more data; empty if it does not.

    Args:
        drift: None if there is no champion, or its rows are gone: then nothing waits.
        min_changed_rows: enough rows that were added, removed or edited; 0 asks for nothing.
        min_shift: a large enough shift; 0 asks for nothing. One of the two is enough.
    """
    if drift is None or not (min_changed_rows or min_shift):
        return ""
    if (min_changed_rows and drift.changed >= min_changed_rows) or (min_shift and drift.shift >= min_shift):
        return ""
    asked = [f"{min_changed_rows} changed rows (min_changed_rows)"] if min_changed_rows else []
    asked += [f"a shift of {min_shift:g} (min_shift)"] if min_shift else []
    what = f", {drift.shifted}" if drift.shifted else ""
    return (
        f"The data changed too little since the champion: {drift.changed} training rows, and a largest shift of "
        f"{drift.shift:.3f}{what}; {' or '.join(asked)} would be enough."
    )
