"""Write docs/faults.md from the table of faults and the results of its tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.faults.table import FAULTS, Fault

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "faults.md"
Results = Mapping[str, str]  # {test id: passed, failed or skipped}
_HEAD = """# Faults

What was injected, by stage, and what happened. `make test-faults` runs these tests and writes this page; the table is
`tests/faults/table.py`. "Cases" counts the injections of the last run: parameters of a test, not repetitions inside one.
A test that was skipped needs hardware or programs that the machine of the last run did not have: a GPU (`make test-gpu`),
a browser (`make test-ui`), an S3 server (`make test-s3`), Postgres. A test that was not run is one that the last run left out:
`python -m tests.faults --quick` leaves out slow ones, `python -m tests.faults 6 31` runs those of two faults and adds them.

Random kills of whole runs are measured by `benchmarks/chaos.py` ([performance.md](performance.md#recovery-after-a-kill)), files
from outside are fuzzed by `make fuzz`.

| # | fault | stage | injected | what happens | cases | shown by |
|---:|---|---|---|---|---|---|
"""


def render(results: Results, before: str = "") -> str:
    """Return the page.

    Args:
        results: of the tests.
        before: the page of an earlier run: a fault of which no test has a result keeps its cases.
    """
    struck = [fault for fault in FAULTS if fault.struck]
    earlier = cases_of(before)
    lines = [_line(fault, results, earlier) for fault in FAULTS if not fault.struck]
    left_out = [f"- ~~{fault.number}. {fault.fault} ({fault.stage})~~: {fault.struck}." for fault in struck]
    return "\n".join([_HEAD.rstrip("\n"), *lines, "", "## Struck out", "", *left_out, ""])


def cases_of(page: str) -> dict[int, str]:
    """Return the cases of each fault that a page has."""
    rows = [[cell.strip() for cell in line.replace("\\|", "").split("|")] for line in page.splitlines()]
    return {int(row[1]): row[6] for row in rows if len(row) == 9 and row[1].isdigit()}


def _line(fault: Fault, results: Results, earlier: Mapping[int, str]) -> str:
    has_result = any(belongs(name, test) for name in results for test in fault.tests)
    found = cases(fault, results) if has_result else earlier.get(fault.number, cases(fault, results))
    shown = "<br>".join(f"`{test.partition('::')[2]}`" for test in fault.tests)
    cells = (fault.number, fault.fault, fault.stage, fault.injected, fault.happens, found, shown)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def cases(fault: Fault, results: Results) -> str:
    """Return how many cases of a fault's tests passed, failed and were skipped."""
    outcomes = [outcome for name, outcome in results.items() if any(belongs(name, test) for test in fault.tests)]
    counts = {outcome: outcomes.count(outcome) for outcome in ("passed", "failed", "skipped")}
    found = [f"{count} {outcome}" for outcome, count in counts.items() if count]
    not_run = sum(not any(belongs(name, test) for name in results) for test in fault.tests)
    left = f"{not_run} {'test' if not_run == 1 else 'tests'} not run"
    return ", ".join([*found, *([left] if not_run else [])])


def belongs(name: str, test: str) -> bool:
    """Tell whether a result is of a test, or of one of its cases."""
    return name == test or name.startswith(f"{test}[")


def node_ids(numbers: Sequence[int]) -> list[str]:
    """Return the tests of some faults, each once; of all faults if no number is given."""
    return list(
        dict.fromkeys(test for fault in FAULTS if not numbers or fault.number in numbers for test in fault.tests)
    )
