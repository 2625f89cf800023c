"""Run the tests of the faults and write docs/faults.md: `make test-faults`, or `python -m tests.faults [NUMBER ...]`.

The results are collected in `build/faults.json`, so that the tests of some faults can be run again. Without this file, the
faults of which no test was run keep the cases that the page has.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from tests.faults.page import FAULTS, PAGE, ROOT, belongs, node_ids, render

RESULTS = ROOT / "build" / "faults.json"


class Collector:
    """A plugin of pytest that collects the outcome of each test."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the outcome of a test, or that of its setup if that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.removeprefix("tests/")] = report.outcome


def main() -> int:
    """Run the tests, write results and page, and return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, help=f"faults, 1 to {FAULTS[-1].number}; all by default")
    parser.add_argument("--quick", action="store_true", help="leave out the tests that are marked slow, gpu or ui")
    parser.add_argument("--folder", default="", help="only the tests below this folder of tests/, such as unit")
    parser.add_argument("--missing", action="store_true", help="only the tests that have no result yet")
    parser.add_argument("--most", type=int, help="at most this many tests")
    arguments = parser.parse_args()
    before = json.loads(RESULTS.read_text()) if arguments.missing and RESULTS.exists() else {}
    tests = [test for test in node_ids(arguments.numbers) if test.startswith(arguments.folder)]
    tests = [test for test in tests if not any(belongs(name, test) for name in before)][: arguments.most]
    if not tests:
        print("every test has a result")
        return 0
    collector = Collector()
    options = ["-q", "-p", "no:cacheprovider", *(["-m", "not slow and not gpu and not ui"] if arguments.quick else [])]
    code = pytest.main([*options, *(str(ROOT / "tests" / test) for test in tests)], plugins=[collector])
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = {name: outcome for name, outcome in known.items() if any(belongs(name, test) for test in node_ids([]))}
    save(RESULTS, json.dumps({**kept, **collector.outcomes}, indent=1, sort_keys=True))
    save(PAGE, render({**kept, **collector.outcomes}, PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""))
    return int(code)


def save(path: Path, text: str) -> None:
    """Write a file, and its folder."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
