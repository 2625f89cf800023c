"""Templates (`{{ … }}`) in `prefect.yaml`: which of them are filled in when a run is created, not when it is deployed."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import JsonValue

TEMPLATE = re.compile(r"\{\{\s*([^\s}]*)")


def is_filled_in_later(path: str, text: str) -> bool:
    """Tell whether a template is kept by `prefect deploy` too: the worker or the server fills it in for each run."""
    if path == ".description" or path.startswith(".pull"):
        return True
    if path.startswith(
        ".work_pool.job_variables"
    ):  # the worker reads blocks and variables, so no secret is in the file
        return all(name.startswith(("prefect.blocks.", "prefect.variables.")) for name in TEMPLATE.findall(text))
    if re.match(r"\.triggers\[\d+\]\.parameters\b", path):  # of the event
        return not any(name.startswith(("$", "prefect.")) for name in TEMPLATE.findall(text))
    return False


def texts(value: JsonValue, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a document, with its path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from texts(inner, f"{path}[{number}]")
