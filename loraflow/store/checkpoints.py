"""Checkpoints that a resume can trust: hashes are written last, and only a checkpoint that matches them is used.

They are in a job's work folder, in `checkpoints/checkpoint-<step>/`. The trainer writes its folders in place, and resumes
from the one with the largest number, complete or not.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from pydantic import JsonValue

from loraflow.store.files import files_below, fsync_tree, hash_file, is_inside, write_atomic, write_json

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
COMPLETE = "complete.json"  # a checkpoint's seal
FORCED = "forced"  # a work folder's mark: the digest of the artifact that is recomputed


class Seal(TypedDict):
    """The content of a checkpoint's seal."""

    files: dict[str, str]  # sha256 by relative path
    needs: str | None  # the checkpoint that a resume reads too, such as the best so far; may be the same one


def seal(checkpoint: Path, needs: str | None = None) -> None:
    """Flush a checkpoint to the disk and write its seal.

    `needs` is the name of the checkpoint that a resume reads too: this one, or another.
    """
    fsync_tree(checkpoint)
    hashes = {name: hash_file(path) for name, path in files_below(checkpoint) if name != COMPLETE}
    write_json(checkpoint / COMPLETE, {"files": hashes, "needs": needs})


def seal_of(checkpoint: Path) -> Seal | None:
    """Read a checkpoint's seal; return None if there is none, or it is not valid."""
    try:
        return read_seal((checkpoint / COMPLETE).read_bytes())
    except OSError:
        return None


def read_seal(data: bytes) -> Seal | None:
    """Parse a seal; return None if it is not valid, or names a file outside its folder."""
    try:
        value: JsonValue = json.loads(data)
    except ValueError:
        return None
    if not isinstance(value, dict) or "needs" not in value:
        return None
    needs, stored = value["needs"], value.get("files")
    if not isinstance(stored, dict) or not (needs is None or isinstance(needs, str)):
        return None
    files = {name: sha256 for name, sha256 in stored.items() if isinstance(sha256, str)}
    if len(files) != len(stored) or not all(map(is_inside, files)) or (needs is not None and step_of(needs) is None):
        return None
    return Seal(files=files, needs=needs)


def is_whole(checkpoint: Path) -> bool:
    """Hash a checkpoint's files; tell whether they are the ones that were sealed."""
    found = seal_of(checkpoint)
    try:
        return found is not None and all(hash_file(checkpoint / name) == sha for name, sha in found["files"].items())
    except OSError:
        return False


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's name; return None for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", name)
    return int(found[1]) if found else None


def required_step(name: str) -> int:
    """Return the step in the name of what is known to be a checkpoint."""
    step = step_of(name)
    assert step is not None, name
    return step


def needed_names(checkpoint: Path) -> list[str]:
    """Return the names of the checkpoints that a resume from this one reads, this one last."""
    found = seal_of(checkpoint)
    needs = found["needs"] if found else None
    return [checkpoint.name] if needs in (None, checkpoint.name) else [needs, checkpoint.name]


def sealed_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that have a seal, newest first. Their files are not read."""
    found = [path for path in folder.glob("checkpoint-*") if step_of(path.name) is not None and seal_of(path)]
    return sorted(found, key=lambda path: required_step(path.name), reverse=True)


def intact_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints whose files, and those of the one they need, are as sealed; newest first."""
    for checkpoint in sealed_checkpoints(folder):
        if all(is_whole(folder / name) for name in needed_names(checkpoint)):
            yield checkpoint


def newest_whole(folder: Path) -> Path | None:
    """Return the newest intact checkpoint, and remove newer ones, which the trainer would use.

    The caller must be alone in the folder: another process may be about to seal a checkpoint that is incomplete now.
    """
    newest = next(intact_checkpoints(folder), None)
    for path in folder.glob("checkpoint-*"):
        step = step_of(path.name)
        if step is not None and (newest is None or step > required_step(newest.name)):
            log.warning("%s is removed: it, or a checkpoint that it needs, is incomplete", path.name)
            shutil.rmtree(path)
    return newest


def forced_digest(work: Path) -> str | None:
    """Return the digest of the artifact that the job of a work folder recomputes; None if it is not forced."""
    mark = work / FORCED
    return mark.read_text() if mark.exists() else None


def reset_work_folder(work: Path, digest: str | None) -> None:
    """Remove what an earlier computation left.

    With a digest, mark the folder: attempts that recompute the same artifact resume from each other.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if digest is not None:
        write_atomic(work / FORCED, digest.encode())
