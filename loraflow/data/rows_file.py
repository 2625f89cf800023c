"""A file of a dataset as check_dataset reads it: row by row, each with the bytes that decide how it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import BadRow
from loraflow.data.json_reader import RawValue, json_line, read_lines
from loraflow.data.labels import Labels
from loraflow.data.readers import Row, RowSettings, checked_suffix, labels_of, read_row, read_values
from loraflow.data.row_segment import RowSegment, SegmentBuilder
from loraflow.data.thinking import with_thinking

_LINES = (".jsonl", ".ndjson")


class RowItem(NamedTuple):
    """A row of a file that was not converted yet."""

    number: int  # of its line or row, from 1
    content: bytes  # decides how the row is read
    value: RawValue | None  # the row; None: the content is a line, which may be blank


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

    def items(self) -> Iterator[RowItem]:
        """Yield the rows as they are.

        Raises:
            BadData: the file cannot be read, or its kind is unknown.
        """
        path = self.folder / self.name
        if checked_suffix(path, self.name) in _LINES:
            for number, line in read_lines(path, self.name):
                if isinstance(line, BadRow):
                    yield _item(RawValue(f"{self.name}:{number}", line, ""))
                else:
                    yield RowItem(number, line, None)
        else:
            yield from map(_item, read_values(path, self.name, self.settings.query))

    def place(self, item: RowItem) -> str:
        """Return what the places of rows like this one begin with."""
        place = f"{self.name}:" if item.value is None else item.value.place
        return place.removesuffix(str(item.number))


def _item(value: RawValue) -> RowItem:
    number = int(value.place.rpartition(":")[2].removeprefix("row "))
    # repr, because cells of Parquet may be of types that JSON lacks
    return RowItem(number, f"{value.value!r}\n{value.text}".encode("utf-8", "surrogatepass"), value)


def read_segment(items: Sequence[RowItem], file: RowsFile, config: CheckDatasetConfig, labels: Labels) -> RowSegment:
    """Convert the rows of a segment to chats.

    Args:
        items: the rows, of which there is one at least.
        file: their file.
        config: the stage's config.
        labels: knows the labels of the file.

    Raises:
        BadData: the file cannot be read.
        MissingExtra: rensa is not installed.
    """
    builder = SegmentBuilder(config, is_training=file.settings.is_training, is_pinned=file.is_pinned)
    labels.asked = {}
    first = items[0].number
    for number, content, value in items:
        if value is None and content.isspace():
            continue
        row = read_row(value or json_line(content, ""), file.settings, labels)
        builder.add(number - first, with_thinking(row, config.thinking))
    return builder.segment(labels.asked)
