"""The columns of `loraflow init`: named by --columns, guessed, or named on a terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loraflow.config.recipe import COLUMNS
from loraflow.data.guess_columns import columns_of
from loraflow.failures import BadConfig

EXPECTED = "prompt=COLUMN,completion=COLUMN"


def choose_columns(path: Path, name: str, given: str | None) -> dict[str, str]:
    """Return `data.columns` for a file.

    Args:
        path: the first file of the dataset.
        name: its name in messages.
        given: the value of --columns.

    Raises:
        BadConfig: --columns is malformed, or names a column that the file does not have.
        BadData: the file cannot be read.
    """
    names = _names(path, name)
    if given is not None:
        return _parsed(given, names)
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
            "--columns is malformed.", where="--columns", expected=f"{EXPECTED}; keys: {', '.join(COLUMNS)}", got=text
        )
    if missing := [column for column in columns.values() if column not in names]:
        raise BadConfig(
            "The file has no such column.",
            where="--columns",
            expected=f"of {', '.join(names[:20])}",
            got=", ".join(missing),
        )
    return columns


def first_row(path: Path, name: str) -> dict[str, object]:
    """Return a file's first row; empty if it is no object."""
    from loraflow.data.readers import read_values

    value = next((row.value for row in read_values(path, name)), None)
    return {str(key): cell for key, cell in value.items()} if isinstance(value, dict) else {}


def _names(path: Path, name: str) -> list[str]:
    return list(first_row(path, name))


def _is_unknown(path: Path, name: str) -> bool:
    """Tell whether the first row is no chat by its own columns."""
    from loraflow.data.readers import read_rows

    return next(iter(read_rows(path.parent, [path.name], "auto"))).messages is None
