"""Read tables: those of SQLite, and CSV and TSV as common tools write them, such as Excel's semicolons and `sep=` line.

A row with too few or too many cells is malformed. It is never repaired: an unquoted comma shifts every cell after it.
So are rows whose cells are not what the file's author wrote: quotes that did not count as quotes, rows that an open quote
joined, and a second header, as `cat a.csv b.csv` leaves it.
"""

import csv
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO

from pydantic import JsonValue

from loraflow.data.cell_values import is_null
from loraflow.failures import BadData, first_line

SUFFIXES = (".db", ".sqlite", ".sqlite3")  # of databases
MAX_CELL = 50_000_000  # characters; Python's own limit is 131,072


def read_table(path: Path, name: str) -> Iterator[tuple[dict[str, str] | str, str]]:
    """Yield (row, text) for each row of a table. For a malformed row, `row` is a string that says what is wrong.

    Blank lines are skipped.

    Args:
        path: the file, in UTF-8.

    Raises:
        BadData: the table has no header, a duplicated column, or an unclosed quote.
        UnicodeDecodeError: the file is not UTF-8.
    """
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = _separator(file, "\t" if path.suffix.lower() == ".tsv" else ",")
        is_padded = _is_padded(file, separator)
        lines: list[str] = []  # of the row that is read
        reader = csv.reader(_noted(file, lines), delimiter=separator, strict=True, skipinitialspace=is_padded)
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
            text = "".join(lines)
            lines.clear()
            if not cells:
                continue
            if header is None:
                header = _header(cells, name)
            else:
                problem = _misread(header, cells, text, separator)
                yield problem or _row(header, cells, separator), separator.join(cells)
    if header is None:
        raise BadData(
            "The table is empty.",
            where=name,
            expected="a first line with the column names",
            got="no line",
            next_step="add rows, or remove the file",
        )


def _separator(file: IO[str], usual: str) -> str:
    """Find the cells' separator in the first line, and leave the file's position at the header.

    Excel writes semicolons in locales with a decimal comma. It also writes and reads a first line such as `sep=;`.
    """
    first = file.readline()
    if declared := re.fullmatch(r"sep=(.)\r?\n?", first):
        return declared[1]
    file.seek(0)
    return usual if usual in first else next((other for other in (";", "\t", ",") if other in first), usual)


def _noted(file: IO[str], lines: list[str]) -> Iterator[str]:
    for line in file:
        lines.append(line)
        yield line


def _is_padded(file: IO[str], separator: str) -> bool:
    """Tell whether the header has a blank after each separator, as every row has then; it is no part of the cells."""
    begin = file.tell()
    names = file.readline().rstrip("\r\n").split(separator)[1:]
    file.seek(begin)
    return separator != "\t" and bool(names) and all(name.startswith(" ") and name.strip() for name in names)


def _misread(header: list[str], cells: list[str], text: str, separator: str) -> str | None:
    """Return why the cells are not what the author of a row wrote; None if nothing speaks for that."""
    plain = [cell.strip().lstrip("\ufeff").strip('"') for cell in cells]
    if plain == header:
        return "the header is repeated; remove this line"
    for cell in cells:
        quoted = cell.lstrip(" ")
        if len(quoted) > 1 and cell != quoted and quoted[0] == quoted[-1] == '"' and f"{separator}{cell}" in text:
            return f"a space before a quote makes the quotes a part of the cell: {cell[:40]!r}; remove the space"
    values = [cell for cell in plain if cell]
    if len(values) > 1 and all(len(cell) > 1 and cell[0] == cell[-1] == "'" for cell in values):
        return "every cell is in single quotes, which are a part of it; use double quotes"
    rows = text.splitlines()
    if (
        separator == "\t"
        and len(rows) > 1 < len(header)
        and all(row.count(separator) == len(header) - 1 for row in rows)
    ):
        return (
            f"a quote that is not closed in its line joins {len(rows)} rows; write it as two quotes, in a quoted cell"
        )
    return None


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
    refuse_duplicates(names, name)
    return names


def refuse_duplicates(columns: list[str], name: str) -> None:
    """Refuse a table with two columns of one name.

    Raises:
        BadData: it has.
    """
    if got := ", ".join(column for column, count in Counter(columns).items() if count > 1):
        raise BadData("A column is duplicated.", where=name, got=got, next_step="rename or remove one of them")


def _row(header: list[str], cells: list[str], separator: str) -> dict[str, str] | str:
    if len(cells) < len(header) or any(cells[len(header) :]):
        hint = "" if len(cells) < len(header) else f"; put a cell that contains {separator!r} in quotes"
        return f"{len(cells)} cells, but the header has {len(header)} columns{hint}"
    # Windows and old Macs write carriage returns.
    cells = ["" if is_null(cell) else cell.replace("\r\n", "\n").replace("\r", "\n") for cell in cells]
    return dict(zip(header, cells, strict=False))  # surplus cells are empty: separators at the line's end


def read_sqlite(path: Path, name: str, query: str | None = None) -> Iterator[dict[str, JsonValue]]:
    """Yield the rows of a table or of a query. The database is opened so that nothing can be written.

    Args:
        query: a table or a SELECT statement; None for the only table.

    Raises:
        BadData: the file is no database, the table is not named or does not exist, or the query fails.
    """
    refuse_unsaved(path)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            cursor = database.execute(_statement(database, name, query))
            if cursor.description is None:
                raise _failure(name, "a statement that returns no rows", f"a SELECT statement; query is {query!r}")
            columns = [column[0] for column in cursor.description]
            if duplicated := [column for column, count in Counter(columns).items() if count > 1]:
                raise _failure(
                    name, f"two columns {duplicated[0]}", "columns with different names: use AS in the query"
                )
            for cells in cursor:
                yield dict(zip(columns, cells, strict=True))
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise _failure(name, first_line(error), "a SQLite database, and a table or query of it") from error


def refuse_unsaved(path: Path) -> None:
    """Refuse a SQLite database whose last changes are in another file: they would not be read.

    Raises:
        BadData: there are such changes.
    """
    log = path.with_name(f"{path.name}-wal")
    if log.is_file() and log.stat().st_size:
        raise BadData(
            "the database has changes that are not in its file yet.",
            where=str(log),
            expected="no log of changes beside the database",
            next_step=f"close the programs that write to it, or run `sqlite3 {path.name} 'PRAGMA wal_checkpoint(TRUNCATE)'`",
        )


def plain_query(query: str | None) -> str | None:
    """Return a query by which equal ones are recognised: without differences of white space and a final semicolon."""
    return None if query is None else " ".join(query.split()).rstrip("; ")


def _statement(database: sqlite3.Connection, name: str, query: str | None) -> str:
    tables = [
        row[0]
        for row in database.execute(
            "SELECT name FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
    ]
    if query is not None and query not in tables:
        if query.lstrip().lower().startswith(("select", "with")):
            return query
        raise _failure(
            name, f"no table {query!r}", f"one of its tables, {', '.join(tables[:10])}, or a SELECT statement"
        )
    if query is None and len(tables) != 1:
        got = f"the tables {', '.join(tables[:10]) or '(none)'}"
        next_step = f"name it in the recipe: data.sources: [{{source: {name.rpartition('/')[2]}, query: TABLE}}]"
        raise _failure(name, got, "one table; name it in query", next_step)
    table = (query or tables[0]).replace('"', '""')
    return f'SELECT * FROM "{table}"'


def _failure(name: str, got: str, expected: str, next_step: str = "correct query") -> BadData:
    return BadData("The database cannot be read.", where=name, expected=expected, got=got, next_step=next_step)
