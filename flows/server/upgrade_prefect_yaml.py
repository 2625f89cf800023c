"""Bring a project's `prefect.yaml` forward: import names, the project in the pull step. No import of prefect here."""

from __future__ import annotations

import re
from pathlib import Path

from loraflow.config import yaml
from loraflow.config.upgrade_recipe import Upgraded
from loraflow.config.yaml_edits import Edit, Scalar, apply, scalars
from loraflow.flows.server.new_prefect_yaml import quoted, slug

ENTER = "loraflow.flows.server.project.enter"
OLD_ENTER = "flows.project.enter"  # while loraflow's flows were a top-level package
# loraflow's own flows, under the names that they had then: as a module, or as a file of a clone
OLD_FLOW = re.compile(r"(?:loraflow/)?flows[./](finetune|retrain|evaluate_model|predict|stage)(?:\.|\.py:)(\w+)")


def upgrade_prefect_yaml(text: str, folder: Path) -> Upgraded:
    """Write current import names, the project's name, and the project into loraflow's pull step.

    Deployments, schedules and everything else stay as they are. A flow of the project's own, in its folder
    `flows`, keeps its entrypoint.
    """
    try:
        found = list(scalars(text))
    except yaml.Syntax as error:
        return Upgraded(text, [f"line {error.line}: {error}"])
    edits = [edit for scalar in found if (edit := _entrypoint(scalar, folder))]
    steps = [scalar for scalar in found if scalar.is_key and scalar.value in (ENTER, OLD_ENTER)]
    edits += [step.replaced_by(ENTER) for step in steps if step.value == OLD_ENTER]
    name = next((scalar.value for scalar in found if scalar.path == ("name",) and not scalar.is_key), "")
    notes = []
    if steps and not name:
        name = slug(folder.absolute().name)
        edits.append(_before_first_key(found, f"name: {name}\n"))
    for step in steps:
        if any(scalar.path == (*step.path, "project") for scalar in found):
            continue
        if (edit := _project(text, step, name)) is None:
            line = text.count("\n", 0, step.start) + 1
            notes.append(f"line {line}: add the project to this step: {ENTER}: {{project: {name}}}")
        else:
            edits.append(edit)
    new = apply(text, edits)
    if new != text and not _has_name(new, name):
        return Upgraded(text, [*notes, "left unchanged: the file does not have one key per line"])
    return Upgraded(new, notes)


def _has_name(text: str, name: str) -> bool:
    """Return whether a text is valid YAML whose project has this name; any, if none was needed."""
    try:
        document = yaml.load_plain(text)
    except yaml.Syntax:
        return False
    return isinstance(document, dict) and (not name or str(document.get("name")) == name)


def _entrypoint(scalar: Scalar, folder: Path) -> Edit | None:
    if scalar.is_key or scalar.path[-1:] != ("entrypoint",):
        return None
    old = OLD_FLOW.fullmatch(scalar.value)
    if old is None or (folder / "flows" / f"{old[1]}.py").exists():  # the project's own flow
        return None
    return scalar.replaced_by(f"loraflow.flows.{old[1]}.{old[2]}")


def _before_first_key(found: list[Scalar], text: str) -> Edit:
    start = min(scalar.start for scalar in found)
    return Edit(start, start, text)


def _project(text: str, step: Scalar, name: str) -> Edit | None:
    """Return the edit that gives an empty step its project; None if the step has other values."""
    rest = re.compile(r"\s*:[ \t]*(\{[ \t]*\}|null|~)?(?=[ \t]*(?:#.*)?(?:\r?\n|$))").match(text, step.end)
    return None if rest is None else Edit(step.end, rest.end(), f": {{project: {quoted(name)}}}")
