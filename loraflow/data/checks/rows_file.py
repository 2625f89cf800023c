"""A file of a dataset as check_dataset reads it: row by row, each with the bytes that decide how it is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.answers.labels import Labels
from loraflow.data.chats import REASONING_KEYS, BadRow, without_reasoning
from loraflow.data.checks.row_segment import RowSegment, SegmentBuilder
from loraflow.data.files.json_reader import RawValue, json_line, read_lines
from loraflow.data.files.readers import Row, RowSettings, checked_suffix, labels_of, read_row, read_values
from loraflow.store.chunk_cache import segments

MAX_BYTES = 500_000  # of a segment, but for its last row
_LINES = (".jsonl", ".ndjson")
_BATCH = 1000  # rows of other files that are cut into segments together


class RowItem(NamedTuple):
    """A row that was not converted yet, and is not a line."""

    number: int  # from 1
    content: bytes  # decides how the row is read
    value: RawValue


class FileRows(NamedTuple):
    """A segment of a file's rows."""

    place: str  # what the places of the rows begin with
    first: int  # number of the first one, from 1
    rows: Sequence[bytes | RowItem]  # lines, which may be blank, or rows


def contents(rows: Sequence[bytes | RowItem]) -> Sequence[bytes]:
    """Return the bytes that decide how each row is read."""
    if set(map(type, rows)) <= {bytes}:
        return rows  # type: ignore[return-value]
    return [row if isinstance(row, bytes) else row.content for row in rows]


@dataclass(frozen=True)
class RowsFile:
    """A file of a dataset.

    Attributes:
        folder: the dataset's.
        name: of the file, relative to the folder.
        settings: how rows become chats.
        set_name: of the rows.
        source: of the rows (data.sources).
        is_pinned: that source is used for training only.
    """

    folder: Path
    name: str
    settings: RowSettings
    set_name: str
    source: str | None = None
    is_pinned: bool = False

    def labels(self) -> Labels:
        """Return what knows the labels of the file."""
        return labels_of(self.folder / self.name, self.name, self.settings)

    def rows(self) -> Iterator[Row]:
        """Yield the rows as chats. A malformed row is yielded with its problem. It raises what `items` raises."""
        labels = self.labels()
        for value in read_values(self.folder / self.name, self.name, self.settings.query):
            yield read_row(value, self.settings, labels)

    def segments(self) -> Iterator[FileRows]:
        """Yield the rows as they are.

        Raises:
            BadData: the file cannot be read, or its kind is unknown.
        """
        path = self.folder / self.name
        if checked_suffix(path, self.name) in _LINES:
            first = 1
            for rows in segments(self._lines(path), contents, MAX_BYTES):
                yield FileRows(f"{self.name}:", first, rows)
                first += len(rows)
            return
        items = map(_item, read_values(path, self.name, self.settings.query))
        for found in segments(iter(lambda: list(islice(items, _BATCH)), []), contents, MAX_BYTES):
            number = found[0].number
            yield FileRows(found[0].value.place.removesuffix(str(number)), number, found)

    def _lines(self, path: Path) -> Iterator[Sequence[bytes | RowItem]]:
        for number, lines in read_lines(path, self.name):
            yield [_item(RawValue(f"{self.name}:{number}", lines, ""))] if isinstance(lines, BadRow) else lines


def _item(value: RawValue) -> RowItem:
    number = int(value.place.rpartition(":")[2].removeprefix("row "))
    # repr, because cells of Parquet may be of types that JSON lacks
    return RowItem(number, f"{value.value!r}\n{value.text}".encode("utf-8", "surrogatepass"), value)


def read_segment(segment: FileRows, file: RowsFile, config: CheckDatasetConfig, labels: Labels) -> RowSegment:
    """Convert the rows of a segment to chats.

    Raises:
        BadData: the file cannot be read.
        MissingExtra: rensa is not installed.
    """
    builder = SegmentBuilder(config, is_training=file.settings.is_training, is_pinned=file.is_pinned)
    labels.asked = {}
    for position, item in enumerate(segment.rows):
        if isinstance(item, bytes):
            if item.isspace():
                continue
            number, value = position, json_line(item, "")
        else:
            number, value = item.number - segment.first, item.value
        builder.add(number, with_thinking(read_row(value, file.settings, labels), config.thinking))
    return builder.segment(labels.asked)


NOT_RENDERED = "would not be learned: put it into content, as <think> … </think>, or leave it out: data.thinking: strip"


def with_thinking(row: Row, thinking: Literal["strip"] | None) -> Row:
    """Return a row as data.thinking wants it: without its reasoning, or malformed if its reasoning would not be learned."""
    if row.messages is None:
        return row
    if thinking == "strip":
        messages = without_reasoning(row.messages)
        if any(not m["content"].strip() for m in messages if m["role"] == "assistant" and "tool_calls" not in m):
            return replace(row, messages=None, problem="an answer is empty without its reasoning (data.thinking)")
        return replace(row, messages=messages)
    if reasoning := reasoning_key(row.unused_keys):
        return replace(row, messages=None, problem=f"{reasoning} {NOT_RENDERED}")
    return row


def reasoning_key(unused_keys: Sequence[str]) -> str | None:
    """Return the key of messages whose reasoning is not read, because it is no text of an answer; None if there is none."""
    return next((key for key in unused_keys if "." in key and key.rpartition(".")[2] in REASONING_KEYS), None)
