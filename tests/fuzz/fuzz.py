"""Give a reader a file, and see whether it does anything but return or raise a Failure."""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from loraflow.failures import Failure
from tests.fuzz.readers import READERS

CORPUS = Path(__file__).parent / "corpus"
MEMORY = 300 << 20  # bytes that a reader may use beyond what the process has
SECONDS = 10.0  # for a file of at most 400 kB


class TooSlow(Exception):
    """A reader needed more than SECONDS of processor time."""


def corpus(name: str) -> list[bytes]:
    """Return the files of a reader's corpus, sorted by name.

    No name ends with `.dvc`: DVC reads every such file of a repository, and refuses all of its commands if one is broken.
    """
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def finding(name: str, data: bytes) -> Exception | None:
    """Return the exception that is not a Failure, if a reader raises one or is too slow."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            READERS[name](data, Path(folder))
        except Failure:
            pass
        except Exception as error:
            return error
    if (seconds := time.process_time() - start) > SECONDS:
        return TooSlow(f"{seconds:.0f} s for {len(data)} bytes")
    return None


@contextlib.contextmanager
def allowance() -> Iterator[None]:
    """Limit this process's address space to what it has and MEMORY: beyond it, a reader gets a MemoryError."""
    for name in READERS:  # imports and pools first
        for data in corpus(name):
            finding(name, data)
    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
