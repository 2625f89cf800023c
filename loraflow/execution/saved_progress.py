"""Whether a stage that was ended has saved something that its next attempt goes on from."""

from __future__ import annotations

from pathlib import Path

from loraflow.store.checkpoints import COMPLETE, FOLDER


def saves_since(work: Path, started: float) -> bool:
    """Tell whether a job's work folder has a complete checkpoint, finished answers or shards that are new.

    Args:
        work: the job's work folder.
        started: when the attempt started, in seconds since 1970.
    """
    kept = [*work.glob(f"{FOLDER}/*/{COMPLETE}"), *work.glob("answers*.jsonl"), *work.glob("shards/*")]
    return any(file.stat().st_mtime >= started for file in kept)
