"""The tools that a model was trained with: `data.tools` of its run, for prompts that have none of their own."""

from __future__ import annotations

from pydantic import JsonValue

from loraflow.config.tools_file import read_tools_file
from loraflow.failures import BadConfig
from loraflow.serving.models import Model
from loraflow.store import Store


def tools_of(store: Store, model: Model) -> list[JsonValue] | None:
    """Return the content of `data.tools` of the run that made a model; None if it had none.

    The artifact of check_dataset has the tools as they were in that run. If it was removed, the file is read again.

    Raises:
        BadConfig: the artifact was removed, and the file is missing or is not a list of tools.
    """
    name = model.run.section("data").get("tools") if model.run is not None else None
    if model.run is None or not isinstance(name, str):
        return None
    stage = model.run.stage("check_dataset")
    ref = store.find("check_dataset", stage.fingerprint) if stage is not None else None
    if ref is not None:
        config = store.manifest(ref).payload.get("config")
        tools = config.get("tools") if isinstance(config, dict) else None
        if isinstance(tools, list):
            return tools
    try:
        return read_tools_file(name)
    except BadConfig as failure:
        raise BadConfig(
            "The tools that the model was trained with are not in the store any more, and their file cannot be used.",
            where=failure.where,
            expected=failure.expected,
            got=failure.got or failure.what,
            next_step="give them with `loraflow predict … --tools FILE`, or put the file back",
        ) from failure
