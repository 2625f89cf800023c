"""The counts of `loraflow data check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraflow.data.broken_text import has_carriage_return
from loraflow.data.chat_table import source_of
from loraflow.data.readers import is_answer_learned, is_partly_learned
from loraflow.data.split import prompt_key
from loraflow.data.unread_values import doubtful

if TYPE_CHECKING:
    from loraflow.data.findings import Detector
    from loraflow.data.readers import Row


@dataclass
class RowCounts:
    """What `loraflow data check` counts in the rows."""

    rows: int = 0
    partly: int = 0  # rows of which some answers are learned
    weighted: int = 0
    marks: Counter[str] = field(default_factory=Counter)  # rows that are not learned, by their mark
    prompts: set[str] = field(default_factory=set)  # at most two
    problems: list[dict[str, str]] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)  # keys that are not read
    told: Counter[tuple[str, str]] = field(default_factory=Counter)  # what they say
    returns: int = 0  # rows with carriage returns
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, set_name: str, detector: Detector, *, by_source: bool) -> None:
        """Count a row. The detector gets it if it is learned."""
        self.rows += 1
        if by_source:
            self.sources[source_of(row.place)] += 1
        self.unread.update(row.unused_keys)
        self.told.update(row.told)
        if row.is_marked_false:
            self.marks[row.marked_by] += 1
        elif row.messages is None:
            self.problems.append({"place": row.place, "problem": row.problem or ""})
        else:
            self.returns += has_carriage_return(message["content"] for message in row.messages)
            detector.add(row.place, set_name, row.messages, is_learned=is_answer_learned(row))
            self.partly += is_partly_learned(row)
            self.weighted += row.weights is not None
            if len(self.prompts) < 2:
                self.prompts.add(prompt_key(row.messages))

    def document(self, columns: dict[str, str], unread: Counter[str], found: dict[str, object]) -> dict[str, object]:
        """Return the document of --json. `found` has what the detector found."""
        return {
            "rows": self.rows,
            "malformed": len(self.problems),
            "marked_false": self.marks.total(),
            "partly_marked": self.partly,
            **({"weighted": self.weighted} if self.weighted else {}),
            "columns": columns,
            "unread": dict(unread),
            **({"doubtful": found_doubts} if (found_doubts := doubtful(self.told, unread)) else {}),
            **({"carriage_returns": self.returns} if self.returns else {}),
            "problems": self.problems,
            **found,
            **({"sources": dict(self.sources)} if self.sources else {}),
            **({"marks": dict(self.marks)} if self.marks else {}),
        }
