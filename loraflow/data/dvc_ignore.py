"""Which files of a work tree DVC ignores.

Those that `.dvcignore` files name, in the syntax of `.gitignore`; the folders of git, Mercurial and DVC; and folders that
are DVC repositories themselves. Files named `.gitignore` are ordinary files to DVC.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from loraflow.failures import BadData

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
