"""Read CSV and TSV as common tools write them: Excel's semicolons and `sep=` line, multi-line cells, ragged rows.

A row with too few or too many cells is malformed. It is never repaired: an unquoted comma shifts every cell after it.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from loraflow.failures import BadData

MAX_CELL = 50_000_000  # characters; Python's own limit is 131,072


def read_table(path: Path, name: str) -> Iterator[tuple[dict[str, str] | str, str]]:
    """Yield (row, text) for each row of a table. For a malformed row, `row` is a string that says what is wrong.

    Blank lines are skipped.

    Args:
        path: the file, in UTF-8.
        name: the file's name in messages.

    Raises:
        BadData: the table has no header, a duplicated column, or an unclosed quote.
        UnicodeDecodeError: the file is not UTF-8.
    """
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = _separator(file, "\t" if path.suffix.lower() == ".tsv" else ",")
        reader = csv.reader(file, delimiter=separator, strict=True)
        header: list[str] | None = None
        begin = 1
        while True:
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                raise BadData(
                    "The table cannot be read.",
                    where=f"{name}, the row that begins at line {begin}",
                    got=str(error),
                    expected='a quote before and after a cell, and "" for a quote inside it',
                    next_step="correct that row",
                ) from error
            begin = reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = _header(cells, name)
            else:
                yield _row(header, cells, separator), separator.join(cells)
    if header is None:
        raise BadData("The table is empty.", where=name, expected="a first line with the column names", got="no line")


def _separator(file: IO[str], usual: str) -> str:
    """Find the cells' separator in the first line, and leave the file's position at the header.

    Excel writes semicolons in locales with a decimal comma. It also writes and reads a first line such as `sep=;`.
    """
    first = file.readline()
    if declared := re.fullmatch(r"sep=(.)\r?\n?", first):
        return declared[1]
    file.seek(0)
    return usual if usual in first else next((other for other in (";", "\t", ",") if other in first), usual)


def _header(cells: list[str], name: str) -> list[str]:
    names = [cell.strip() or f"Unnamed: {number}" for number, cell in enumerate(cells)]
    if len(names) == 1 and (other := next((sign for sign in "|^~\x1f" if sign in names[0]), None)):
        raise BadData(
            "The table has a single column, whose name contains another separator.",
            where=f"{name}:1",
            expected="cells separated by commas, semicolons or tabs",
            got=repr(names[0][:100]),
            next_step=f"put the line sep={other} before the header",
        )
    if duplicated := [column for column, count in Counter(names).items() if count > 1]:
        raise BadData(
            "A column is duplicated.", where=name, got=", ".join(duplicated), next_step="rename or remove one of them"
        )
    return names


def _row(header: list[str], cells: list[str], separator: str) -> dict[str, str] | str:
    if len(cells) < len(header) or any(cells[len(header) :]):
        hint = "" if len(cells) < len(header) else f"; put a cell that contains {separator!r} in quotes"
        return f"{len(cells)} cells, but the header has {len(header)} columns{hint}"
    return dict(zip(header, cells, strict=False))  # surplus cells are empty: separators at the line's end
