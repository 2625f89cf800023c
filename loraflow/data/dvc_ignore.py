"""Which files of a work tree DVC ignores: those that `.dvcignore` files name, in the syntax of `.gitignore`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def ignored_below(folder: Path) -> Callable[[str], bool]:
    """Return a function that tells whether DVC ignores a file below a folder, by its relative name.

    The `.dvcignore` files of DVC's root and of the folders between it and `folder` count. DVC refuses one inside of a
    dataset. Outside of a DVC repository nothing is ignored.
    """
    folder = folder.absolute()
    above = list(folder.parents)
    root = next((parent for parent in above if (parent / ".dvc").is_dir()), None)
    files = [parent / ".dvcignore" for parent in above if root is not None and parent.is_relative_to(root)]
    files = [file for file in files if file.is_file()]
    if not files:
        return lambda _: False

    from pathspec import GitIgnoreSpec  # the library by which DVC reads them

    specs = [
        (folder.relative_to(file.parent), GitIgnoreSpec.from_lines(file.read_text(encoding="utf-8").splitlines()))
        for file in files
    ]
    return lambda name: any(spec.match_file((path / name).as_posix()) for path, spec in specs)
