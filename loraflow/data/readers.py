"""Read people's files as chats: JSONL, JSON, CSV, TSV and Parquet."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pydantic import JsonValue

from loraflow.data.chat_formats import BadRow, RawRow, to_messages, unused_keys
from loraflow.data.chats import Message
from loraflow.data.csv_reader import read_table
from loraflow.data.json_reader import RawValue, read_json, read_json_lines, strict_json
from loraflow.failures import BadData


@dataclass(frozen=True)
class Row:
    """A row as read: its chat, or the reason why it has none."""

    place: str  # file:line, or file:row
    messages: list[Message] | None
    problem: str | None = None
    raw: str = ""  # the row's text
    unused_keys: tuple[str, ...] = ()  # keys that have a value and that no format reads
    group: str | None = None  # the value of the field that names the row's group


def read_rows(
    folder: Path,
    names: list[str],
    format_name: str,
    columns: Mapping[str, str] = MappingProxyType({}),
    group: str | None = None,
) -> Iterator[Row]:
    """Read files row by row. A malformed row is yielded with its problem.

    Args:
        folder: the dataset's folder.
        names: the files to read, relative to the folder.
        format_name: the rows' format: messages, sharegpt, alpaca, prompt_completion or auto.
        columns: {loraflow's column: the files' column}, for columns with other names.
        group: the field that names a row's group.

    Raises:
        BadData: a file cannot be read, or its kind is unknown.
    """
    for name in names:
        for place, value, text in read_values(folder / name, name):
            if isinstance(value, BadRow):
                yield Row(place, None, str(value), text)
                continue
            try:
                messages = to_messages(_renamed(value, columns), format_name)
                unused = unused_keys(value, format_name, columns)
                yield Row(place, messages, None, text, unused, _group(value, group))
            except BadRow as problem:
                yield Row(place, None, str(problem), text)


def _group(row: JsonValue, field: str | None) -> str | None:
    """Return the value of the field that names a row's group, as text; None if it has none."""
    value = row.get(field) if field is not None and isinstance(row, dict) else None
    if isinstance(value, bool | list | dict):
        raise BadRow(f"{field}: expected a text or a number that names the row's group")
    return str(value).strip() or None if value is not None else None


def _renamed(row: JsonValue, columns: Mapping[str, str]) -> JsonValue:
    if not columns or not isinstance(row, dict):
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadRow(f"expected the column {theirs} ({ours}); got {', '.join(map(str, list(row)[:8]))}")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def read_values(path: Path, name: str) -> Iterator[RawValue]:
    """Read a file's rows as they are, without converting them to chats.

    Args:
        path: the file.
        name: the file's name in messages.

    Raises:
        BadData: the file cannot be read, or its kind is unknown.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(2)
    except PermissionError as error:
        raise BadData(
            "The file cannot be opened.", where=str(path), got=str(error.strerror), next_step="correct its permissions"
        ) from error
    suffix = path.suffix.lower()
    if begin in (b"\xff\xfe", b"\xfe\xff") and suffix != ".parquet":
        raise _not_utf8(name, name, "UTF-16", "UTF-16")
    reader = _READERS.get(suffix)
    if reader is None:
        raise _unknown_kind(name)
    try:
        yield from reader(path, name)
    except UnicodeDecodeError:
        raise _first_line_not_utf8(path, name) from None


def match_files(folder: Path, patterns: list[str]) -> list[str]:
    """Return the names of the files that match, relative to the folder, sorted for each pattern.

    Raises:
        BadData: a pattern matches no file.
    """
    have = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _READERS
    )
    found: list[str] = []
    for pattern in patterns:
        # An exact name selects only that file: not files of the same name in subfolders, and brackets are not a pattern.
        hits = [pattern] if pattern in have else [name for name in have if Path(name).match(pattern)]
        if not hits and (folder / pattern).is_file():
            raise _unknown_kind(pattern)
        if not hits:
            kinds = ", ".join(sorted(_READERS))
            raise BadData(
                "No file of the dataset has this name.",
                where=pattern,
                expected="one of " + ", ".join(have[:10]) if have else f"a file of type {kinds}",
                next_step="correct data.train, data.heldout or data.extra_heldout",
            )
        found += [name for name in hits if name not in found]
    return found


def _read_table(path: Path, name: str) -> Iterator[RawValue]:
    for number, (row, text) in enumerate(read_table(path, name), 1):
        if isinstance(row, str):
            yield RawValue(f"{name}:row {number}", BadRow(row), text[:2000])
        else:
            yield _with_parsed_turns({**row}, f"{name}:row {number}")


def _read_parquet(path: Path, name: str) -> Iterator[RawValue]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1000))
            for number, record in enumerate(records, 1):
                yield _with_parsed_turns(record, f"{name}:row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadData(
            "The Parquet file cannot be read.",
            where=name,
            got=f"{type(error).__name__}: {error}"[:300],
            next_step="download it or write it again",
        ) from error


def _with_parsed_turns(row: RawRow, place: str) -> RawValue:
    """Parse the cells that hold a chat as JSON text: CSV has no lists."""
    for key in ("messages", "conversations"):
        cell = row.get(key)
        if isinstance(cell, str):
            try:
                row[key] = strict_json(cell)
            except ValueError as error:
                return RawValue(place, BadRow(f"column {key} is not valid JSON: {error}"), str(row)[:2000])
    return RawValue(place, row, json.dumps(row, ensure_ascii=False, default=str)[:2000])


_READERS = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}


def _unknown_kind(name: str) -> BadData:
    suffix = Path(name).suffix.lower()
    packed = {".gz": "gunzip --keep", ".zst": "unzstd", ".bz2": "bunzip2 --keep", ".xz": "unxz --keep", ".zip": "unzip"}
    next_step = "convert it to one of these types"
    if suffix in packed:
        next_step = f"{packed[suffix]} {shlex.quote(name)}"
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
