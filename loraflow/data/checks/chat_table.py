"""The rows that have a chat: their texts and most of their numbers are in temporary files.

So a dataset of any size can be split, compared and counted; 30 bytes of each row are in memory.
"""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from json.encoder import encode_basestring
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy as np
from numpy.typing import NDArray

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import GATE_SET, Message, without_system
from loraflow.data.checks.check_report import Profile, Spread
from loraflow.data.checks.near import Sketches
from loraflow.data.checks.placement import Split
from loraflow.data.checks.row_segment import ADDED_SYSTEM, HAS_SYSTEM, TYPES, Keys, RowSegment
from loraflow.data.checks.split import group_key, to_json

# Rows that are written together, and bytes of their texts
_TOGETHER = 1024
_TOGETHER_BYTES = 250_000
_EARLY = ("drawn_keys", "flags", "drawn")  # numbers that are used while rows are read
TRAIN = "train"  # the set of rows that are not in a held-out file

Rows = NDArray[np.int64]  # row numbers


class ChatTable:
    """Rows with a chat, numbered from 0 in the order in which they are added.

    Args:
        folder: where the temporary files are. They have no names, so they vanish if the process ends.

    Attributes:
        flags: bits of each row, see `loraflow/data/checks/row_segment.py`.
        source: the position of each row's source in data.sources; -1 without sources.
        drawn: the position in SPLITS of each row's split by its file or by the seeded hash.
        group: the number of each row's group (data.group); -1 if it has none.
        texts: sketches of the chats; None if near-duplicates are not searched.
        prompts: sketches of the prompts; the same.
    """

    def __init__(self, folder: Path, config: CheckDatasetConfig):
        self._config = config
        self._file = TemporaryFile(dir=folder, buffering=1 << 20)  # noqa: SIM115 - closed with the table
        self._is_unflushed = False
        self._start = array("q", [0])
        self._numbers = array("I")  # in the file
        self._places, self._place_begins = list[str](), list[int]()  # of segments: beginning of the place, first row
        self._arrays = {name: array(TYPES[name]) for name in (*_EARLY, "groups")}
        later = TYPES.keys() - self._arrays.keys() - {"numbers", "sizes"}
        self._files = {name: TemporaryFile(dir=folder) for name in later}  # noqa: SIM115
        self.flags, self.drawn, self.group = (self._arrays[name] for name in ("flags", "drawn", "groups"))
        self._set = self._arrays["sets"] = array("h")
        self.source = self._arrays["sources"] = array("h")
        self._sources = {source.name: number for number, source in enumerate(config.sources)}
        self._set_names, self._group_names = [TRAIN, GATE_SET], list[str]()
        self._sets: dict[str, int] = {TRAIN: 0, GATE_SET: 1}
        self._groups: dict[str, int] = {}
        is_near = config.near_duplicates is not None
        self.texts = Sketches(folder) if is_near else None
        self.prompts = Sketches(folder) if is_near else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._file, *self._files.values(), self.texts, self.prompts):
            if file is not None:
                file.close()

    def __len__(self) -> int:
        return len(self.flags)

    # -- while rows are read -----------------------------------------------------------------------------------------

    def extend(self, segment: RowSegment, place: str, first: int, set_name: str, source: str | None) -> range:
        """Add the rows of a segment; return their numbers.

        Args:
            place: what their places begin with, such as `train.jsonl:`.
            first: the number of the segment's first line in its file.
        """
        begin, rows, arrays = len(self), len(segment), segment.arrays
        for name in _EARLY:
            self._arrays[name].frombytes(arrays[name].tobytes())
        for name, file in self._files.items():
            file.write(arrays[name].data)
        names = np.array([_number(name, self._groups, self._group_names) for name in segment.groups], np.int32)
        groups = arrays["groups"]
        self.group.frombytes((np.where(groups < 0, groups, names[groups]) if len(names) else groups).tobytes())
        self._set.frombytes(np.full(rows, _number(set_name, self._sets, self._set_names), np.int16).tobytes())
        self.source.frombytes(np.full(rows, -1 if source is None else self._sources[source], np.int16).tobytes())
        if rows:
            self._places.append(place)
            self._place_begins.append(begin)
            self._numbers.frombytes((arrays["numbers"] + np.uint32(first)).tobytes())
            self._start.frombytes((np.cumsum(arrays["sizes"]) + self._start[-1]).tobytes())
            self._file.write(segment.texts)
            self._is_unflushed = True
        if self.texts is not None and self.prompts is not None:
            self.texts.append(arrays["text_sketches"], arrays["text_keys"])
            self.prompts.append(arrays["prompt_sketches"], arrays["prompt_keys"])
        return range(begin, begin + rows)

    # -- texts -------------------------------------------------------------------------------------------------------

    def place(self, number: int) -> str:
        """Return where a row was read."""
        return f"{self._places[bisect_right(self._place_begins, number) - 1]}{self._numbers[number]}"

    def id_of(self, number: int) -> str:
        """Return the id of a row's chat."""
        return f"{self.columns.ids[number]:016x}"

    def raw(self, number: int) -> str:
        """Return the text of a row whose last answer is not learned or that has no group, as it was read."""
        raw: str = json.loads(self._lines([number])[2])
        return raw

    def messages(self, number: int) -> list[Message]:
        """Return a row's chat as it was read, without data.system."""
        chat: list[Message] = json.loads(self._lines([number])[0])
        return without_system(chat) if self.flags[number] & ADDED_SYSTEM else chat

    def lines(self, rows: Rows, split: Split, group: Callable[[int], str | None] | None) -> Iterator[bytes]:
        """Yield the lines of rows in train.jsonl, validation.jsonl or heldout.jsonl, some at a time.

        Of a held-out row, only the last answer is used: marks and weights are left out.
        """
        is_heldout = split == "heldout"
        names = [to_json(name if is_heldout else split) for name in self._set_names]
        places = [encode_basestring(place)[:-1] for place in self._places]
        ids, sets = self.columns.ids, np.maximum(self.columns.sets, 1)
        in_file = np.frombuffer(self._numbers, np.uint32)
        starts = np.frombuffer(self._start, np.int64)
        while len(rows):
            some = rows[:_TOGETHER]
            totals = np.cumsum(starts[some + 1] - starts[some])
            some = some[: 1 + int(np.searchsorted(totals, _TOGETHER_BYTES))]
            rows = rows[len(some) :]
            of_places = np.searchsorted(self._place_begins, some, side="right") - 1
            digits = ids[some].astype(">u8").tobytes().hex()
            lines = self._lines(some.tolist())
            chats, rests = lines[::3], [""] * len(some) if is_heldout else lines[1::3]
            if group is not None:
                groups = map(group, some.tolist())
                rests = [
                    rest if name is None else f'{rest}, "group": {to_json(name)}'
                    for rest, name in zip(rests, groups, strict=True)
                ]
            columns = (column.tolist() for column in (sets[some], of_places, in_file[some]))
            yield "".join(
                [
                    f'{{"id": "{digits[at : at + 16]}", "set": {names[name]}, "place": {places[place]}{number}", '
                    f'"messages": {chat}{rest}}}\n'
                    for at, name, place, number, chat, rest in zip(
                        range(0, len(digits), 16), *columns, chats, rests, strict=True
                    )
                ]
            ).encode()

    def _lines(self, rows: Sequence[int]) -> list[str]:
        """Return the texts of rows, three of each row: its messages, its marks, and the row as it was read."""
        if self._is_unflushed:
            self._file.flush()
            self._is_unflushed = False
        file, start = self._file.fileno(), self._start
        begin, end = start[min(rows)], start[max(rows) + 1]
        if end - begin > 4 * _TOGETHER_BYTES:  # most of it would not be needed
            parts = [os.pread(file, start[row + 1] - start[row], start[row]) for row in rows]
        else:
            content = os.pread(file, end - begin, begin)
            parts = [content[start[row] - begin : start[row + 1] - begin] for row in rows]
        return b"".join(parts).decode().split("\n")[:-1]

    def set_of(self, number: int, split: Split) -> str:
        """Return the name of a row's set, if it is in this split."""
        return self._set_names[self._set[number] or 1] if split == "heldout" else split

    def set_read(self, number: int) -> str:
        """Return the name of the set whose files have the row."""
        return self._set_names[self._set[number]]

    @property
    def has_groups(self) -> bool:
        """Tell whether rows have groups (data.group)."""
        return bool(self._group_names)

    def group_name(self, number: int) -> str | None:
        """Return a row's group (data.group)."""
        return None if self.group[number] < 0 else self._group_names[self.group[number]]

    def drawn_key(self, number: int) -> str:
        """Return the key of a row's prompt, without data.system."""
        return f"{self._arrays['drawn_keys'][number]:016x}"

    def unit(self, number: int, key: int) -> str:
        """Return what the seeded hash draws: the key of the row's group or of its prompt, which is `key`."""
        group = self.group_name(number)
        return f"{key:016x}" if group is None else group_key(group)

    # -- after all rows are read -------------------------------------------------------------------------------------

    @cached_property
    def columns(self) -> Columns:
        """What is known of all rows. No row may be added after it was asked for."""
        found = {name: np.frombuffer(values, values.typecode) for name, values in self._arrays.items()}
        for name, file in self._files.items():
            file.flush()
            found[name] = np.asarray(np.memmap(file, TYPES[name], "r")) if len(self) else np.empty(0, TYPES[name])
        return Columns(**found)


@dataclass(frozen=True)
class Columns:
    """Numbers of each row [rows]."""

    ids: Keys
    marks: Keys  # a hash of the marks and weights of the answers; 0 without marks
    keys: Keys  # of the prompt
    drawn_keys: Keys  # of the prompt without data.system, by which the seeded hash draws
    prompts: Keys  # of the prompt without differences of case and white space
    answers: Keys  # of the last answer, the same
    asked: Keys  # of the prompt without data.system, the same
    sets: NDArray[np.int16]  # 0: training files; 1: the gate's set
    sources: NDArray[np.int16]  # position in data.sources; -1: none
    groups: NDArray[np.int32]  # -1: none
    flags: NDArray[np.uint8]
    drawn: NDArray[np.int8]  # position in SPLITS
    turns: NDArray[np.int32]
    prompt_characters: NDArray[np.int32]
    answer_characters: NDArray[np.int32]

    def has(self, flag: int) -> NDArray[np.bool_]:
        """Tell for each row whether it has a flag."""
        return (self.flags & flag).astype(bool)


def source_of(place: str) -> str:
    """Return the name of the source that a row comes from (data.sources): its place begins with it."""
    return place.split("/", 1)[0]


def _number(name: str, numbers: dict[str, int], names: list[str]) -> int:
    number = numbers.setdefault(name, len(names))
    if number == len(names):
        names.append(name)
    return number


def profile(columns: Columns, rows: Rows) -> Profile | None:
    """Return the profile of training rows; None if there are none."""
    if len(rows) == 0:
        return None
    turns, chats = np.unique(columns.turns[rows], return_counts=True)
    return Profile(
        turns=dict(sorted(zip(map(str, turns.tolist()), chats.tolist(), strict=True))),
        with_system=int(columns.has(HAS_SYSTEM)[rows].sum()) / len(rows),
        prompt_characters=_spread(columns.prompt_characters[rows]),
        answer_characters=_spread(columns.answer_characters[rows]),
    )


def _spread(lengths: NDArray[np.int32]) -> Spread:
    ordered = np.sort(lengths)
    return Spread(median=int(ordered[len(ordered) // 2]), max=int(ordered[-1]))
