"""Undo what DVC did to a project if the command that versions a dataset fails."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from loraflow.cli.undo import log, logged_failure, remove
from loraflow.data.git import GitError, git


@contextmanager
def dvc_undone_on_failure(data: Path) -> Iterator[None]:
    """Make the current folder a repository of DVC; if what happens meanwhile fails, leave no trace of DVC's.

    A `.dvc` folder that was not there is removed, with the cache in it. In a cache that was there, the dataset's objects
    that it did not have are removed. Git's index gets its earlier entries back: `dvc init` stages files. What was pushed
    to a remote stays there.

    Args:
        data: the dataset's folder, whose files are there already.
    """
    from loraflow.data import dvc

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
