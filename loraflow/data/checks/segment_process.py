"""Read segments of rows in processes of their own, so that all cores read a large dataset.

A process is a new Python, not a fork: the flow's process has threads. It gets pickled segments through a pipe, and returns
each as the content of a cache's entry.
"""

import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from tempfile import TemporaryFile

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.answers.labels import Labels
from loraflow.data.checks.rows_file import FileRows, RowsFile, read_segment
from loraflow.failures import Crashed, Failure, Killed

MAX_PROCESSES = 4


def processors() -> int:
    """Return how many processors this process may use: a container or a scheduler may allow only some of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class SegmentProcesses:
    """Processes that read segments.

    Raises:
        OSError: a process cannot be started. None is left.
    """

    def __init__(self, config: CheckDatasetConfig):
        self.count = min(processors(), MAX_PROCESSES)
        self._children: list[_Child] = []
        self._threads = ThreadPoolExecutor(self.count, "segments")  # each waits for a process
        self._free: SimpleQueue[_Child] = SimpleQueue()
        try:
            for _ in range(self.count):
                self._children.append(_Child(config))
                self._free.put(self._children[-1])
        except OSError:
            self.close()
            raise

    def submit(self, segment: FileRows, file: RowsFile) -> Future[bytes | None]:
        """Read a segment; the result is its content, or None if the process raised an exception.

        The result raises `Killed` if the process was killed, and `Crashed` if it ended by itself.
        """
        return self._threads.submit(self._read, pickle.dumps((file, segment)))

    def _read(self, message: bytes) -> bytes | None:
        child = self._free.get()
        try:
            return child.ask(message)
        finally:
            self._free.put(child)

    def close(self) -> None:
        """End the processes, whether they are done or not."""
        for child in self._children:
            child.kill()
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close()


class _Child:
    def __init__(self, config: CheckDatasetConfig):
        self._config: CheckDatasetConfig | None = config
        self._errors = TemporaryFile()  # noqa: SIM115 - closed with the process
        readable, writable = os.pipe()
        try:
            self._process = subprocess.Popen(
                # -P: a module of the current folder, such as token.py, must not replace one of Python
                [sys.executable, "-P", "-m", "loraflow.data.checks.segment_process", str(writable)],
                stdin=subprocess.PIPE,
                stdout=self._errors,  # what a library prints must not get between the answers
                stderr=self._errors,
                pass_fds=[writable],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},  # noqa: PTH109
            )
        except OSError:
            os.close(readable)
            self._errors.close()
            raise
        finally:
            os.close(writable)
        self._answers = os.fdopen(readable, "rb")

    def ask(self, message: bytes) -> bytes | None:
        """Send a message and return the answer; None if the process raised an exception."""
        to = self._process.stdin
        assert to is not None
        try:
            if self._config is not None:
                pickle.dump(self._config, to)
                self._config = None
            to.write(message)
            to.flush()
            answer: bytes | None = pickle.load(self._answers)
        except (
            BrokenPipeError,
            EOFError,
            pickle.UnpicklingError,
        ):  # the last two: there is no answer, or a part of one
            raise self._ended() from None
        return answer

    def kill(self) -> None:
        """End the process."""
        self._process.kill()

    def close(self) -> None:
        """Close the pipes of a process that was ended."""
        self._process.wait()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._answers.close()
        self._errors.close()

    def _ended(self) -> Failure:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        got = f"exit status {code}" + (f": {lines[-1][:200]}" if lines else "")
        if code < 0:
            return Killed(
                "A process that reads rows was killed.",
                where="check_dataset",
                got=got,
                next_step="run it again with more free memory",
            )
        return Crashed(
            "A process that reads rows ended early.",
            where="check_dataset",
            got=got,
            next_step="correct the cause that it names, then run it again",
        )


def main(answers_to: int) -> None:
    """Read segments from standard input, and write their contents to a pipe, whose file descriptor is given.

    None says that an exception was raised: whoever asked reads the segment itself, and so raises it where it is handled.
    """
    answers = os.fdopen(answers_to, "wb")
    known: tuple[RowsFile, Labels] | None = None
    with suppress(EOFError):
        config: CheckDatasetConfig = pickle.load(sys.stdin.buffer)
        while True:
            file, segment = pickle.load(sys.stdin.buffer)
            if known is None or known[0] != file:
                known = file, file.labels()
            answer: bytes | None = None
            try:
                answer = read_segment(segment, file, config, known[1]).as_bytes()
            except Exception as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                known = None
            pickle.dump(answer, answers)
            answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
