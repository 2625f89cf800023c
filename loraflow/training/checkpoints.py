"""Checkpoints that a resume can trust: a list of hashes is written last, and only a folder that matches it is used.

The trainer writes its folders in place, and takes the one with the largest number, torn or not.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from loraflow.store.files import files_below, fsync_tree, hash_file, write_json

log = logging.getLogger(__name__)
COMPLETE = "complete.json"


def seal(checkpoint: Path) -> None:
    """Flush a checkpoint and write the list of its hashes."""
    fsync_tree(checkpoint)
    hashes = {name: hash_file(path) for name, path in files_below(checkpoint) if name != COMPLETE}
    write_json(checkpoint / COMPLETE, hashes)


def is_whole(checkpoint: Path) -> bool:
    """Tell whether a checkpoint's files are the ones that were sealed."""
    try:
        hashes = json.loads((checkpoint / COMPLETE).read_bytes())
        return all(hash_file(checkpoint / name) == value for name, value in hashes.items())
    except (OSError, ValueError):
        return False


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole, and remove those that are not: nothing else may find them."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = None
    for checkpoint in sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if whole is not None:
            continue
        if is_whole(checkpoint):
            whole = checkpoint
        else:
            log.warning("%s is not whole; it is removed", checkpoint.name)
            shutil.rmtree(checkpoint)
    return whole
