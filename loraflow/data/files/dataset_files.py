"""The files of a dataset in a work tree: regular files, and DVC's links into its cache (`dvc config cache.type symlink`).

Files that DVC ignores are left out: those that `.dvcignore` files name, in the syntax of `.gitignore`; the folders of git,
Mercurial and DVC; and folders that are DVC repositories themselves. Files named `.gitignore` are ordinary files to DVC.
"""

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from loraflow.failures import BadData
from loraflow.store.files import HashMemo, walk

IGNORE_FILE = ".dvcignore"
_ALWAYS = (".hg/", ".git/", ".git", ".dvc/")  # what DVC starts with


@dataclass(frozen=True)
class _Rule:
    """A line of a `.dvcignore` file."""

    base: str  # folder of the file, relative to DVC's root: "" or "a/b/"
    pattern: re.Pattern[str]
    ignores: bool  # False: a line with !, which takes files back
    folders_only: bool


class IgnoreRules:
    """What DVC ignores below a folder. The last line that matches decides; all below an ignored folder is ignored."""

    def __init__(self, folder: Path):
        """Read the `.dvcignore` files between DVC's root and `folder`. Outside of a DVC repository nothing is ignored.

        Raises:
            BadData: a `.dvcignore` file cannot be read.
        """
        self.folder = _absolute(folder)
        self.root = dvc_root(folder)
        self._rules: list[_Rule] = []
        self._all = False
        if self.root is None:
            return
        self._rules += [_rule("", line) for line in _ALWAYS]
        for parent in reversed(self.folder.parents):
            if parent.is_relative_to(self.root):
                self._all = self._all or (parent != self.root and self.ignores(parent, is_folder=True))
                self.enter(parent)
        self._all = self._all or self.ignores(self.folder, is_folder=True)

    def enter(self, folder: Path) -> None:
        """Read the `.dvcignore` file of a folder, if it has one that is not ignored itself.

        Raises:
            BadData: it cannot be read.
        """
        file = folder / IGNORE_FILE
        if self.root is None or not file.is_file() or self.ignores(file, is_folder=False):
            return
        base = self._relative(folder) + "/" if folder != self.root else ""
        line = "the whole file"
        try:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):  # noqa: B007
                text = line.strip()
                if text and not text.startswith("#"):
                    self._rules.append(_rule(base, text))
        except ValueError as error:
            raise BadData(
                "A .dvcignore file cannot be read.",
                where=str(file),
                expected="UTF-8 text with one pattern per line, as in .gitignore",
                got=f"{error}"[:300],
                next_step="correct the line; `dvc check-ignore` tells what DVC makes of it",
            ) from error

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Tell whether a path is ignored whose parents are not."""
        if self.root is None:
            return False
        if self._all:
            return True
        if is_folder and path != self.folder and (path / ".dvc").exists():
            return True
        name = self._relative(path)
        for rule in reversed(self._rules):
            if not name.startswith(rule.base) or (rule.folders_only and not is_folder):
                continue
            below = name[len(rule.base) :]
            if rule.pattern.match(below) or (is_folder and rule.pattern.match(below + "/")):
                return rule.ignores
        return False

    def _relative(self, path: Path) -> str:
        assert self.root is not None
        return path.relative_to(self.root).as_posix()


def dvc_root(path: Path) -> Path | None:
    """Return the root of the DVC repository that a file or folder is in; None if it is in none."""
    return next((parent for parent in _absolute(path).parents if (parent / ".dvc").is_dir()), None)


def _absolute(path: Path) -> Path:
    """Return an absolute path without `..`. Links stay: what they point to may be outside of the repository."""
    return Path(os.path.normpath(path.absolute()))


def _rule(base: str, line: str) -> _Rule:
    """Raise ValueError if the line is not a pattern."""
    from pathspec import GitIgnoreSpec  # the library by which DVC reads them

    (pattern,) = GitIgnoreSpec.from_lines([line]).patterns
    if pattern.include is None or pattern.regex is None:  # a pattern that matches nothing
        return _Rule(base, re.compile("(?!)"), ignores=False, folders_only=False)
    return _Rule(base, pattern.regex, bool(pattern.include), line.endswith("/"))


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


# Left by operating systems; the hub's and LLaMA-Factory's descriptions of datasets.
_NOT_DATA = frozenset({"__MACOSX", "Thumbs.db", "dataset_infos.json", "dataset_info.json", "dataset_dict.json"})


def is_hidden(name: str) -> bool:
    """Tell whether a file, relative to its dataset, is hidden, left by an operating system, or describes datasets."""
    return any(part.startswith(".") or part in _NOT_DATA for part in PurePosixPath(name).parts)
