"""How a failure looks in the logs of a run: its sentence, without Prefect's traceback, and on the terminal only once.

An unexpected exception keeps its traceback.
"""

from __future__ import annotations

import logging
import re

import httpx
from prefect._internal.urls import strip_auth_from_url
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from loraflow.failures import Failure, Network, failure_names, first_line

ENGINE_LOGS = ("prefect.flow_runs", "prefect.task_runs")
# Prefect's words for Ctrl-C and SIGTERM, which the command reports itself.
_INTERRUPTED = re.compile(
    r"Execution was aborted by (an interrupt|a termination) signal|aborted by Python system exit call"
)
_FINISHED = re.compile(r"Finished in state (Failed|Crashed|TimedOut)\((.*)\)", re.DOTALL)


class MessageWithoutTraceback(logging.Filter):
    """Give a record about a failure its sentence, and mark it; leave other records alone."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place, so that Prefect's UI gets the sentence too."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Failure):
            record.msg = str(error) if record.name == ENGINE_LOGS[0] else f"failed: {error.what}"
        elif error is not None and is_server_error(error):
            record.msg = f"Prefect's server did not answer: {first_line(error)}"
        else:
            return True
        record.args, record.exc_info, record.exc_text = (), None, None
        record.is_shown_by_command = True
        return True


class NoRepeatedFailure(logging.Filter):
    """Leave out what the command prints itself when it ends: the failure's sentence, and that it was interrupted."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown; shorten it if it repeats a failure."""
        if getattr(record, "is_shown_by_command", False):
            return False
        message = record.getMessage()
        if record.name in ENGINE_LOGS:
            if _INTERRUPTED.search(message):
                return False
            finished = _FINISHED.match(message)
            if finished and _KINDS.search(finished[2]):
                record.msg, record.args = f"Finished in state {finished[1]}", ()
        return not message.startswith("Stopping temporary server")


class EventsInOneSentence(logging.Filter):
    """Log once, in a sentence, that the server does not accept events or log lines, instead of once for each of them.

    This happens if a server is lost during a run, and behind a proxy without websockets; the run continues. A record with
    a traceback (Prefect's debug mode) is unchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logged: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is shown."""
        message = record.getMessage()
        sentence = next((sentence for pattern, sentence in _NOT_TAKEN.items() if pattern.match(message)), None)
        if sentence is None or record.exc_info:
            return True
        if sentence in self._logged:
            return False
        self._logged.add(sentence)
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        record.msg, record.args, record.exc_text = sentence, (), None
        return True


_EVENT_LOGS = ("prefect.events.clients", "prefect._internal.concurrency")
_NOT_TAKEN = {
    re.compile(
        r"Unable to connect to '?wss?:"
    ): "Prefect's server cannot be reached by websocket, so its UI may not show all events of the run",
    re.compile(
        r"Service 'EventsWorker' failed to process item"
    ): "Prefect's client could not send an event of the run, so "
    "the UI may not show all of it (PREFECT_DEBUG_MODE=1 shows why)",
    re.compile(
        r"Service 'APILogWorker' failed to process item"
    ): "Prefect's client could not send log lines of the run, so the UI may lack some (PREFECT_DEBUG_MODE=1 shows why)",
}
_KINDS = re.compile(rf"run encountered an exception:? (?:{'|'.join(failure_names())}): ")


def shorten_failures() -> None:
    """Make Prefect's engine log failures without traceback, in this process. A second call changes nothing."""
    for name in ENGINE_LOGS:
        logger = logging.getLogger(name)
        if not any(isinstance(entry, MessageWithoutTraceback) for entry in logger.filters):
            logger.addFilter(MessageWithoutTraceback())


def show_failures_once() -> None:
    """Leave failures out of the terminal's log, for a command that prints them when it ends."""
    shorten_failures()
    for handler in logging.getLogger().handlers:
        handler.addFilter(NoRepeatedFailure())
    once = EventsInOneSentence()
    for name in _EVENT_LOGS:
        logging.getLogger(name).addFilter(once)
    # As Python's documentation advises for production: otherwise Prefect writes "Error logging to API" for each batch of
    # log records that a lost server does not take.
    logging.raiseExceptions = False


def server_lost(error: Exception) -> Network:
    """Return the failure of a run whose server was lost."""
    url = get_current_settings().api.url
    return Network(
        "Prefect's server stopped answering during the run.",
        where=strip_auth_from_url(str(url)) if url else "the temporary server",
        got=first_line(error),
        next_step=f"{'start the server, then ' if url else ''}run again: finished stages are cached, and training resumes",
    )


def is_server_error(error: BaseException) -> bool:
    """Return whether an exception says that the configured Prefect server, or the temporary one, does not answer."""
    if isinstance(error, PrefectHTTPStatusError):
        return error.response.status_code >= 500
    if isinstance(error, RuntimeError) and str(error).startswith("Failed to reach API"):
        return True
    if not isinstance(error, httpx.TransportError):
        return False
    try:
        host = error.request.url
    except RuntimeError:  # an error of httpx without a request
        return False
    configured = get_current_settings().api.url
    if configured:
        return str(host).startswith(str(configured).rstrip("/"))
    return host.host == "127.0.0.1" and host.path.startswith("/api/")
