"""A failure is on the terminal once, without Prefect's traceback; an unexpected exception keeps its traceback."""

import logging
import subprocess
import sys

import httpx
import pytest

from loraflow.failures import BadData, Crashed
from loraflow.tasks.failure_log import (
    _EVENT_LOGS,
    EventsInOneSentence,
    MessageWithoutTraceback,
    NoRepeatedFailure,
    is_server_error,
)

ENGINE = "prefect.flow_runs"


def record_of(message: str, error: BaseException | None = None, name: str = ENGINE) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord(name, logging.ERROR, "file.py", 1, message, (), info)


def test_a_failure_is_logged_as_its_sentence_and_left_out_of_the_terminal():
    record = record_of("Encountered exception during execution", BadData("No rows.", next_step="add rows"))
    assert MessageWithoutTraceback().filter(record)
    assert record.getMessage() == "No rows.\n  next:     add rows" and record.exc_info is None
    assert not NoRepeatedFailure().filter(record)


def test_an_unexpected_exception_keeps_its_traceback():
    record = record_of("Encountered exception during execution", KeyError("x"))
    assert MessageWithoutTraceback().filter(record) and NoRepeatedFailure().filter(record)
    assert record.exc_info is not None
    finished = record_of("Finished in state Failed(\"Task run encountered an exception KeyError: 'x'\")")
    NoRepeatedFailure().filter(finished)
    assert "KeyError" in finished.getMessage()


@pytest.mark.parametrize("words", ["Task run encountered an exception", "Flow run encountered an exception:"])
def test_a_final_state_does_not_repeat_a_failure(words):
    record = record_of(f"Finished in state Failed('{words} BadData: No rows.\\n  next: add rows')")
    assert NoRepeatedFailure().filter(record)
    assert record.getMessage() == "Finished in state Failed"


def test_an_interrupt_is_reported_by_the_command_alone():
    for message in (
        "Crash detected! Execution was aborted by an interrupt signal.",
        "Finished in state Crashed('Execution was aborted by an interrupt signal.')",
    ):
        assert not NoRepeatedFailure().filter(record_of(message))
    assert NoRepeatedFailure().filter(record_of("train 3/6", name="loraflow"))


EVENT = "Event(occurred=DateTime(2026, 1, 1), event='prefect.task-run.Running')"
UNTAKEN = {
    "cannot be reached by websocket": (
        "prefect.events.clients", "Unable to connect to 'ws://127.0.0.1:4200/api/events/in'. Please check …"
    ),
    "could not send an event": ("prefect._internal.concurrency", f"Service 'EventsWorker' failed to process item {EVENT}"),
    "could not send log lines": ("prefect._internal.concurrency", "Service 'APILogWorker' failed to process item {}"),
}  # fmt: skip


def test_events_and_logs_that_a_server_does_not_accept_are_reported_once_each():
    once = EventsInOneSentence()
    for sentence, (name, message) in UNTAKEN.items():
        first, second = (record_of(message, name=name) for _ in range(2))
        assert once.filter(first) and not once.filter(second)
        assert sentence in first.getMessage() and first.levelname == "WARNING" and EVENT not in first.getMessage()
    assert once.filter(record_of("Service 'Other' stopped", name="prefect._internal.concurrency"))


def test_a_failure_of_the_client_with_its_traceback_stays_as_it_is():
    once = EventsInOneSentence()
    for _ in range(2):
        record = record_of(
            f"Service 'EventsWorker' failed to process item {EVENT}", name="prefect._internal.concurrency"
        )
        record.exc_info = (TypeError, TypeError("a bug"), None)
        assert once.filter(record) and "EventsWorker" in record.getMessage() and record.exc_info


def test_the_words_of_those_lines_are_prefects_own():
    """Another version of Prefect may use others: then they are shown again."""
    import inspect

    from prefect._internal.concurrency import services
    from prefect.events import clients
    from prefect.logging import handlers

    assert '"Service %r failed to process item %r"' in inspect.getsource(services)
    assert '"Unable to connect to %r. "' in inspect.getsource(clients)
    assert "if logging.raiseExceptions and sys.stderr:" in inspect.getsource(handlers.APILogWorker)
    assert {services.logger.name, clients.logger.name} == set(_EVENT_LOGS)


def test_a_lost_server_is_distinguished_from_another_host_and_from_a_failing_stage():
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
