"""Print how much of the source is typed: the number of `Any` that it names, and mypy's share of expressions of type Any.

python .ci/typing_report.py REPORT      REPORT: the folder that mypy's --any-exprs-report wrote
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("flows", "tasks", "loraflow")


def named() -> int:
    """Return how often the source names `Any`."""
    # loraflow/flows and loraflow/tasks are links: rglob does not follow them, so each file counts once.
    files = {path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")}
    return sum(len(re.findall(r"\bAny\b", path.read_text(encoding="utf-8"))) for path in files)


def share(report: Path) -> tuple[int, int]:
    """Return (expressions of type Any, all expressions)."""
    *_, total = report.joinpath("any-exprs.txt").read_text().splitlines()
    _, untyped, expressions, _ = total.split()
    return int(untyped), int(expressions)


if __name__ == "__main__":
    untyped, expressions = share(Path(sys.argv[1]))
    print(
        f"Any in the source: {named()}; expressions of type Any: {untyped / expressions:.1%} ({untyped} of {expressions})"
    )
