"""The files of a dataset in a work tree: regular files, and DVC's links into its cache (`dvc config cache.type symlink`)."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from loraflow.data.dvc_ignore import IGNORE_FILE, IgnoreRules, dvc_root
from loraflow.failures import BadData
from loraflow.store.files import HashMemo, walk

_OBJECT = re.compile(r"(?:files/md5/)?([0-9a-f]{2})/([0-9a-f]{30})")  # DVC 2 wrote without files/md5


@dataclass(frozen=True)
class DatasetFile:
    """A file of a dataset."""

    name: str  # posix path relative to the dataset's folder
    path: Path
    cached_md5: str | None = None  # if the path is DVC's link into its cache: the md5 that the object's name says

    def md5(self, memo: HashMemo) -> str:
        """Return the md5 of the content.

        Raises:
            BadData: the file is a link to an object of DVC's cache with other content than its name says.
        """
        md5 = memo.hash(self.path, "md5")
        if self.cached_md5 not in (None, md5):
            target = self.path.resolve()
            raise BadData(
                "An object of DVC's cache was changed, probably by writing through the link to it.",
                where=f"{self.path} -> {target}",
                expected=f"md5 {self.cached_md5}",
                got=f"md5 {md5}",
                next_step=f"`rm -f '{target}'`, then `dvc pull`. To change a linked file, `dvc unprotect` its folder first",
            )
        return md5


def dataset_file(path: Path) -> DatasetFile:
    """Return a dataset that is a single file.

    Raises:
        BadData: the path is a link to anything but DVC's cache, or no regular file.
    """
    return DatasetFile(path.name, path, _linked_md5(path))


def dataset_files(folder: Path, ignored: IgnoreRules | None) -> Iterator[DatasetFile]:
    """Yield the files of a dataset, in the order of a walk from the top.

    Args:
        folder: the dataset's folder.
        ignored: what does not belong to it; None if everything does.

    Raises:
        BadData: the folder contains a link to anything but DVC's cache, a pipe or a socket (DVC silently follows links to
            files and drops the others), or a `.dvcignore` file, which DVC refuses inside of a dataset.
    """
    for root, dirs, names in walk(folder):
        if ignored is not None:
            here = ignored.folder / root.relative_to(folder)
            if here != ignored.folder:
                ignored.enter(here)
            dirs[:] = [name for name in dirs if not ignored.ignores(here / name, is_folder=True)]
            names = [name for name in names if not ignored.ignores(here / name, is_folder=False)]
            if IGNORE_FILE in names:
                raise BadData(
                    "A dataset must not contain a .dvcignore file: DVC refuses it there.",
                    where=str(root / IGNORE_FILE),
                    next_step=f"move its lines to the {IGNORE_FILE} of the project's folder",
                )
        dirs.sort()
        links = [name for name in dirs if (root / name).is_symlink()]
        for name in sorted(names + links):
            path = root / name
            yield DatasetFile(path.relative_to(folder).as_posix(), path, _linked_md5(path))


def _linked_md5(path: Path) -> str | None:
    """Return the md5 that the name of a linked object of DVC's cache says; None for a regular file."""
    mode = path.lstat().st_mode
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISLNK(mode):
        target = Path(os.path.realpath(path))
        root = dvc_root(path)
        folder = cache_folder(root) if root else None
        if folder is not None and target.is_relative_to(folder):
            match = _OBJECT.fullmatch(target.relative_to(folder).as_posix())
            if match and target.is_file():
                return match[1] + match[2]
            if match and not target.exists():
                raise BadData(
                    "DVC's cache does not have the object that a file of the dataset links to.",
                    where=f"{path} -> {target}",
                    next_step="`loraflow data pull` gets it from the remote",
                )
    kind = f" -> {path.readlink()}" if stat.S_ISLNK(mode) else " is neither a folder nor a regular file"
    raise BadData(
        "A dataset may contain only regular files, and DVC's own links into its cache.",
        where=f"{path}{kind}",
        next_step="replace it with a copy of the file, or remove it",
    )


@cache
def cache_folder(root: Path) -> Path | None:
    """Return the folder of a repository's local cache, as DVC's settings say; None if it has none."""
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            folder = repo.cache.local_cache_dir
    except DvcException as error:
        raise BadData(
            "DVC's settings cannot be read, so it is unknown where its cache is.",
            where=str(root / ".dvc"),
            got=str(error)[:300],
            next_step="`dvc config --list --show-origin` shows them",
        ) from error
    return Path(os.path.realpath(folder)) if folder else None
