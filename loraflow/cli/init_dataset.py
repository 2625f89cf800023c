"""The dataset that `loraflow init` makes a project from: its files, rows, columns and split."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from loraflow.cli.data import unread_keys
from loraflow.config.data_sources import COLUMNS
from loraflow.data.checks.near_split import near_policy
from loraflow.data.files.guess_columns import columns_of
from loraflow.data.templates.rendered_calls import call_text, tools_text
from loraflow.failures import BadConfig, BadData

if TYPE_CHECKING:
    from loraflow.data.chats import Message
    from loraflow.data.files.readers import Row


_SPLIT = re.compile(
    r"(?<![a-z])(?:(?P<train>train(?:ing)?)|(?P<test>tests?|testing|h[eo]ld[-_]?out)"
    r"|(?P<validation>valid(?:ation)?|val|dev|eval(?:uation)?))(?:[-_]?set)?(?![a-z])"
)
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
    heldout_rows: int  # chats of heldout_files
    size: SizeSettings
    near_duplicates: Literal["report", "drop"]


def read_dataset(source: Path, columns: str | None, base: str) -> UserDataset:
    """Read a file or folder of chats, and choose the settings for it. Print what is unusual about the rows.

    Raises:
        BadConfig: `columns` is malformed.
        BadData: the files cannot be read, or no row is a valid chat.
    """
    from loraflow.data.files.guess_columns import is_classification
    from loraflow.data.files.readers import match_files, read_rows

    folder, patterns = (source, ["*"]) if source.is_dir() else (source.parent, [source.name])
    files = match_files(folder, patterns)
    named = choose_columns(folder / files[0], files[0], columns)
    rows = list(read_rows(folder, files, "auto", named, is_training=True))
    chats = _chats(rows, source)
    if is_classification(named):
        classes = len({chat[-1]["content"] for chat in chats})
        click.echo(f"a classification set: {named['prompt']} → {named['completion']}, {classes} classes")
    train, heldout, unused = split_by_name(files)
    of_file = Counter(row.place.rpartition(":")[0] for row in rows if row.messages)
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
        heldout_rows=sum(map(of_file.__getitem__, heldout)),
        size=_size_settings(chats, sum(map(of_file.__getitem__, train)), base, has_heldout=bool(heldout)),
        near_duplicates=near_policy(chats),
    )


def split_by_name(names: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Return the files to train on, to hold out, and to leave out, by the usual names of splits.

    Test files are held out. Validation files are held out if there are no test files, and left out otherwise. The whole
    name of a file or folder decides, or the first word of a file's (not evaluation, testing). Another word counts if a
    path with train in its place exists; numbers may differ.
    """
    paths = {name: re.sub(r"\d+", "0", name.lower()) for name in names}
    known = set(paths.values())
    splits: dict[str, list[str]] = {"train": [], "test": [], "validation": []}
    for name, path in paths.items():
        *folders, stem = Path(path).with_suffix("").parts
        found = next(filter(None, map(_SPLIT.fullmatch, (stem, *folders[::-1]))), None)
        if found is None and not stem.startswith(("evaluation", "testing")):
            found = _SPLIT.match(stem)
        for word in () if found else _SPLIT.finditer(path):
            begin, end = word.span(word.lastgroup or 0)
            if not known.isdisjoint(path[:begin] + train + path[end:] for train in ("train", "training")):
                found = word
        splits["train" if found is None else found.lastgroup or ""].append(name)
    train, test, validation = splits.values()
    if not train:
        return names, [], []
    return (train, test, validation) if test else (train, validation, [])


def tokens_of(chat: list[Message]) -> int:
    """Return the tokens of a chat: a safe guess, with 40 for the template."""
    return sum(estimated_tokens(message["content"] + call_text(message) + tools_text(message)) for message in chat) + 40


def estimated_tokens(text: str) -> int:
    """Return about the number of tokens that a small vocabulary has for a text.

    English words have one token for about three letters. Digits, punctuation and line breaks have one each, and other
    letters one for each byte of UTF-8 beyond the first: SmolLM2's tokenizer needs 0.8 tokens for a Russian letter, 1.8 for
    a Chinese one and 3 for an emoji.
    """
    letters = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    ascii_ = sum(character.isascii() for character in text)
    return letters // 3 + (ascii_ - letters) + len(text.encode("utf-8", "surrogatepass")) - len(text)


def _chats(rows: list[Row], data_file: Path) -> list[list[Message]]:
    """Return the well-formed rows; print the first malformed ones and the keys that are not read."""
    chats = [row.messages for row in rows if row.messages is not None]
    malformed = [row for row in rows if row.messages is None and not row.is_marked_false]
    if not chats:
        raise BadData(
            "No row of this file is a valid chat.",
            where=str(data_file),
            got=f"{malformed[0].place}: {malformed[0].problem}" if malformed else "no rows to learn",
            next_step="name the columns of question and answer: loraflow init --columns prompt=COLUMN,completion=COLUMN"
            if malformed
            else "add rows",
        )
    if len(rows) <= FEW:
        click.echo(f"only {len(rows)} rows: too few to train or to compare models; start with at least a hundred")
    for row in malformed[:5]:
        click.echo(f"malformed  {row.place}: {row.problem}", err=True)
    if unread := unread_keys(rows):
        click.echo(unread, err=True)
    return chats


def _size_settings(chats: list[list[Message]], rows: int, base: str, *, has_heldout: bool) -> SizeSettings:
    lengths = [tokens_of(chat) for chat in chats]
    max_length = min(2048, max(256, 1 << (max(lengths) - 1).bit_length()))
    share = 0.0 if has_heldout else choose_heldout_fraction(rows)
    # The template's own tokens are a part of the guess for the longest chat; on average there are fewer.
    tokens = (sum(lengths) // len(lengths) - 20) * rows
    return choose_settings(rows, share, tokens, max_length, may_pack=not base.startswith("bundled:"))


EXPECTED = "prompt=COLUMN,completion=COLUMN"
FIRST_ROWS = 1000  # rows whose keys are columns


def choose_columns(path: Path, name: str, given: str | None) -> dict[str, str]:
    """Return `data.columns` for a file.

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
    """Return the keys of the first rows: JSON rows may leave out keys without a value."""
    from loraflow.data.chats import BadRow
    from loraflow.data.files.readers import read_values

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
    from loraflow.data.files.readers import read_rows

    return next(iter(read_rows(path.parent, [path.name], "auto"))).messages is None


ENOUGH_STEPS = 100  # optimizer steps after which a loss curve shows a trend; fewer need a smaller batch or more epochs
FEW_STEPS = 60  # what epochs are added for, up to MAX_EPOCHS
MAX_EPOCHS = 10
FEW_ROWS = 2000
SMALL_SET = 200  # below, a tenth is too few rows to score


@dataclass(frozen=True)
class SizeSettings:
    """The settings, and why."""

    rows: int  # chats of the files to train on
    heldout_fraction: float
    max_length: int  # tokens of a row
    epochs: int
    accumulation: int  # batches of 4 rows per optimizer step
    packing: bool
    warmup_steps: float
    logging_steps: int
    steps: int  # estimated optimizer steps

    @property
    def batch(self) -> int:
        """Rows per optimizer step."""
        return 4 * self.accumulation

    def lines(self) -> list[str]:
        """Return the recipe's lines that differ from those for many rows, with their reasons."""
        found = []
        if self.heldout_fraction not in (0, choose_heldout_fraction(FEW_ROWS)):  # 0: whole files are held out
            found.append(
                f"heldout_fraction: {self.heldout_fraction}   a tenth of {self.rows} rows is too few to compare models"
            )
        if self.accumulation != 4:
            found.append(f"gradient_accumulation_steps: {self.accumulation}   {self.batch} rows a step, for more steps")
        found.append(f"num_train_epochs: {self.epochs}   about {self.steps} optimizer steps in all")
        if self.warmup_steps == 0:
            found.append("warmup_steps: 0   a warm-up would spend the first of so few steps at rate 0")
        if self.logging_steps < 10:
            found.append(f"logging_steps: {self.logging_steps}   few steps: log their loss more often")
        return found


def choose_heldout_fraction(rows: int) -> float:
    """Return the share of rows to hold out."""
    return 0.2 if rows < SMALL_SET else 0.1


def choose_settings(
    rows: int, heldout_fraction: float, tokens: int, max_length: int, *, may_pack: bool
) -> SizeSettings:
    """Choose settings for a dataset.

    Args:
        rows: the number of chats.
        heldout_fraction: the share of rows to hold out; 0 if whole files are held out.
        max_length: tokens of a packed row.
    """
    train = max(1, round(rows * (1 - heldout_fraction)))
    epochs = 3 if rows < FEW_ROWS else 1
    packed = max(1, math.ceil(tokens * (1 - heldout_fraction) / max_length))
    packing = may_pack and packed * epochs / 16 >= ENOUGH_STEPS
    per_epoch = packed if packing else train
    accumulation = 4
    while accumulation > 1 and per_epoch * epochs / (4 * accumulation) < ENOUGH_STEPS:
        accumulation //= 2
    batch = 4 * accumulation
    epochs = max(epochs, min(MAX_EPOCHS, math.ceil(FEW_STEPS / math.ceil(per_epoch / batch))))
    steps = math.ceil(per_epoch / batch) * epochs
    return SizeSettings(
        rows=rows,
        heldout_fraction=heldout_fraction,
        max_length=max_length,
        epochs=epochs,
        accumulation=accumulation,
        packing=packing,
        warmup_steps=0.1 if steps >= ENOUGH_STEPS else 0,
        logging_steps=10 if steps >= ENOUGH_STEPS else max(1, steps // 20),
        steps=steps,
    )
