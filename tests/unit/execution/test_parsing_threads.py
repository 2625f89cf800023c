"""CPython before 3.11.8 raises SystemError if two threads parse Python at once (bug 106905), and Prefect has threads."""

import ast
import inspect
import sys
import threading
import time

import pytest
from prefect.states import Failed

from loraflow.execution import code_digest
from loraflow.tasks import run as run_module
from loraflow.tasks.run import open_run
from loraflow.tasks.stages import is_retryable
from tests.unit.flows.test_recipe_file import recipe, record_of  # noqa: F401

MISMATCH = "AST constructor recursion depth mismatch (before=54, after=78)"


def failing(function, times: int):
    """Return a function that raises the interpreter's error at first."""
    left = [times]

    def wrapper(*arguments):
        if left[0]:
            left[0] -= 1
            raise SystemError(MISMATCH)
        return function(*arguments)

    return wrapper


def test_a_code_digest_is_computed_although_another_thread_parses(monkeypatch):
    source = 'def f(x):\n    """Doc."""\n    return x  # comment\n'
    expected = code_digest.normalized(source)
    monkeypatch.setattr(ast, "parse", failing(ast.parse, 5))
    assert code_digest.normalized(source) == expected


def test_broken_code_is_still_reported(monkeypatch):
    with pytest.raises(SyntaxError):
        code_digest.normalized("def f(:")
    monkeypatch.setattr(ast, "parse", failing(ast.parse, 1_000))
    with pytest.raises(SystemError):
        code_digest.normalized("x = 1")


def test_a_stage_that_meets_the_interpreters_error_is_retried_and_a_bug_is_not():
    assert is_retryable(None, None, Failed(data=SystemError(MISMATCH)))
    assert not is_retryable(None, None, Failed(data=ValueError("x")))


@pytest.mark.parametrize("step", ["read_recipe", "show_name"])
def test_the_first_step_of_a_flow_is_retried(recipe, monkeypatch, step):  # noqa: F811
    monkeypatch.setattr(run_module, step, failing(getattr(run_module, step), 1))
    with open_run(str(recipe), {}, []):
        pass
    assert record_of(recipe).state == "done"


@pytest.mark.slow
def test_digests_are_stable_for_seconds_beside_threads_that_parse():
    """The race itself: Python code runs in the midst of ast.parse when garbage is collected, so other threads do too."""

    class Cycle:
        def __init__(self):
            self.me = self

        def __del__(self):
            for _ in range(50):
                pass

    stop = threading.Event()

    def parse_signatures():
        while not stop.is_set():
            try:
                inspect.signature(str.encode)
            except SystemError:
                pass

    source = inspect.getsource(code_digest)
    expected, interval = code_digest.normalized(source), sys.getswitchinterval()
    other = threading.Thread(target=parse_signatures, daemon=True)
    sys.setswitchinterval(1e-6)
    other.start()
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            [Cycle() for _ in range(20)]
            assert code_digest.normalized(source) == expected
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        other.join()
