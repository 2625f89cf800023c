"""Read the rows of a SQLite database."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from pydantic import JsonValue

from loraflow.failures import BadData, first_line

SUFFIXES = (".db", ".sqlite", ".sqlite3")


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
