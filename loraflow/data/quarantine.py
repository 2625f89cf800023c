"""quarantine.jsonl of check_dataset: the rows that are left out, with the reason. It is written as rows are read."""

from __future__ import annotations

from collections import Counter
from typing import IO, TypedDict

from loraflow.data.split import to_json

FIRST = 5  # problems in the report


class Quarantined(TypedDict):
    """A line of quarantine.jsonl."""

    place: str  # file:line, or file:row
    set: str  # train, or the name of a held-out set
    problem: str
    row: str  # the row's text; empty if the row is valid but was dropped


class Quarantine:
    """Count the rows that are left out, and write them.

    Args:
        file: quarantine.jsonl, open for writing.

    Attributes:
        counts: reason → rows, with other counts of the report.
    """

    def __init__(self, file: IO[str]):
        self._file = file
        self.counts: Counter[str] = Counter()
        self._malformed: list[str] = []  # the first malformed rows, which can stop the run
        self._others: list[str] = []

    def add(self, reason: str, place: str, set_name: str, problem: str, raw: str = "", *, first: bool = False) -> None:
        """Count and write a row.

        Args:
            reason: its key in the report's counts.
            place: where it was read.
            set_name: its set.
            problem: the reason as a sentence.
            raw: the row's text, unless it is valid.
            first: whether the report names it before others.
        """
        self.counts[reason] += 1
        line: Quarantined = {"place": place, "set": set_name, "problem": problem, "row": raw}
        self._file.write(to_json(line) + "\n")
        problems = self._malformed if first and len(self._malformed) < FIRST else self._others
        if len(problems) < FIRST:
            problems.append(f"{place}: {problem}")

    def first_problems(self) -> list[str]:
        """Return places and problems of the first rows: the malformed ones before the others."""
        return [*self._malformed, *self._others][:FIRST]
