"""Leave a project's files as they were if the command that writes them fails."""

import logging
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loraflow.data.versions.git import GitError, git
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


@contextmanager
def dvc_undone_on_failure(data: Path) -> Iterator[None]:
    """Make the current folder a repository of DVC; if what happens meanwhile fails, leave no trace of DVC's.

    A `.dvc` folder that was not there is removed, with the cache in it. In a cache that was there, the dataset's objects
    that it did not have are removed. Git's index gets its earlier entries back: `dvc init` stages files. What was pushed
    to a remote stays there.
    """
    from loraflow.data.versions import dvc

    is_new = not os.path.lexists(".dvc")
    paths = [".dvc", ".dvcignore", ".gitignore", f"{data}.dvc", str(data.parent / ".gitignore")]
    staged = _staged(paths)
    objects: list[Path] = []
    try:
        dvc.make_repository()
        objects = [file for file in dvc.cache_objects(data) if not file.exists()]
        yield
    except BaseException:
        for file in objects:
            with logged_failure(file):
                file.unlink(missing_ok=True)
            with suppress(OSError):  # other objects are in it
                file.parent.rmdir()
        if is_new:
            with logged_failure(Path(".dvc")):
                remove(Path(".dvc"))
        try:
            _restore_index(paths, staged)
        except GitError as error:
            log.warning("git's index could not be restored (%s): %s", error.command, error)
        raise


def _staged(paths: Sequence[str]) -> dict[str, str]:
    """Return {path: "mode,hash"} of the entries of git's index; none outside of a repository."""
    if not Path(".git").exists():
        return {}
    lines = git(["ls-files", "--stage", "-z", "--", *paths]).split("\0")
    parts = [line.split("\t", 1) for line in lines if line]
    return {path: ",".join(head.split()[:2]) for head, path in parts}


def _restore_index(paths: Sequence[str], before: dict[str, str]) -> None:
    now = _staged(paths)
    for path in now.keys() - before.keys():
        git(["update-index", "--force-remove", "--", path])
    for path, entry in before.items():
        if now.get(path) != entry:
            git(["update-index", "--add", "--cacheinfo", f"{entry},{path}"])
