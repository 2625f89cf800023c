"""docs/faults.md accounts for every fault, and names tests that exist and passed."""

import re
from functools import cache

from tests.faults.page import PAGE, ROOT, cases_of, node_ids, render
from tests.faults.table import FAULTS


@cache
def functions(file):
    return set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / file).read_text(), re.MULTILINE))


def test_every_fault_is_shown_by_a_test_that_exists_or_struck_out_with_a_reason():
    assert [fault.number for fault in FAULTS] == list(range(1, 73))
    for fault in FAULTS:
        assert bool(fault.tests) != bool(fault.struck), fault.number
    missing = [
        test
        for test in node_ids([])
        if test.partition("::")[2].partition("[")[0] not in functions(test.partition("::")[0])
    ]
    assert missing == []


def test_the_page_is_written_from_the_table_and_nothing_failed():
    def without_cases(page):
        return [re.sub(r"\|[^|]*\| `test_", "| `test_", line) for line in page.splitlines()]

    text = PAGE.read_text(encoding="utf-8")
    assert without_cases(text) == without_cases(render({})), "`make test-faults` writes it"
    assert " failed" not in text


def test_a_fault_of_which_no_test_was_run_keeps_the_cases_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    assert render({}, text) == text
    first = next(fault for fault in FAULTS if fault.number == 3)
    again = cases_of(render({first.tests[0]: "failed"}, text))
    assert again[3] == "1 failed" and {**again, 3: cases_of(text)[3]} == cases_of(text)
