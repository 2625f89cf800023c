"""Whether an interrupted stage saved anything that its next attempt can resume from."""

from __future__ import annotations

from pathlib import Path

from loraflow.store.checkpoints import COMPLETE, FOLDER


def saves_since(work: Path, started: float, *, is_shared: bool) -> bool:
    """Tell whether a job's work folder has a complete checkpoint, finished answers or shards that are new.

    Args:
        work: the job's work folder.
        started: when the attempt started, in seconds since 1970.
        is_shared: whether other machines see the work folder. If not, they see its checkpoints only.
    """
    kept = [*work.glob(f"{FOLDER}/*/{COMPLETE}")]
    if is_shared:
        kept += [*work.glob("answers*.jsonl"), *work.glob("shards/*")]
    return any(file.stat().st_mtime >= started for file in kept)
