"""The project that a folder belongs to: the `name` in its `prefect.yaml`."""

import os
from pathlib import Path

from pydantic import JsonValue

from loraflow.config import yaml
from loraflow.failures import BadConfig

FILE = "prefect.yaml"
PROJECT_ID = "LORAFLOW_PROJECT_ID"  # in the job variables of the project's deployments, and so in their runs
PROJECT_VARIABLE = "LORAFLOW_PROJECT"  # names the project of a worker whose folder has no prefect.yaml, as in an image


def read_prefect_yaml(file: Path) -> object:
    """Return the content of a `prefect.yaml`.

    Raises:
        BadConfig: the file cannot be read; its cause is the exception.
    """
    try:
        return yaml.load_plain(file.read_text(encoding="utf-8-sig"))
    except yaml.Syntax as error:
        raise BadConfig(
            f"{FILE} has a duplicate key."
            if isinstance(error, yaml.DuplicatedKey)
            else f"{FILE} cannot be read as YAML.",
            where=f"{file}:{error.line}",
            got=str(error),
            next_step=f"correct the line in {FILE}",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> BadConfig:
    """Return the refusal of a project's file that cannot be read as text."""
    line = ""
    if isinstance(error, UnicodeDecodeError):
        line = f":{error.object[: error.start].count(10) + 1}"
    next_step = "save it as UTF-8" if line else "correct its permissions"
    return BadConfig(f"{file.name} cannot be read.", where=f"{file}{line}", got=str(error), next_step=next_step)


def project_name(folder: Path) -> str | None:
    """Return the `name` in a project's `prefect.yaml`; None if it has no such file, or no name.

    Raises:
        BadConfig: the file cannot be read.
    """
    name = _read(folder).get("name")
    return str(name) if name is not None else None


def project_id(folder: Path) -> str | None:
    """Return the id in the deployments of a project's `prefect.yaml`; None if they have none, as in older files.

    Raises:
        BadConfig: the file cannot be read.
    """
    return id_in(_read(folder))


def id_in(document: object) -> str | None:
    """Return the id in the deployments of a `prefect.yaml`; None if they have none."""
    entries = document.get("deployments") if isinstance(document, dict) else None
    for entry in entries if isinstance(entries, list) else []:
        pool = entry.get("work_pool") if isinstance(entry, dict) else None
        if isinstance(pool, dict) and (found := id_of(pool.get("job_variables"))):
            return found
    return None


def id_of(job_variables: object) -> str | None:
    """Return the project's id in the job variables of a deployment. Digits without quotes are the text of the number.

    Raises:
        BadConfig: it is neither a text nor a whole number.
    """
    env = job_variables.get("env") if isinstance(job_variables, dict) else None
    found = env.get(PROJECT_ID) if isinstance(env, dict) else None
    if isinstance(found, bool) or not isinstance(found, str | int | None):
        raise BadConfig(
            f"{PROJECT_ID} is not a text.",
            where=f"{FILE}: work_pool.job_variables.env",
            got=str(found),
            next_step="write it in quotes",
        )
    return None if found is None else str(found) or None


def _read(folder: Path) -> dict[str, JsonValue]:
    """Return the content of a project's `prefect.yaml`; empty without one."""
    try:
        document = read_prefect_yaml(folder / FILE)
    except BadConfig as failure:
        if isinstance(failure.__cause__, FileNotFoundError):
            return {}
        raise
    return document if isinstance(document, dict) else {}


def served_project(folder: Path) -> str | None:
    """Return the project that runs in a folder belong to: that of its `prefect.yaml`, or else LORAFLOW_PROJECT.

    Raises:
        BadConfig: see `project_name`.
    """
    return project_name(folder) or os.environ.get(PROJECT_VARIABLE, "").strip() or None
