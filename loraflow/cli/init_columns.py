"""The columns of `loraflow init`: named by --columns, guessed, or named on a terminal."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import click

from loraflow.config.data_sources import COLUMNS
from loraflow.data.guess_columns import columns_of
from loraflow.failures import BadConfig, BadData

EXPECTED = "prompt=COLUMN,completion=COLUMN"
FIRST_ROWS = 1000  # rows whose keys are columns


def choose_columns(path: Path, name: str, given: str | None) -> dict[str, str]:
    """Return `data.columns` for a file.

    Args:
        path: the first file of the dataset.
        name: its name in messages.
        given: the value of --columns.

    Raises:
        BadConfig: --columns is malformed, or names a column that the file does not have.
        BadData: the file cannot be read, or --columns is given and the first row cannot.
    """
    if given is not None:
        return _parsed(given, _names(path, name, is_needed=True))
    names = _names(path, name, is_needed=False)
    columns = columns_of(path, name)
    if columns or not names or not _is_unknown(path, name) or not sys.stdin.isatty():
        return columns
    click.echo(f"The columns are {', '.join(names)}.")
    return _parsed(click.prompt("Which are the question and the answer? (QUESTION,ANSWER)", type=str), names)


def _parsed(text: str, names: list[str]) -> dict[str, str]:
    """Read prompt=text,completion=category, or text,category."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 2 and not any("=" in part for part in parts):
        parts = [f"prompt={parts[0]}", f"completion={parts[1]}"]
    pairs = [part.split("=", 1) for part in parts]
    columns = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    if len(columns) != len(parts) or not columns.keys() <= set(COLUMNS):
        raise BadConfig(
            "--columns is malformed.",
            where="--columns",
            expected=f"{EXPECTED}; keys: {', '.join(COLUMNS)}",
            got=text,
            next_step="write --columns prompt=COLUMN,completion=COLUMN",
        )
    if missing := [column for column in columns.values() if column not in names]:
        raise BadConfig(
            "The file has no such column.",
            where="--columns",
            expected=f"of {', '.join(names[:20])}",
            got=", ".join(missing),
            next_step="name columns of the file",
        )
    return columns


def _names(path: Path, name: str, *, is_needed: bool) -> list[str]:
    """Return the keys of the first rows: JSON rows may leave out keys without a value.

    Raises:
        BadData: names are needed, and the first row has none.
    """
    from loraflow.data.chats import BadRow
    from loraflow.data.readers import read_values

    names: dict[str, None] = {}
    for number, row in enumerate(itertools.islice(read_values(path, name), FIRST_ROWS)):
        if isinstance(row.value, dict):
            names.update(dict.fromkeys(map(str, row.value)))
        elif is_needed and number == 0:
            got = str(row.value) if isinstance(row.value, BadRow) else "no object"
            raise BadData(
                "The first row cannot be read.",
                where=row.place,
                expected="a row with columns",
                got=got,
                next_step="correct the row, or omit --columns",
            )
    return list(names)


def _is_unknown(path: Path, name: str) -> bool:
    """Tell whether the first row is no chat by its own columns."""
    from loraflow.data.readers import read_rows

    return next(iter(read_rows(path.parent, [path.name], "auto"))).messages is None
