"""Checkpoints that a resume can trust: a list of hashes is written last, and only a folder that matches it is used.

They lie in a job's work folder, in `checkpoints/checkpoint-<step>/`. The trainer writes its folders in place, and takes
the one with the largest number, torn or not.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loraflow.store.files import files_below, fsync_tree, hash_file, is_inside, write_atomic, write_json

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
COMPLETE = "complete.json"
FORCED = "forced"


def seal(checkpoint: Path, needs: str | None = None) -> None:
    """Flush a checkpoint and write the list of its hashes, and which one a resume needs: its own name, or another's."""
    fsync_tree(checkpoint)
    hashes = {name: hash_file(path) for name, path in files_below(checkpoint) if name != COMPLETE}
    write_json(checkpoint / COMPLETE, {"files": hashes, "needs": needs})


def seal_of(checkpoint: Path) -> dict[str, Any] | None:
    """Return what was sealed: `files`, their sha256 by name, and `needs`. None without a seal that can be read."""
    try:
        return read_seal((checkpoint / COMPLETE).read_bytes())
    except OSError:
        return None


def read_seal(data: bytes) -> dict[str, Any] | None:
    """Read a seal's file; None if it is none, or names a file outside of its folder."""
    try:
        seal = json.loads(data)
        needs, names = seal["needs"], seal["files"].keys()
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return seal if all(map(is_inside, names)) and (needs is None or step_of(needs) is not None) else None


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint's files are the ones that were sealed."""
    sealed = seal_of(checkpoint)
    try:
        return sealed is not None and all(hash_file(checkpoint / name) == sha for name, sha in sealed["files"].items())
    except OSError:
        return False


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint's name, None if it is no checkpoint's."""
    found = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(found[1]) if found else None


def sealed(folder: Path) -> list[Path]:
    """Return the checkpoints that have a seal, the newest first. Their files are not looked at."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path.name) is not None and seal_of(path)]
    return sorted(found, key=_step, reverse=True)


def whole(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints that are whole, with the one that they need, the newest first."""
    for checkpoint in sealed(folder):
        needs = (seal_of(checkpoint) or {}).get("needs")
        if is_whole(checkpoint) and (needs in (None, checkpoint.name) or is_whole(folder / needs)):
            yield checkpoint


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, and remove newer ones, which the trainer would find.

    Whoever calls this has the folder to itself: another one may be about to seal what is not whole yet.
    """
    newest = next(whole(folder), None)
    for path in folder.glob("checkpoint-*"):
        if step_of(path.name) is not None and (newest is None or _step(path) > _step(newest)):
            log.warning("%s is not whole, or lacks one that it needs; it is removed", path.name)
            shutil.rmtree(path)
    return newest


def forced_over(work: Path) -> str | None:
    """Return the digest of the artifact instead of which a work folder's job is computed anew."""
    mark = work / FORCED
    return mark.read_text() if mark.exists() else None


def begin_anew(work: Path, digest: str | None) -> None:
    """Drop what an earlier computation left. Attempts that are forced over the same artifact go on from each other."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if digest is not None:
        write_atomic(work / FORCED, digest.encode())


def _step(path: Path) -> int:
    step = step_of(path.name)
    assert step is not None
    return step
