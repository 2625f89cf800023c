"""Values that an evaluation and the gate produce. Imports neither numpy nor pandas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["promote", "reject", "undecided", "unchanged"]


@dataclass(frozen=True)
class Decision:
    """A verdict with its reasons, and the comparisons behind it."""

    verdict: Verdict
    reasons: list[str]
    comparisons: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"verdict": self.verdict, "reasons": self.reasons, "comparisons": self.comparisons}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Return the decision that `to_dict` gave."""
        return cls(values["verdict"], list(values["reasons"]), list(values["comparisons"]))
