"""Read files in segments of rows: those that a cache has, and the others on all cores.

An entry depends on the rows of its segment, the settings by which they are read, this code, and the answers to questions
about the whole file, such as whether its labels are classes (`answers/labels.py`). An entry whose answers are not
those of the file is not used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from loraflow import stage_code
from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.answers.labels import Labels, Question
from loraflow.data.checks.row_segment import RowSegment
from loraflow.data.checks.rows_file import FileRows, RowItem, RowsFile, contents, read_segment
from loraflow.data.checks.segment_process import SegmentProcesses, processors
from loraflow.job import Job
from loraflow.store.chunk_cache import ChunkCache

log = logging.getLogger("loraflow")

FORMAT = 2  # of the entries
ALONE_ROWS = 20_000  # that are read before processes are started: each takes 0.6 s of processor time
ALONE_BYTES = 20_000_000
# Settings of the stage that do not decide how a row is read, or that each file has in its own settings
_OF_THE_WHOLE = {
    "format", "columns", "ignore", "tools", "sources", "train", "heldout", "extra_heldout", "heldout_fields", "duplicates",
    "limit", "profile", "near_duplicates",
}  # fmt: skip


class PlacedSegment(NamedTuple):
    """A segment, and where its rows are."""

    segment: RowSegment
    place: str  # what places begin with
    first: int  # number of the first row in its file


@dataclass(frozen=True)
class _Pending:
    segment: FileRows
    key: str
    found: RowSegment | Future[bytes | None]
    is_cached: bool


class SegmentReader:
    """Read files one after another.

    Args:
        cache: of segments; None reads all rows.
        of_job: what the cache's entries depend on beside file and rows.

    Attributes:
        computed: rows that were not in the cache, with malformed ones and blank lines.
    """

    def __init__(self, config: CheckDatasetConfig, cache: ChunkCache | None = None, of_job: bytes = b""):
        self._config, self._cache, self._of_job = config, cache, of_job
        self.computed = 0
        self._computed_bytes = 0
        self._processes: SegmentProcesses | None = None
        self._is_decided = False  # whether to start processes

    def close(self) -> None:
        """End the processes."""
        if self._processes is not None:
            self._processes.close()

    def read(self, file: RowsFile) -> Iterator[PlacedSegment]:
        """Yield the segments of a file, in order.

        Raises:
            BadData: the file cannot be read, or its kind is unknown.
            Killed: a process was killed.
            Crashed: a process ended by itself.
        """
        settings = {field.name: getattr(file.settings, field.name) for field in fields(file.settings)}
        settings |= {"columns": dict(file.settings.columns), "ignore": sorted(file.settings.ignore)}
        # The name of a file decides nothing.
        decisive = json.dumps([settings, file.is_pinned], sort_keys=True).encode()
        of_file = hashlib.sha256(self._of_job + decisive) if self._cache is not None else None
        labels, answers = file.labels(), dict[Question, bool]()
        pending: deque[_Pending] = deque()
        for segment in file.segments():
            key = "" if of_file is None else _key_of_rows(of_file, segment)
            cached = self._cached(key, answers)
            found = self._compute(segment, file, labels) if cached is None else cached
            pending.append(_Pending(segment, key, found, cached is not None))
            while pending and (
                not isinstance(found := pending[0].found, Future)
                or found.done()
                or self._processes is None
                or len(pending) > 3 * self._processes.count
            ):
                yield self._finish(pending.popleft(), file, labels, answers)
        while pending:
            yield self._finish(pending.popleft(), file, labels, answers)

    def _cached(self, key: str, answers: dict[Question, bool]) -> RowSegment | None:
        content = None if self._cache is None else self._cache.read(key)
        if content is None:
            return None
        found = RowSegment.from_bytes(content)
        # A question that was not asked of this file in this run has no answer yet: the segment asks it.
        return found if all(answers.get(question) == answer for question, answer in found.asked.items()) else None

    def _compute(self, segment: FileRows, file: RowsFile, labels: Labels) -> RowSegment | Future[bytes | None]:
        is_large = self.computed >= ALONE_ROWS or self._computed_bytes >= ALONE_BYTES
        if is_large and not self._is_decided:
            self._processes, self._is_decided = self._started(), True
        self.computed += len(segment.rows)
        self._computed_bytes += sum(map(len, contents(segment.rows)))
        if self._processes is not None:
            return self._processes.submit(segment, file)
        return read_segment(segment, file, self._config, labels)

    def _started(self) -> SegmentProcesses | None:
        """Return processes that read rows; None if there is one processor, or if they cannot be started."""
        if processors() == 1:
            return None
        try:
            return SegmentProcesses(self._config)
        except OSError as error:
            log.warning("Rows are read in one process, because others cannot be started: %s", error)
            return None

    def _finish(
        self, pending: _Pending, file: RowsFile, labels: Labels, answers: dict[Question, bool]
    ) -> PlacedSegment:
        found, content = pending.found, None
        if isinstance(found, Future):
            content = found.result()
            if content is None:  # an exception of the process is raised here, where it is handled
                found = read_segment(pending.segment, file, self._config, labels)
            else:
                found = RowSegment.from_bytes(content)
        answers |= found.asked
        if self._cache is not None and not pending.is_cached:
            self._cache.write(pending.key, content or found.as_bytes())
        return PlacedSegment(found, pending.segment.place, pending.segment.first)


def key_of_job(job: Job[CheckDatasetConfig]) -> bytes:
    """Return what the entries of a job depend on beside file and rows."""
    config = job.config
    try:
        rensa = version("rensa")
    except PackageNotFoundError:
        rensa = ""
    values = [
        FORMAT,
        job.version,
        stage_code.source_hash(stage_code.CHECK_DATASET),
        unicodedata.unidata_version,
        rensa,
        config.near_duplicates is not None,
        bool(config.heldout),
        config.model_dump(mode="json", exclude=_OF_THE_WHOLE),
    ]
    return json.dumps(values, sort_keys=True).encode()


def _key_of_rows(of_file: hashlib._Hash, segment: FileRows) -> str:
    found = of_file.copy()
    rows, others = contents(segment.rows), list[tuple[int, int, int]]()
    if rows is not segment.rows:
        items = enumerate(segment.rows)
        others = [(n, len(row.content), row.number - segment.first) for n, row in items if isinstance(row, RowItem)]
    # Lines end with a line break, so their bytes say which they are; of other rows, sizes and numbers are needed.
    found.update(json.dumps([len(rows), others]).encode())
    found.update(b"".join(rows))
    return found.hexdigest()
