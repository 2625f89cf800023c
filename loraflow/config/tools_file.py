"""Read the file of `data.tools`."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import JsonValue

from loraflow.failures import BadConfig


def read_tools_file(name: str) -> list[JsonValue]:
    """Return the tools of a dataset. check_dataset checks them.

    Raises:
        BadConfig: the file is missing, or is not a JSON list.
    """
    try:
        value = json.loads(Path(name).read_text(encoding="utf-8"))
        # Refuses NaN, infinities and lone surrogates, which neither fingerprints nor rows can contain.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise BadConfig(
            "The tools cannot be read.",
            where=f"data.tools: {name}",
            got=str(error)[:200],
            next_step="correct the path, or the file's JSON",
        ) from error
    if not isinstance(value, list) or not value:
        raise BadConfig(
            "The file is not a list of tools.",
            where=f"data.tools: {name}",
            expected='a JSON list: [{"type": "function", "function": {"name": …, "parameters": …}}, …]',
            got=type(value).__name__,
            next_step="write the tools as OpenAI's API takes them",
        )
    return value
