"""Sketch texts in a process of its own, so that another core does it while this one reads the rows."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import IO

from loraflow.data.shingles import sketch
from loraflow.failures import Killed


class SketchProcess:
    """A process that appends the sketches of texts to a file, in the order in which they are sent.

    Args:
        file: the file, positioned at its end. Nothing else may write to it until `finish` returns.
    """

    def __init__(self, file: IO[bytes]):
        self._errors = TemporaryFile()  # noqa: SIM115 - closed with the process
        self._child = subprocess.Popen(
            [sys.executable, "-m", "loraflow.data.sketch_process"],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=self._errors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},  # noqa: PTH109
        )

    def send(self, texts: Sequence[str]) -> None:
        """Have texts sketched. They have no line breaks, as `normalize` returns them.

        Raises:
            Killed: the process has ended.
            OSError: the disk is full.
        """
        assert self._child.stdin is not None
        lines = f"{len(texts)}\n" + "".join(f"{text}\n" for text in texts)
        try:
            self._child.stdin.write(lines.encode("utf-8", "surrogatepass"))
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def finish(self) -> None:
        """Wait until all sketches are in the file.

        Raises:
            Killed: the process ended before that.
            OSError: the disk is full.
        """
        self.send(())  # not the end of the pipe, which a forked process may hold open
        if self._child.wait() != 0:
            raise self._ended()
        self.close()

    def close(self) -> None:
        """End the process, whether it is done or not."""
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._errors.close()

    def _ended(self) -> Killed | OSError:
        code = self._child.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        if lines and os.strerror(errno.ENOSPC) in lines[-1]:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write of this process would raise
        return Killed(
            "The process that searches near-duplicates ended early.",
            where="data.near_duplicates",
            got=f"exit status {code}" + (f": {lines[-1][:200]}" if lines else ""),
            next_step="run it again with more free memory",
        )


def main() -> None:
    """Read texts from standard input, as `SketchProcess` sends them, and write their sketches to standard output."""
    while number := int(sys.stdin.buffer.readline()):
        lines = [sys.stdin.buffer.readline() for _ in range(number)]
        sys.stdout.buffer.write(sketch([line[:-1].decode("utf-8", "surrogatepass") for line in lines]).data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
