"""The project that a folder belongs to: the `name` in its `prefect.yaml`."""

from __future__ import annotations

from pathlib import Path

from loraflow.config import yaml
from loraflow.failures import BadConfig

FILE = "prefect.yaml"


def project_name(folder: Path) -> str | None:
    """Return the `name` in a project's `prefect.yaml`; None if it has no such file, or no name.

    Raises:
        BadConfig: the file cannot be read.
    """
    try:
        document = yaml.load_plain((folder / FILE).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, yaml.Syntax) as error:
        raise BadConfig(f"{FILE} cannot be read.", where=str(folder / FILE), got=str(error)) from error
    name = document.get("name") if isinstance(document, dict) else None
    return str(name) if name is not None else None
