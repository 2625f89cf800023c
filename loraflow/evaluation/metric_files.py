"""The files that decide a metric of the user's own: its script, the modules that it imports, and the files that it names.

Scores of two models are comparable only if the same code computed them, and a script may leave its arithmetic to a module
beside it. Installed packages are no part of it: like torch, they are recorded by their versions.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from loraflow.store.files import HashMemo

PARSE_ATTEMPTS = 5
OURS = "loraflow"  # its code is a part of the stage's


def metric_hash(script: Path, memo: HashMemo) -> str:
    """Return the hash of a metric: of its script, or of all its files if it has more.

    Args:
        script: of the metric's module.
        memo: that may know the files' hashes.
    """
    files = metric_files(script)
    if files == [script]:
        return memo.hash(script)
    hashes = [[os.path.relpath(file, script.parent), memo.hash(file)] for file in files]
    return hashlib.sha256(json.dumps(sorted(hashes)).encode()).hexdigest()


def metric_files(script: Path) -> list[Path]:
    """Return a metric's script, and what it reads in the working directory and in its own folder, in a stable order.

    That is every module that it imports from there, directly or through another one, and every file whose path is written
    as a text in one of them, such as `open("metrics/words.txt")`.
    """
    found, left = [script], [script]
    seen = {script.resolve()}
    while left:
        for file in _named_files(left.pop(), script.parent):
            if file.resolve() not in seen:
                seen.add(file.resolve())
                found.append(file)
                if file.suffix == ".py":
                    left.append(file)
    return [script, *sorted(found[1:])]


def _named_files(file: Path, folder: Path) -> Iterator[Path]:
    """Yield the files that a Python file imports or names, from the metric's folder or the working directory."""
    try:
        tree = _parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # the metric's import raises the same error, and says where
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield from _modules(Path(), name.name)
        elif isinstance(node, ast.ImportFrom):
            # evaluate copies the modules beside a script, and so makes them importable by `from .name import …`.
            start = file.parents[node.level - 1] if 0 < node.level <= len(file.parents) else Path()
            module = f"{node.module}." if node.module else ""
            for name in node.names:
                yield from _modules(start, f"{module}{name.name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from (file for file in (Path(node.value), folder / node.value) if _is_file(file))


def _parse(source: bytes) -> ast.Module:
    """Parse, again if another thread parses at the same time, which CPython before 3.11.8 reports as a SystemError."""
    for _ in range(PARSE_ATTEMPTS - 1):
        with suppress(SystemError):
            return ast.parse(source)
    return ast.parse(source)


def _modules(start: Path, name: str) -> Iterator[Path]:
    """Yield the files of a module with a dotted name, and of the packages that it is in."""
    if start == Path() and name.partition(".")[0] == OURS:
        return
    path = start
    for part in name.split("."):
        path /= part
        yield from (file for file in (path.with_name(f"{part}.py"), path / "__init__.py") if _is_file(file))


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113  # Path.is_file raises for a text that cannot be a path
