"""Read JSON and JSONL files row by row, with the line and column of each problem."""

import json
import shlex
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple

from pydantic import JsonValue

from loraflow.data.cell_values import strict_json
from loraflow.data.chats import BadRow
from loraflow.data.formats.chat_formats import has_known_keys, is_bare_chat
from loraflow.failures import BadData

MAX_ROW_BYTES = 50_000_000
_BLOCK = 1 << 16  # bytes that are read together


class RawValue(NamedTuple):
    """A row of a file before it is converted to a chat."""

    place: str  # file:line, or file:row
    value: JsonValue | BadRow  # BadRow: why the row has no value. Cells of Parquet may be of types that JSON lacks.
    text: str  # the row's text, cut to 2,000 characters if it is malformed or from a table


def read_json_lines(path: Path, name: str) -> Iterator[RawValue]:
    """Read one JSON value per line. Blank lines are skipped; a malformed line yields a `BadRow`.

    Raises:
        BadData: the rows are spread over several lines, or end with the line breaks of old Macs.
    """
    for first, lines in read_lines(path, name):
        if isinstance(lines, BadRow):
            yield RawValue(f"{name}:{first}", lines, "")
            continue
        for number, line in enumerate(lines, first):
            if not line.isspace():
                yield json_line(line, f"{name}:{number}")


def read_lines(path: Path, name: str) -> Iterator[tuple[int, list[bytes] | BadRow]]:
    """Yield the number of a line, and it with those that follow, also blank ones; or a `BadRow` if the line is too long.

    Raises as above.
    """
    _refuse_spread_rows(path, name)
    first = 1
    with path.open("rb") as file:
        while block := file.read(min(_BLOCK, MAX_ROW_BYTES)):
            if first == 1:
                block = block.removeprefix(b"\xef\xbb\xbf")
            if not block.endswith(b"\n"):
                block += file.readline(MAX_ROW_BYTES + 1 - (len(block) - block.rfind(b"\n") - 1))
            lines = BytesIO(block).readlines() or [b""]  # nothing but a byte order mark
            long = lines.pop() if len(lines[-1]) > MAX_ROW_BYTES and not block.endswith(b"\n") else b""
            del block  # the lines are a copy of it
            if lines:
                yield first, lines
            first += len(lines)
            if long:
                size = len(long) + _skip_line(file)
                yield first, BadRow(f"a row of {size:,} bytes; at most {MAX_ROW_BYTES:,}")
                first += 1


def _refuse_spread_rows(path: Path, name: str) -> None:
    """Refuse a file whose lines are no rows: each line would be a problem of its own that hides the real one."""
    with path.open("rb") as file:
        first, second = (file.readline(MAX_ROW_BYTES).removeprefix(b"\xef\xbb\xbf") for _ in range(2))
    if first.strip() in (b"[", b"{") and not _is_row(second):
        what = ".[]" if first.strip() == b"[" else "."
        got, convert = "a row that is spread over several lines", f"jq -c {shlex.quote(what)}"
    elif not second and b"}\r" in first.rstrip() and _is_row(first.split(b"\r")[0]):
        got, convert = "rows that end with a carriage return only", "tr '\\r' '\\n' <"
    else:
        return
    new = shlex.quote(f"{Path(name).stem}-rows.jsonl")
    raise BadData(
        "The file does not have one row per line.",
        where=name,
        expected="one JSON object per line",
        got=got,
        next_step=f"{convert} {shlex.quote(name)} > {new}",
    )


def _is_row(line: bytes) -> bool:
    return line.strip().startswith(b"{") and _is_json(line.decode("utf-8", "replace"))


def _skip_line(file: IO[bytes]) -> int:
    """Read the rest of a line, and return its length: a file without line breaks would fill the memory."""
    size = 0
    while part := file.readline(MAX_ROW_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def json_line(line: bytes, place: str) -> RawValue:
    """Return the row of a line; a malformed one is a `BadRow`."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not valid UTF-8 (0x{line[error.start]:02x})"
        return RawValue(place, BadRow(problem), repr(line[:200]))
    try:
        value = _row(strict_json(text))
    except json.JSONDecodeError as error:
        problem = f"column {error.pos + 1}: {error.msg}; expected one JSON object per line"
        if text.rstrip().endswith(",") and _is_json(text.rstrip().rstrip(",")):
            problem = "a comma after the row; expected one JSON object per line, without commas between them"
        elif text.startswith("\ufeff"):
            problem = "a byte order mark before the row, as if files were joined; remove it"
        return RawValue(place, BadRow(problem), text.rstrip("\n")[:2000])
    except ValueError as error:
        return RawValue(place, BadRow(str(error)), text[:2000])
    if isinstance(value, list):
        problem = "a list; expected one JSON object per line (if the whole file is one list, rename it to .json)"
        return RawValue(place, BadRow(problem), text.rstrip("\n")[:2000])
    return RawValue(place, value, text.rstrip("\n"))


def read_json(path: Path, name: str) -> Iterator[RawValue]:
    """Read a JSON list of rows, or JSON lines that were saved as .json.

    Raises:
        BadData: the file is neither.
        UnicodeDecodeError: the file is not UTF-8.
    """
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = strict_json(text)
    except ValueError as error:
        first, *others = text.strip().split("\n", 1)
        if others and _is_json(first):  # also lines one of which has a duplicated key: the other rows are read
            yield from read_json_lines(path, name)
            return
        where, got = name, str(error)
        if isinstance(error, json.JSONDecodeError):
            where, got = f"{name}:{error.lineno}:{error.colno}", error.msg
        raise BadData(
            "The file is not valid JSON.",
            where=where,
            got=got if text.strip() else "an empty file",
            expected="a list of rows",
            next_step="correct the file; one JSON object per line is read from a .jsonl file",
        ) from error
    if not isinstance(rows, list):
        raise _not_a_list(rows, name)
    for number, row in enumerate(rows, 1):
        yield RawValue(f"{name}:row {number}", _row(row), row_text(row))


def _row(value: JsonValue) -> JsonValue:
    """Return a row. One that is nothing but a list of messages, as nanochat's are, gets a key."""
    return {"messages": value} if is_bare_chat(value) else value


def row_text(row: JsonValue) -> str:
    """Return a row's text, cut to 2,000 characters. Values that JSON lacks are shown as Python shows them."""
    try:
        return json.dumps(row, ensure_ascii=False, default=str)[:2000]
    except (RecursionError, TypeError, ValueError):  # nested deeply; a key that is not text
        return f"({type(row).__name__})"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _not_a_list(value: JsonValue, name: str) -> BadData:
    """Return the failure for a file without a list; if a key holds the rows, its next step extracts them."""
    got, lists = type(value).__name__, list[str]()
    if isinstance(value, dict):
        got = f"an object with the keys {', '.join(list(value)[:8])}"
        lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    next_step = "name the chat files in data.train, or move this file out of their folder"
    if isinstance(value, dict) and has_known_keys(value):
        columns = list(value.values())
        if all(isinstance(column, dict | list) for column in columns) and not is_bare_chat(columns[0]):
            got += " that hold whole columns"
            next_step = 'write the rows instead: in pandas, to_json(FILE, orient="records", lines=True)'
        else:
            got, next_step = "a single row", "put the rows in a list, or one per line in a .jsonl file"
    elif lists:
        new = shlex.quote(f"{Path(name).stem}.jsonl")
        key = "rows" if "rows" in lists else lists[0]  # beside the features, in answers of the hub's API
        inner = ".row" if key == "rows" and isinstance(value, dict) and "row_idx" in str(value[key])[:30] else ""
        next_step = f"jq -c {shlex.quote(f'.[{json.dumps(key)}][]{inner}')} {shlex.quote(name)} > {new}"
    elif isinstance(value, dict) and len(value) > 1 and _are_rows(value):
        next_step = f"jq -c '.[]' {shlex.quote(name)} > {shlex.quote(f'{Path(name).stem}.jsonl')}"
    return BadData(
        "The file does not contain a list.", where=name, expected="a JSON list of rows", got=got, next_step=next_step
    )


def _are_rows(by_id: dict[str, JsonValue]) -> bool:
    """Tell whether the values of an object are rows, by their ids: all have the same keys, and no columns of a split."""
    rows = [row for row in by_id.values() if isinstance(row, dict)]
    items = [item for row in rows for item in row.values() if isinstance(item, dict | list)]
    if len(rows) < len(by_id) or len(set(map(frozenset, rows))) > 1 or not all(map(is_bare_chat, items)):
        return False
    return not by_id.keys() & {"train", "test", "validation", "valid", "val", "dev"}
