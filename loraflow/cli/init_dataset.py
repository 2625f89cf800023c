"""The dataset that `loraflow init` makes a project from: its files, rows, columns and split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from loraflow.cli.data import unread_keys
from loraflow.cli.init_recipe import split_by_name, tokens_of
from loraflow.cli.init_settings import SizeSettings, choose_heldout_fraction, choose_settings
from loraflow.data.near_split import near_policy
from loraflow.failures import BadData

if TYPE_CHECKING:
    from loraflow.data.chats import Message
    from loraflow.data.readers import Row

FEW = 20  # rows up to which init warns before anything else


@dataclass(frozen=True)
class UserDataset:
    """A user's file or folder of chats, and the settings that fit it."""

    source: Path  # the value of --data
    folder: Path
    files: list[str]  # relative to the folder
    train_files: list[str]  # by the usual names of splits, as the next two
    heldout_files: list[str]
    unused_files: list[str]
    columns: dict[str, str]  # data.columns
    rows: list[Row]
    chats: list[list[Message]]  # messages of the well-formed rows
    size: SizeSettings
    near_duplicates: Literal["report", "drop"]


def read_dataset(source: Path, columns: str | None, base: str) -> UserDataset:
    """Read a file or folder of chats, and choose the settings for it. Print what is striking about the rows.

    Args:
        source: the file or folder.
        columns: the value of --columns.
        base: the base model.

    Raises:
        BadConfig: `columns` is malformed.
        BadData: the files cannot be read, or no row is a valid chat.
    """
    from loraflow.cli.init_columns import choose_columns
    from loraflow.data.guess_columns import is_classification
    from loraflow.data.readers import match_files, read_rows

    folder, patterns = (source, ["*"]) if source.is_dir() else (source.parent, [source.name])
    files = match_files(folder, patterns)
    named = choose_columns(folder / files[0], files[0], columns)
    rows = list(read_rows(folder, files, "auto", named, is_training=True))
    if len(rows) <= FEW:
        click.echo(f"only {len(rows)} rows: too few to train or to compare models; a hundred are a beginning")
    chats = _chats(rows, source)
    if is_classification(named):
        classes = len({chat[-1]["content"] for chat in chats})
        click.echo(f"a classification set: {named['prompt']} → {named['completion']}, {classes} classes")
    train, heldout, unused = split_by_name(files)
    return UserDataset(
        source=source,
        folder=folder,
        files=files,
        train_files=train,
        heldout_files=heldout,
        unused_files=unused,
        columns=named,
        rows=rows,
        chats=chats,
        size=_size_settings(chats, base, has_heldout=bool(heldout)),
        near_duplicates=near_policy(chats),
    )


def _chats(rows: list[Row], data_file: Path) -> list[list[Message]]:
    """Return the well-formed rows; print the first malformed ones and the keys that are not read.

    Raises:
        BadData: no row is a valid chat.
    """
    chats = [row.messages for row in rows if row.messages is not None]
    malformed = [row for row in rows if row.messages is None and not row.is_marked_false]
    for row in malformed[:5]:
        click.echo(f"malformed  {row.place}: {row.problem}", err=True)
    if unread := unread_keys(rows):
        click.echo(unread, err=True)
    if not chats:
        raise BadData(
            "No row of this file is a valid chat.",
            where=str(data_file),
            got=malformed[0].problem or "" if malformed else "no rows",
            expected="messages, ShareGPT, Alpaca or prompt/completion",
            next_step="name the columns of question and answer: loraflow init --columns prompt=COLUMN,completion=COLUMN",
        )
    return chats


def _size_settings(chats: list[list[Message]], base: str, *, has_heldout: bool) -> SizeSettings:
    lengths = [tokens_of(chat) for chat in chats]
    max_length = min(2048, max(256, 1 << (max(lengths) - 1).bit_length()))
    share = 0.0 if has_heldout else choose_heldout_fraction(len(chats))
    # The template's own tokens are a part of the guess for the longest chat; on average there are fewer.
    tokens = sum(lengths) - 20 * len(lengths)
    return choose_settings(len(chats), share, tokens, max_length, may_pack=not base.startswith("bundled:"))
