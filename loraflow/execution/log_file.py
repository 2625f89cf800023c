"""The log and the progress file of a worker, read in small parts and kept small on the disk."""

import logging
import os
from pathlib import Path

from loraflow.credentials import mask

log = logging.getLogger(__name__)

LOGS = ("log.txt", "log-before.txt")  # a worker's log, and the end of what was removed from it
MAX_LOG = 64 * 2**20  # bytes, after which the log is emptied; the end of it is kept as `log-before.txt`
KEPT_LOG = 4 * 2**20  # bytes of it
MAX_PROGRESS = 16 * 2**20  # bytes, after which the lines that were read are removed
MAX_LINE = 2**16  # bytes of a line of progress
_MAX_READ = 2**20  # bytes that are read at a time


def read_tail(path: Path, size: int) -> str:
    """Return the last bytes of a file as text; an empty string if there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size).decode(errors="replace").strip()
    except FileNotFoundError:
        return ""


def limit_log(path: Path) -> None:
    """Empty a log that has become too large, and keep its end in `log-before.txt`.

    The worker appends to the file, so its next line is the first one. Lines that it writes just now may be lost.
    """
    try:
        if path.stat().st_size <= MAX_LOG:
            return
        tail = read_tail(path, KEPT_LOG)
        os.truncate(path, 0)  # first: this makes room
        path.with_name(LOGS[1]).write_text(tail, encoding="utf-8")
    except OSError as error:
        log.warning("the log %s is not shortened: %s", path, error)


def mask_log(path: Path) -> None:
    """Mask the credentials in the log of a worker that has ended.

    The worker masks what Python prints. Programs and C libraries write past that, and the launcher knows more credentials.
    """
    draft = path.with_name(f".{path.name}.masked")
    changed = False
    try:
        with (
            path.open(encoding="utf-8", errors="surrogateescape", newline="") as log_file,
            draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as masked_file,
        ):
            for line in log_file:
                masked = mask(line)
                changed = changed or masked != line
                masked_file.write(masked)
        if changed:
            os.replace(draft, path)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("the log %s is not masked: %s", path, error)
    finally:
        draft.unlink(missing_ok=True)


class ProgressReader:
    """Read the complete lines that a worker appended to its progress file."""

    def __init__(self, path: Path):
        self.path = path
        self._offset = 0
        self._is_inside_long_line = False

    def new_lines(self) -> list[bytes]:
        """Return the lines since the last call. A line that is too long is left out."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size < self._offset:  # the file was begun again
                    self._offset = 0
                file.seek(self._offset)
                block = file.read(_MAX_READ)
        except FileNotFoundError:
            return []
        complete = block[: block.rfind(b"\n") + 1]
        lines = complete.splitlines()
        if self._is_inside_long_line and lines:
            lines, self._is_inside_long_line = lines[1:], False
        if not complete and len(block) >= MAX_LINE:
            complete, self._is_inside_long_line = block, True
        self._offset += len(complete)
        if self._offset > MAX_PROGRESS and self._offset == self.path.stat().st_size:
            os.truncate(self.path, 0)
            self._offset = 0
        return [line for line in lines if len(line) <= MAX_LINE]
