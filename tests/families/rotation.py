"""Which third of the family tests runs: it follows from the commit, so that three commits run about two thirds of them.

All of them run with LORAFLOW_FAMILIES=all, without git, and if a test or folder of families is named on the command line.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

PARTS = 3


def part_of(test: str) -> int:
    """Return the part that a test belongs to, from its id."""
    return int(hashlib.sha256(test.encode()).hexdigest(), 16) % PARTS


def part_to_run(arguments: Sequence[str], folder: Path) -> int | None:
    """Return the part that runs; None is all of them.

    Args:
        arguments: pytest's, without options.
        folder: the repository.
    """
    if os.environ.get("LORAFLOW_FAMILIES") == "all" or any("families" in argument for argument in arguments):
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return part_of(head.strip())
