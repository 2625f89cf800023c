"""Call a flow from a command: `loraflow run` and `loraflow sweep`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from pydantic import JsonValue

from loraflow.cli import stop_at_second_interrupt
from loraflow.registry.runs import RunSummary


def call_flow(
    flow: Callable[..., dict[str, JsonValue]], parameters: Mapping[str, JsonValue], *, quiet: bool
) -> tuple[RunSummary, dict[str, JsonValue]]:
    """Call a flow, with a temporary server if none is configured; return its summary, also as the JSON document.

    Args:
        flow: the flow.
        parameters: its own.
        quiet: show warnings only.

    Raises:
        Failure: the flow's own, or the server was lost.
    """
    from loraflow.flows.server.temporary_server import prepare_server
    from loraflow.tasks.failure_log import is_server_error, server_lost, show_failures_once

    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("loraflow").setLevel(logging.WARNING if quiet else logging.INFO)
    show_failures_once()
    stop_at_second_interrupt()
    prepare_server()
    try:
        document = flow(**parameters)
    except Exception as error:
        if is_server_error(error):
            raise server_lost(error) from error
        raise
    return RunSummary.model_validate(document), document
