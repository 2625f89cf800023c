"""A failure is on the terminal once, without Prefect's traceback; an unexpected exception keeps its traceback."""

import logging
import subprocess
import sys

import httpx
import pytest

from loraflow.failures import BadData, Crashed
from loraflow.tasks.failure_log import OnceOnTheTerminal, SentenceInsteadOfTraceback, is_server_error

ENGINE = "prefect.flow_runs"


def record_of(message: str, error: BaseException | None = None, name: str = ENGINE) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, logging.ERROR, "file.py", 1, message, (), info)


def test_a_failure_is_logged_as_its_sentence_and_left_out_of_the_terminal():
    record = record_of("Encountered exception during execution", BadData("No rows.", next_step="add rows"))
    assert SentenceInsteadOfTraceback().filter(record)
    assert record.getMessage() == "No rows.\n  next:     add rows" and record.exc_info is None
    assert not OnceOnTheTerminal().filter(record)


def test_an_unexpected_exception_keeps_its_traceback():
    record = record_of("Encountered exception during execution", KeyError("x"))
    assert SentenceInsteadOfTraceback().filter(record) and OnceOnTheTerminal().filter(record)
    assert record.exc_info is not None
    finished = record_of("Finished in state Failed(\"Task run encountered an exception KeyError: 'x'\")")
    OnceOnTheTerminal().filter(finished)
    assert "KeyError" in finished.getMessage()


@pytest.mark.parametrize("words", ["Task run encountered an exception", "Flow run encountered an exception:"])
def test_a_final_state_does_not_repeat_a_failure(words):
    record = record_of(f"Finished in state Failed('{words} BadData: No rows.\\n  next: add rows')")
    assert OnceOnTheTerminal().filter(record)
    assert record.getMessage() == "Finished in state Failed"


def test_an_interrupt_is_reported_by_the_command_alone():
    for message in (
        "Crash detected! Execution was aborted by an interrupt signal.",
        "Finished in state Crashed('Execution was aborted by an interrupt signal.')",
    ):
        assert not OnceOnTheTerminal().filter(record_of(message))
    assert OnceOnTheTerminal().filter(record_of("train 3/6", name="loraflow"))


def test_a_lost_server_is_told_from_another_host_and_from_a_failing_stage():
    from prefect.settings import PREFECT_API_URL, temporary_settings

    def lost(url: str) -> httpx.ConnectError:
        return httpx.ConnectError("refused", request=httpx.Request("GET", url))

    with temporary_settings({PREFECT_API_URL: "http://server:4200/api"}):
        assert is_server_error(lost("http://server:4200/api/flows"))
        assert not is_server_error(lost("https://huggingface.co/api/models"))
        assert is_server_error(RuntimeError("Failed to reach API at http://server:4200/api"))
        assert not is_server_error(RuntimeError("x")) and not is_server_error(Crashed("x"))
        assert not is_server_error(httpx.ConnectError("no request"))


FLOW = """
import logging
from prefect import flow, task
from loraflow.failures import BadData
from loraflow.tasks.failure_log import show_failures_once
@task
def check():
    raise BadData("No rows.", where="data", next_step="add rows")
@flow
def refused():
    check()
show_failures_once()
try:
    refused()
except BadData as failure:
    print(failure)
"""


@pytest.mark.slow
def test_a_refused_run_prints_ten_lines_and_no_traceback(tmp_path):
    env = {"PREFECT_HOME": str(tmp_path), "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120"}
    import os

    done = subprocess.run([sys.executable, "-c", FLOW], capture_output=True, text=True, env={**os.environ, **env})
    everything = done.stdout + done.stderr
    assert everything.count("No rows.") == 1 and "Traceback" not in everything, everything
    assert len(everything.splitlines()) <= 10
