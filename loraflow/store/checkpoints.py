"""Checkpoints that a resume can trust: a manifest with hashes is written last, and must match when a job resumes.

Checkpoints are in a job's work folder, in `checkpoints/checkpoint-<step>/`. The trainer writes these folders in place.
"""

import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from pydantic import JsonValue

from loraflow.failures import DISK_FAULTS, StorageError
from loraflow.store.checksum import ChangedDocument, check_document, with_checksum
from loraflow.store.files import (
    file_type,
    files_below,
    fsync_tree,
    hash_file,
    is_inside,
    raise_machine_fault,
    read_file,
    set_default_modes,
    write_atomic,
)

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
COMPLETE = "complete.json"  # the manifest of a checkpoint
RECOMPUTE_MARK = "forced"  # file in a work folder: the digest of the artifact that is recomputed


class CheckpointManifest(TypedDict):
    """The content of `complete.json`: the hashes of a checkpoint's files, written when all of them are on disk."""

    files: dict[str, str]  # sha256 by relative path
    needs: str | None  # another checkpoint that a resume also reads, such as the best so far; may be this one


def finalize_checkpoint(checkpoint: Path, needs: str | None = None) -> None:
    """Flush a checkpoint to disk and write its manifest.

    `needs` is the name of the checkpoint that a resume also reads: this one, or another.
    """
    set_default_modes(checkpoint)
    fsync_tree(checkpoint)
    hashes = {name: hash_file(path) for name, path in files_below(checkpoint) if name != COMPLETE}
    write_atomic(checkpoint / COMPLETE, with_checksum(_name(checkpoint), {"files": hashes, "needs": needs}))


def _name(checkpoint: Path) -> str:
    """Return the name that the checksum covers: the work folder is named by the job's fingerprint."""
    return f"{checkpoint.parent.parent.name}/{checkpoint.name}"


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest | None:
    """Read a checkpoint's manifest; return None if it is missing, damaged or of another job, or the disk cannot read it.

    Raises:
        Failure: the system or a network failed, or the permission is missing. The checkpoint may be intact.
    """
    try:
        return parse_checkpoint_manifest(check_document(_name(checkpoint), read_file(checkpoint / COMPLETE)))
    except ChangedDocument:
        return None
    except (OSError, StorageError) as error:
        _raise_unless_lost(error)
        return None


def _raise_unless_lost(error: OSError | StorageError) -> None:
    """Do nothing if a file is missing, or on a failing disk: an older checkpoint is better than none."""
    if isinstance(error, OSError):
        raise_machine_fault(error)
    elif not (isinstance(error.__cause__, OSError) and error.__cause__.errno in DISK_FAULTS):
        raise error


def parse_checkpoint_manifest(data: bytes) -> CheckpointManifest | None:
    """Parse a checkpoint's manifest; return None if it is not valid, or names a file outside its folder."""
    try:
        value: JsonValue = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or "needs" not in value:
        return None
    needs, stored = value["needs"], value.get("files")
    if not isinstance(stored, dict) or not (needs is None or isinstance(needs, str)):
        return None
    files = {name: sha256 for name, sha256 in stored.items() if isinstance(sha256, str)}
    if len(files) != len(stored) or not all(map(is_inside, files)) or (needs is not None and step_of(needs) is None):
        return None
    return CheckpointManifest(files=files, needs=needs)


def is_intact(checkpoint: Path) -> bool:
    """Hash a checkpoint's files; tell whether they match its manifest."""
    found = read_checkpoint_manifest(checkpoint)
    try:
        return found is not None and all(hash_file(checkpoint / name) == sha for name, sha in found["files"].items())
    except (OSError, StorageError) as error:
        _raise_unless_lost(error)
        return False


def step_of(name: str) -> int | None:
    """Return the step in a checkpoint's name; return None for any other name."""
    found = re.fullmatch(r"checkpoint-([0-9]{1,18})", name)  # Python refuses numbers of more than 4,300 digits
    return int(found[1]) if found else None


def required_step(name: str) -> int:
    """Return the step in the name of a checkpoint's folder."""
    step = step_of(name)
    assert step is not None, name
    return step


def needed_names(checkpoint: Path) -> list[str]:
    """Return the names of the checkpoints that a resume from this one reads, this one last."""
    found = read_checkpoint_manifest(checkpoint)
    needs = found["needs"] if found else None
    return [checkpoint.name] if needs in (None, checkpoint.name) else [needs, checkpoint.name]


def finalized_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that have a manifest, newest first. Their files are not read."""
    paths = [path for path in folder.glob("checkpoint-*") if step_of(path.name) is not None]
    found = [path for path in paths if read_checkpoint_manifest(path) is not None]
    return sorted(found, key=lambda path: required_step(path.name), reverse=True)


def intact_checkpoints(folder: Path) -> Iterator[Path]:
    """Yield the checkpoints that are intact, together with the checkpoint that they need; newest first."""
    for checkpoint in finalized_checkpoints(folder):
        if all(is_intact(folder / name) for name in needed_names(checkpoint)):
            yield checkpoint


def prune_to_newest_intact(folder: Path) -> Path | None:
    """Remove the checkpoints that are newer than the newest intact one, and return that one; None if none is intact.

    The trainer would resume from the newest folder, intact or not. No other process may use the folder: it may be about
    to finalize a checkpoint that is still incomplete.
    """
    newest = next(intact_checkpoints(folder), None)
    for path in folder.glob("checkpoint-*"):
        step = step_of(path.name)
        if step is not None and (newest is None or step > required_step(newest.name)):
            log.warning("%s is removed: it, or a checkpoint that it needs, is incomplete", path.name)
            shutil.rmtree(path)
    return newest


def remove_incomplete(folder: Path) -> None:
    """Remove the checkpoints without a manifest, which were cut off. No process may be writing a checkpoint."""
    for path in folder.glob("checkpoint-*"):
        if step_of(path.name) is not None and not file_type(path / COMPLETE):
            log.warning("%s is removed: it is incomplete", path.name)
            shutil.rmtree(path, ignore_errors=True)


def recompute_digest(work: Path) -> str | None:
    """Return the digest of the artifact that a work folder's job recomputes; None for a first computation."""
    mark = work / RECOMPUTE_MARK
    return mark.read_bytes().decode(errors="replace") if file_type(mark) else None  # damaged, it is another digest


def reset_work_folder(work: Path, digest: str | None) -> None:
    """Remove what an earlier computation left.

    With a digest, mark the folder: attempts that recompute the same artifact resume from each other.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    if digest is not None:
        write_atomic(work / RECOMPUTE_MARK, digest.encode())
