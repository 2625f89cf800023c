"""Read people's files as chats: JSONL, JSON, CSV, TSV and Parquet."""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from pydantic import JsonValue

from loraflow.data.answers.labels import Labels
from loraflow.data.answers.marks import MarkedFalse
from loraflow.data.answers.unread_values import Told, told_by, without_ignored
from loraflow.data.cell_values import parsed_list
from loraflow.data.chats import BadRow, Message, Tool
from loraflow.data.files.dataset_files import is_hidden
from loraflow.data.files.json_reader import RawValue, read_json, read_json_lines, row_text
from loraflow.data.files.table_readers import SUFFIXES, read_sqlite, read_table, refuse_duplicates
from loraflow.data.formats.chat_formats import read_chat
from loraflow.data.formats.row_fields import RawRow
from loraflow.failures import BadData, first_line

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Row:
    """A row as read: its chat, or the reason why it has none."""

    place: str  # file:line, or file:row
    messages: list[Message] | None
    problem: str | None = None
    raw: str = ""  # the row's text
    unused_keys: tuple[str, ...] = ()  # keys that have a value and that no format reads
    learned: tuple[int, ...] | None = None  # numbers of the answers that are learned, from 0; None: every answer
    weights: tuple[float, ...] | None = None  # of each of `learned` in the loss; None: 1 for all
    is_marked_false: bool = False  # it has no chat, because its marks exclude every answer
    group: str | None = None  # the value of the field that names the row's group
    told: Told = ()  # what keys say that are not read
    marked_by: str = ""  # of a row that is marked false: keys and values of its marks, such as `is_correct: False`


def is_partly_learned(row: Row) -> bool:
    """Tell whether the marks of a row exclude some of its answers, not all."""
    return row.learned is not None and len(row.learned) < sum(m["role"] == "assistant" for m in row.messages or ())


def is_answer_learned(row: Row) -> bool:
    """Tell whether the marks of a row let its last answer be learned, or be the reference of a held-out row."""
    return row.learned is None or len(row.messages or ()) - 1 in row.learned


@dataclass(frozen=True)
class RowSettings:
    """How the rows of a file become chats. See `read_rows`."""

    format_name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    tools: list[Tool] | None = None
    query: str | None = None
    ignore: Collection[str] = ()
    is_training: bool = False


def read_rows(
    folder: Path,
    names: list[str],
    format_name: str,
    columns: Mapping[str, str] = MappingProxyType({}),
    group: str | None = None,
    tools: list[Tool] | None = None,
    query: str | None = None,
    *,
    ignore: Collection[str] = (),
    is_training: bool = False,
) -> Iterator[Row]:
    """Read files row by row. A malformed row is yielded with its problem.

    Args:
        names: the files to read, relative to the folder.
        columns: {loraflow's column: the files' column}, for columns with other names.
        is_training: the files are for training, so rows that their column `split` keeps for tests are left out.

    Raises:
        BadData: a file cannot be read, or its kind is unknown.
    """
    settings = RowSettings(format_name, columns, group, tools, query, ignore, is_training)
    for name in names:
        labels = labels_of(folder / name, name, settings)
        for value in read_values(folder / name, name, query):
            yield read_row(value, settings, labels)


def labels_of(path: Path, name: str, settings: RowSettings) -> Labels:
    """Return what knows the labels of a file."""
    return Labels(
        partial(_rows_of, path, name, settings.query, settings.columns, settings.ignore),
        is_training=settings.is_training,
    )


def read_row(raw: RawValue, settings: RowSettings, labels: Labels) -> Row:
    """Convert a row to a chat. A malformed row has its problem instead."""
    place, value, text = raw
    if isinstance(value, BadRow):
        return Row(place, None, str(value), text)
    try:
        chat = read_chat(value, settings.format_name, settings.columns, labels, settings.tools, settings.ignore)
        group = settings.group
        unread = chat.unread if group is None else tuple(key for key in chat.unread if key != group)
        learned, weights = chat.learned, chat.weights
        told: Told = ()
        if unread and isinstance(value, dict):
            told = told_by(without_ignored(value, settings.ignore) if settings.ignore else value, unread, labels)
        named = _group(value, group)
        return Row(place, chat.messages, None, text, unread, learned, weights, group=named, told=told)
    except MarkedFalse as marked:
        return Row(place, None, str(marked), text, is_marked_false=True, marked_by=marked.by)
    except BadRow as problem:
        return Row(place, None, str(problem), text)


def _rows_of(
    path: Path, name: str, query: str | None, columns: Mapping[str, str], ignore: Collection[str]
) -> Iterator[JsonValue]:
    for row in read_values(path, name, query):
        if isinstance(row.value, dict):
            kept = without_ignored(row.value, ignore) if ignore else row.value
            yield {**kept, **{key: row.value[column] for key, column in columns.items() if column in row.value}}


def _group(row: JsonValue, field: str | None) -> str | None:
    """Return the value of the field that names a row's group, as text; None if it has none."""
    value = row.get(field) if field is not None and isinstance(row, dict) else None
    if isinstance(value, bool | list | dict):
        raise BadRow(f"{field}: expected a text or a number that names the row's group")
    if isinstance(value, float):
        if math.isnan(value):  # an empty cell of a Parquet column of numbers
            return None
        value = int(value) if value.is_integer() else value  # pandas writes 7 as 7.0 if another cell is empty
    return str(value).strip() or None if value is not None else None


def read_values(path: Path, name: str, query: str | None = None) -> Iterator[RawValue]:
    """Read a file's rows as they are, without converting them to chats.

    Args:
        query: for a database, a table or a SELECT statement; None takes its only table.

    Raises:
        BadData: the file cannot be read, or its kind is unknown.
    """
    suffix = checked_suffix(path, name)
    if suffix in SUFFIXES:
        yield from _read_database(path, name, query)
        return
    try:
        yield from _READERS[suffix](path, name)
    except UnicodeDecodeError:
        raise _first_line_not_utf8(path, name) from None


def checked_suffix(path: Path, name: str) -> str:
    """Return a file's suffix, in lower case.

    Raises:
        BadData: the file cannot be read, or its kind is unknown, or its first bytes are those of another kind.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(6)
    except PermissionError as error:
        raise BadData(
            "The file cannot be opened.", where=str(path), got=str(error.strerror), next_step="correct its permissions"
        ) from error
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise _unknown_kind(name)
    if suffix not in SUFFIXES and suffix != ".parquet":
        _refuse_binary(begin, name)
    return suffix


def _matches(pattern: str, names: list[str]) -> list[str]:
    """Return the names that a pattern of a recipe selects.

    An exact name selects only that file: not files of the same name in subfolders, and brackets are not a pattern there. A
    pattern such as `old/*.jsonl` selects files of a folder; `**`, and names of folders, mean what they do in a `.gitignore`.
    """
    if pattern in names:
        return [pattern]
    from pathspec import GitIgnoreSpec  # the library by which DVC reads .dvcignore

    try:
        if "**" not in pattern and not pattern.endswith("/"):
            found = [name for name in names if Path(name).match(pattern)]
            if found:
                return found
        return list(GitIgnoreSpec.from_lines([pattern]).match_files(names))
    except ValueError:  # no pattern, such as "!" or an empty text: it matches nothing
        return []


def match_files(folder: Path, patterns: list[str]) -> list[str]:
    """Return the names of the files that match, relative to the folder, sorted for each pattern.

    Raises:
        BadData: a pattern matches no file.
    """
    have = readable_files(folder)
    found: list[str] = []
    for pattern in patterns:
        hits = _matches(pattern, have)
        if (
            not hits
            and is_hidden(pattern)
            and (folder / pattern).is_file()
            and Path(pattern).suffix.lower() in _READERS
        ):
            hits = [pattern]
        if not hits and (folder / pattern).is_file():
            raise _unknown_kind(pattern)
        if not hits:
            kinds = ", ".join(sorted(_READERS))
            raise BadData(
                "No file of the dataset has this name.",
                where=pattern,
                expected="one of " + ", ".join(have[:10]) if have else f"a file of type {kinds}",
                got=", ".join(match_nothing(folder)[:10]),
                next_step="correct data.train, data.heldout or data.extra_heldout",
            )
        found += [name for name in hits if name not in found]
    return found


# first bytes → (kind, suffix)
_BINARY = {
    b"\x1f\x8b": ("compressed by gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", ".zst"),
    b"BZh": ("compressed by bzip2", ".bz2"),
    b"\xfd7zXZ": ("compressed by xz", ".xz"),
    b"PK\x03\x04": ("a zip or Excel file", ".zip"),
    b"PAR1": ("a Parquet file", ".parquet"),
}
_UNPACK = {".gz": "gunzip --keep", ".zst": "unzstd", ".bz2": "bunzip2 --keep", ".xz": "unxz --keep", ".zip": "unzip"}


def _refuse_binary(begin: bytes, name: str) -> None:
    """Refuse a file whose first bytes show that its suffix is wrong."""
    if begin[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        raise _not_utf8(name, name, "UTF-32", "UTF-32")
    if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise _not_utf8(name, name, "UTF-16", "UTF-16")
    if len(begin) > 3 and begin[1:2] == b"\0" != begin[:1] and begin[3:4] == b"\0":
        raise _not_utf8(name, name, "UTF-16 without a byte order mark", "UTF-16LE")
    for magic, (kind, suffix) in _BINARY.items():
        if begin.startswith(magic):
            renamed = f"{name}{suffix}"
            unpack = f" && {_UNPACK[suffix]} {shlex.quote(renamed)}" if suffix in _UNPACK else ""
            raise BadData(
                f"The file is {kind}, not text.",
                where=name,
                got=f"the first bytes {begin[: len(magic)].hex(' ')}",
                next_step=f"mv {shlex.quote(name)} {shlex.quote(renamed)}{unpack}",
            )


def readable_files(folder: Path) -> list[str]:
    """Return the names of a folder's files whose type is read, sorted.

    Hidden files are left out, as the old copies in `.ipynb_checkpoints` and macOS's `._train.jsonl`: a pattern would take
    them for data. A recipe can name one exactly.
    """
    names = (
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in _READERS and p.is_file()
    )
    return sorted(name for name in names if not is_hidden(name))


def match_nothing(folder: Path) -> list[str]:
    """Return the names of a folder's files whose type is not read, such as train.jsonl.gz. Hidden files are left out."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return [name for name in names if Path(name).suffix.lower() not in _READERS and not is_hidden(name)]


def _read_table(path: Path, name: str) -> Iterator[RawValue]:
    for number, (row, text) in enumerate(read_table(path, name), 1):
        if isinstance(row, str):
            yield RawValue(f"{name}:row {number}", BadRow(row), text[:2000])
        else:
            yield _with_parsed_turns({**row}, f"{name}:row {number}")


def _read_database(path: Path, name: str, query: str | None = None) -> Iterator[RawValue]:
    for number, row in enumerate(read_sqlite(path, name, query), 1):
        yield _with_parsed_turns(row, f"{name}:row {number}")


def _read_parquet(path: Path, name: str) -> Iterator[RawValue]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            refuse_duplicates(file.schema_arrow.names, name)
            number = 0
            for batch in file.iter_batches(1000):
                for record in _records(batch, name):
                    number += 1
                    yield _with_parsed_turns(record, f"{name}:row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadData(
            "The Parquet file cannot be read.",
            where=name,
            got=first_line(error),
            next_step="download it or write it again",
        ) from error


def _records(batch: pa.RecordBatch, name: str) -> list[RawRow]:
    cells: dict[str, list[JsonValue]] = {}
    for column in batch.schema.names:
        try:
            cells[column] = batch.column(column).to_pylist()
        except (ValueError, OverflowError, LookupError, TypeError) as error:
            raise BadData(
                "A column of the Parquet file has values that cannot be read.",
                where=f"{name}, column {column} ({batch.schema.field(column).type})",
                got=first_line(error),
                next_step="write the column as text, or leave it out",
            ) from error
    return [dict(zip(cells, values, strict=True)) for values in zip(*cells.values(), strict=True)]


def _with_parsed_turns(row: RawRow, place: str) -> RawValue:
    """Parse the cells that hold a chat as JSON text: CSV has no lists."""
    for key in ("messages", "conversations"):
        cell = row.get(key)
        if isinstance(cell, str) and cell.strip():
            try:
                row[key] = parsed_list(cell, f"column {key}")
            except BadRow as problem:
                return RawValue(place, problem, str(row)[:2000])
    return RawValue(place, row, row_text(row))


_READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    **dict.fromkeys(SUFFIXES, _read_database),
}
READABLE = tuple(sorted(_READERS))  # the types of files that are read, by their suffix


def _unknown_kind(name: str) -> BadData:
    suffix = Path(name).suffix.lower()
    next_step = "convert it to one of these types"
    if suffix in _UNPACK:
        next_step = f"{_UNPACK[suffix]} {shlex.quote(name)}"
    elif suffix in ("", ".txt"):
        next_step = "if it has one JSON object per line, give it the suffix .jsonl"
    return BadData(
        "This file type is not supported.",
        where=name,
        expected=", ".join(sorted(_READERS)),
        got=suffix or "no suffix",
        next_step=next_step,
    )


def _first_line_not_utf8(path: Path, name: str) -> BadData:
    """Return the failure for the first line that is not UTF-8. The usual reason is a Windows code page."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                got = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
                return _not_utf8(name, f"{name}:{number}", got, "WINDOWS-1252")
    return _not_utf8(name, name, "bytes that are not UTF-8", "WINDOWS-1252")


def _not_utf8(name: str, where: str, got: str, encoding: str) -> BadData:
    new = f"utf8-{Path(name).name}"
    return BadData(
        "The file is not UTF-8.",
        where=where,
        expected="UTF-8 (from Excel: save as CSV UTF-8)" if name.lower().endswith(".csv") else "UTF-8",
        got=got,
        next_step=f"iconv -f {encoding} -t UTF-8 {shlex.quote(name)} > {shlex.quote(new)}",
    )
