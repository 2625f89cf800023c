"""From people's files to chats: JSONL, JSON, CSV, TSV and Parquet.

A row comes out as `{"messages": [{"role", "content"}, …]}` or as the reason why it does not, with its place.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loraflow.data.chat_formats import BadRow, guess_columns, has_form, to_messages, unread
from loraflow.data.csv_reader import read_table
from loraflow.failures import BadData

MAX_ROW_BYTES = 50_000_000
_SUFFIXES = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"}


@dataclass(frozen=True)
class Row:
    """A row as read: its place in the files, and its chat or the reason why there is none."""

    place: str  # file:line, or file:row
    messages: list[dict[str, str]] | None
    problem: str | None = None
    raw: str = ""
    unread: tuple[str, ...] = ()  # keys that hold something, and that no form reads


def read_rows(
    folder: Path, names: list[str], form: str, columns: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Row]:
    """Read files below a folder, row by row; malformed rows come out with their problem.

    Args:
        folder: of the dataset.
        names: of its files.
        form: how a row says who said what, or auto.
        columns: {name here: name in the files}, for columns of other names.

    Raises:
        BadData: a file that cannot be read at all, or of an unknown kind.
    """
    for name in names:
        for place, value, raw in read_values(folder / name, name):
            if isinstance(value, BadRow):
                yield Row(place, None, str(value), raw)
                continue
            try:
                messages = to_messages(_renamed(value, columns), form)
                yield Row(place, messages, None, raw, unread(value, form, columns))
            except BadRow as problem:
                yield Row(place, None, str(problem), raw)


def _renamed(row: Any, columns: Mapping[str, str]) -> Any:
    if not columns or not isinstance(row, dict):
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise BadRow(f"expected the column {theirs} ({ours}); got {', '.join(map(str, list(row)[:8]))}")
    return {**row, **{ours: row[theirs] for ours, theirs in columns.items()}}


def read_values(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    """Read a file's rows as they are, whatever they hold: (place, value or the reason why there is none, raw text).

    Raises:
        BadData: the file cannot be read at all, or is of an unknown kind.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(2)
    except PermissionError as error:
        raise BadData(
            "The file cannot be opened.", where=str(path), got=str(error.strerror), next_step="mend its permissions"
        ) from error
    if begin in (b"\xff\xfe", b"\xfe\xff") and path.suffix.lower() != ".parquet":
        raise _no_utf8(name, "UTF-16", "UTF-16")
    reader = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }.get(path.suffix.lower())
    if reader is None:
        raise _unknown_kind(name)
    try:
        yield from reader(path, name)
    except UnicodeDecodeError:
        raise _where_no_utf8(path, name) from None


def _unknown_kind(name: str) -> BadData:
    suffix = Path(name).suffix.lower()
    packed = {".gz": "gunzip --keep", ".zst": "unzstd", ".bz2": "bunzip2 --keep", ".xz": "unxz --keep", ".zip": "unzip"}
    next_step = "save it as one of these"
    if suffix in packed:
        next_step = f"{packed[suffix]} {shlex.quote(name)}"
    elif suffix in ("", ".txt"):
        next_step = "if it holds one JSON object a line, give it the suffix .jsonl"
    return BadData(
        "This kind of file is not read.",
        where=name,
        expected=", ".join(sorted(_SUFFIXES)),
        got=suffix or "no suffix",
        next_step=next_step,
    )


def _no_utf8(place: str, got: str, encoding: str) -> BadData:
    name = place.split(":", 1)[0] if encoding != "UTF-16" else place
    new = f"utf8-{Path(name).name}"
    return BadData(
        "The file is not UTF-8.",
        where=place,
        expected="UTF-8 (from Excel: save as CSV UTF-8)" if name.lower().endswith(".csv") else "UTF-8",
        got=got,
        next_step=f"iconv -f {encoding} -t UTF-8 {shlex.quote(name)} > {shlex.quote(new)}",
    )


def _where_no_utf8(path: Path, name: str) -> BadData:
    """Say in which line of a file the first byte stands that is no UTF-8; Windows' code page is the usual reason."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                got = f"byte {error.start + 1} of the line is 0x{line[error.start]:02x}"
                return _no_utf8(f"{name}:{number}", got, "WINDOWS-1252")
    return _no_utf8(name, "bytes that are none", "WINDOWS-1252")


def match_files(folder: Path, patterns: list[str]) -> list[str]:
    """Return the names below a folder that match, sorted; each pattern must match something.

    Raises:
        BadData: a pattern matches nothing.
    """
    have = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in _SUFFIXES
    )
    found: list[str] = []
    for pattern in patterns:
        # A file's own name is that file: not another one of this name further down, nor what its brackets would match.
        hits = [pattern] if pattern in have else [name for name in have if Path(name).match(pattern)]
        if not hits and (folder / pattern).is_file():
            raise _unknown_kind(pattern)
        if not hits:
            raise BadData(
                "No file of the dataset has this name.",
                where=pattern,
                expected="one of " + ", ".join(have[:10]) if have else f"a file of kind {', '.join(sorted(_SUFFIXES))}",
                next_step="mend data.train, data.heldout or data.extra_heldout",
            )
        found += [name for name in hits if name not in found]
    return found


# one function per kind of file; each yields (place, value or BadRow, raw text)


def _jsonl(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{name}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            if len(line) > MAX_ROW_BYTES:
                yield place, BadRow(f"a row of {len(line):,} bytes; at most {MAX_ROW_BYTES:,}"), ""
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield place, BadRow(f"byte {error.start + 1} is no UTF-8 (0x{line[error.start]:02x})"), repr(line[:200])
                continue
            try:
                value = _strict_json(text)
                if isinstance(value, list):
                    value = BadRow("a list; expected one JSON object a line (a file that is one list is called .json)")
                yield place, value, text.rstrip("\n")
            except json.JSONDecodeError as error:
                problem = f"column {error.pos + 1}: {error.msg}; expected one JSON object a line"
                yield place, BadRow(problem), text.rstrip("\n")[:2000]
            except RecursionError:
                yield place, BadRow("nested too deeply"), text[:200]
            except ValueError as error:
                yield place, BadRow(str(error)), text[:2000]


def _json(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = _strict_json(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1 and _is_json(text.split("\n", 1)[0]):
            yield from _jsonl(path, name)  # one object a line, which many tools call .json
            return
        raise BadData(
            "The file is no JSON.",
            where=f"{name}:{error.lineno}:{error.colno}",
            got=error.msg if text.strip() else "an empty file",
            expected="a list of rows",
        ) from error
    except UnicodeDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise BadData("The file is no JSON.", where=name, got=str(error), expected="a list of rows") from error
    if not isinstance(rows, list):
        raise _no_list(rows, name)
    for number, row in enumerate(rows, 1):
        yield f"{name}:row {number}", row, json.dumps(row, ensure_ascii=False)[:2000]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _no_list(value: Any, name: str) -> BadData:
    """Say which of an object's keys holds the rows, if one does; else the file may be a description beside the data."""
    lists = (
        [k for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict)]
        if isinstance(value, dict)
        else []
    )
    new = shlex.quote(f"{Path(name).stem}.jsonl")
    return BadData(
        "The file holds no list.",
        where=name,
        expected="a JSON list of rows",
        got=f"an object with the keys {', '.join(list(value)[:8])}"
        if isinstance(value, dict)
        else type(value).__name__,
        next_step=f"jq -c {shlex.quote(f'.[{json.dumps(lists[0])}][]')} {shlex.quote(name)} > {new}"
        if lists
        else "name the files of chats, or take this one out of their folder",
    )


def _csv(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    for number, (row, text) in enumerate(read_table(path, name), 1):
        if isinstance(row, str):
            yield f"{name}:row {number}", BadRow(row), text[:2000]
        else:
            yield _unpacked(row, f"{name}:row {number}")


def _parquet(path: Path, name: str) -> Iterator[tuple[str, Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            records = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1000))
            for number, record in enumerate(records, 1):
                yield _unpacked(record, f"{name}:row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadData(
            "The Parquet file cannot be read.",
            where=name,
            got=f"{type(error).__name__}: {error}"[:300],
            next_step="fetch or write it again",
        ) from error


def _unpacked(row: dict[str, Any], place: str) -> tuple[str, Any, str]:
    """Return a table's row; a cell of turns may be JSON, since CSV has nothing for lists."""
    for key in ("messages", "conversations"):
        if isinstance(row.get(key), str):
            try:
                row[key] = _strict_json(row[key])
            except ValueError as error:
                return place, BadRow(f"column {key} is no JSON: {error}"), str(row)[:2000]
    return place, row, json.dumps(row, ensure_ascii=False, default=str)[:2000]


def _strict_json(text: str) -> Any:
    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    value = json.loads(text, parse_constant=refuse)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a lone surrogate (half of a character)") from None
    return value


def columns_of(path: Path, name: str) -> dict[str, str]:
    """Guess what `data.columns` should say from a file's first row, where that is no chat by itself.

    Raises:
        BadData: the file cannot be read.
    """
    for _, value, _ in read_values(path, name):
        try:
            to_messages(value)
        except BadRow:
            return guess_columns(value) if not isinstance(value, dict) or not has_form(value) else {}
        return {}
    return {}
