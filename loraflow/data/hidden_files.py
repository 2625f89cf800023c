"""Files that lie beside a dataset and are no part of it."""

from __future__ import annotations

from pathlib import PurePosixPath

_LEFT_BY_SYSTEMS = frozenset({"__MACOSX", "Thumbs.db"})


def is_hidden(name: str) -> bool:
    """Tell whether a file, relative to its dataset, is hidden or left by an operating system."""
    return any(part.startswith(".") or part in _LEFT_BY_SYSTEMS for part in PurePosixPath(name).parts)
