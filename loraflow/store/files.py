"""Hashing and durable writing of plain files."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

BLOCK = 4 * 2**20


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Return the hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def files_below(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (relative posix path, path) of each regular file below a folder, sorted.

    Raises:
        ValueError: for anything that is neither a folder nor a regular file: a link could point out of the store.
    """
    for root, dirs, names in os.walk(folder):
        dirs.sort()
        for name in sorted(dirs + names):
            path = Path(root, name)
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise ValueError(f"{path} is neither a folder nor a regular file")
            yield path.relative_to(folder).as_posix(), path


def is_inside(name: str) -> bool:
    """Tell whether a relative name from elsewhere stays inside of the folder that it is put into."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name and bool(path.parts)


def fsync_path(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder below a folder, and the folder itself."""
    for root, _, names in os.walk(folder):
        for name in names:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new, never a part."""
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys sorted, readable."""
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


class HashMemo:
    """Hashes of files, remembered by path, size, mtime and inode, so that a second look costs one stat.

    A file whose mtime is younger than two seconds is not remembered: it could be written again within the same tick.
    """

    def __init__(self, path: Path | None):
        self.path = path
        self.changed = False
        try:
            self.known: dict[str, list[Any]] = json.loads(path.read_bytes()) if path else {}
        except (FileNotFoundError, json.JSONDecodeError):
            self.known = {}

    def hash(self, path: Path, algorithm: str = "sha256") -> str:
        """Return a file's hash, from memory if the file is the one that was hashed."""
        before = path.stat()
        key = f"{algorithm}:{path.resolve()}"
        stamp = [before.st_size, before.st_mtime_ns, before.st_ino]
        known = self.known.get(key)
        if known is not None and known[:3] == stamp:
            return known[3]
        value = hash_file(path, algorithm)
        import time

        if time.time_ns() - before.st_mtime_ns > 2_000_000_000:
            self.known[key] = [*stamp, value]
            self.changed = True
        return value

    def save(self) -> None:
        """Keep what was learned. A memo that cannot be written costs time, not truth, so it is let go."""
        if self.changed and self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, json.dumps(self.known).encode())
                self.changed = False
            except OSError:
                return
