"""Leave a project's files as they were if the command that writes them fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def undone_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    """Restore small files, and remove files and folders that were not there, if what happens meanwhile fails.

    Args:
        paths: what a command may write. A folder that exists before is left alone.
    """
    before = {path: path.read_bytes() for path in paths if path.is_file()}
    folders = [folder for path in paths for folder in path.parents if not folder.exists()]
    new = [path for path in paths if not path.exists()]
    try:
        yield
    except BaseException:
        for path, content in before.items():
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        for path in new:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for folder in sorted(set(folders), key=lambda folder: len(folder.parts), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
