"""Leave a project's files as they were if the command that writes them fails."""

from __future__ import annotations

import logging
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from loraflow.store.files import write_atomic

log = logging.getLogger(__name__)


@contextmanager
def undone_on_failure(paths: Sequence[Path]) -> Iterator[None]:
    """Restore small files and links, and remove files and folders that were not there, if what happens meanwhile fails.

    A step of this that fails is logged; the other steps are done, and the command's own error is raised.

    Args:
        paths: what a command may write. A folder that exists before is left alone, and so is a link, also one whose target
            does not exist, such as a folder of a disk that is not mounted.
    """
    contents = {path: (path.read_bytes(), path.stat().st_mode) for path in paths if path.is_file()}
    links = {path: path.readlink() for path in paths if path.is_symlink()}
    new = [path for path in paths if not os.path.lexists(path)]
    folders = {folder for path in paths for folder in path.parents if not os.path.lexists(folder)}
    try:
        yield
    except BaseException:
        for path in new:  # first: the disk is perhaps full, and what is restored needs space
            with logged_failure(path):
                remove(path)
        for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
            with logged_failure(folder):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        for path, target in links.items():
            with logged_failure(path):
                _restore_link(path, target)
        for path, (content, mode) in contents.items():
            with logged_failure(path):
                _restore(path, content, mode)
        raise


@contextmanager
def logged_failure(path: Path) -> Iterator[None]:
    """Log an error of the system about a file that cannot be restored or removed, and continue."""
    try:
        yield
    except OSError as error:
        log.warning("%s could not be restored to its state before the command: %s", path, error)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it exists. A link's target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _restore_link(path: Path, target: Path) -> None:
    if path.is_symlink() and path.readlink() == target:
        return
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _restore(path: Path, content: bytes, mode: int) -> None:
    """Restore a file's content and mode; of a link, those of its target. A full disk does not truncate the file."""
    if path.is_file() and path.read_bytes() == content:
        return
    file = path.resolve()
    write_atomic(file, content)
    file.chmod(stat.S_IMODE(mode))
