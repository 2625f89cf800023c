"""What `loraflow init` shows beside a `prefect.yaml` of somebody's own: the deployment to add. No import of prefect here."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import JsonValue

from loraflow.config.project import FILE
from loraflow.config.yaml import Syntax, load_plain
from loraflow.flows.server.new_prefect_yaml import quoted, slug

INTRODUCTION = (
    "prefect.yaml   unchanged: it is your own file, without a deployment of loraflow. "
    "To start runs from Prefect's UI, {}:"
)


def deployment_to_add(folder: Path, recipe: str) -> str | None:
    """Return what to add to a project's own `prefect.yaml`; None if it has a flow of loraflow, or cannot be read."""
    try:
        text = (folder / FILE).read_text(encoding="utf-8-sig")
        document = load_plain(text)
    except (OSError, UnicodeDecodeError, Syntax):
        return None
    if not isinstance(document, dict):
        return None
    entries = document.get("deployments")
    if not isinstance(entries, list | None) or "loraflow.flows." in str(entries):
        return None
    project = slug(folder.absolute().name)
    name = str(document["name"]) if document.get("name") not in (None, "") else project
    entry = [
        f"name: {project}",
        "entrypoint: loraflow.flows.finetune.finetune",
        f"work_pool: {{name: {quoted(_first_pool(entries or []) or project)}}}",
        f"parameters: {{recipe: {quoted(recipe)}}}",
        f"pull: [{{loraflow.flows.server.project.enter: {{project: {quoted(name)}}}}}]",
    ]
    indent = _indent(text)
    if not entries:
        is_there = "deployments" in document
        todo = "replace its empty `deployments` with this" if is_there else "add this to it"
        lines = ["deployments:", *_item(entry, 2)]
    elif indent is None:
        todo, lines = "add this to the list in brackets at `deployments`", [f"{{{', '.join(entry)}}}"]
    else:
        todo, lines = "add this at the end of its `deployments`", _item(entry, indent)
    if document.get("name") in (None, ""):
        lines.append(f"name: {quoted(name)}" + ("  # instead of the empty name" if "name" in document else ""))
        todo += ", with the name of the project"
    return "\n".join([INTRODUCTION.format(todo), *lines])


def _item(entry: list[str], indent: int) -> list[str]:
    """Return an entry as an item of a list whose hyphens are in the column `indent`."""
    return [" " * indent + ("  " if number else "- ") + line for number, line in enumerate(entry)]


def _first_pool(entries: list[JsonValue]) -> str | None:
    pools = [entry.get("work_pool") for entry in entries if isinstance(entry, dict)]
    return next((str(pool["name"]) for pool in pools if isinstance(pool, dict) and pool.get("name")), None)


def _indent(text: str) -> int | None:
    """Return the column of the hyphens of `deployments`; None without a list, or if it is in brackets."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    for key, value in root.value:
        if key.value == "deployments" and isinstance(value, yaml.SequenceNode) and not value.flow_style:
            return value.start_mark.column
    return None
