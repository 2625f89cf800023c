"""The rows that have a chat: their texts are in a temporary file, and a few numbers of each row are in memory.

So a dataset of any size can be split, compared and counted; a row takes about 70 bytes of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from json.encoder import encode_basestring
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

import numpy as np
from numpy.typing import NDArray

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.chats import GATE_SET, Chat, Message, with_system, without_system
from loraflow.data.near import Sketches
from loraflow.data.placement import SPLITS, Split
from loraflow.data.readers import Row, is_answer_learned, is_partly_learned
from loraflow.data.shingles import comparable_text
from loraflow.data.split import group_key, in_share, normalize, normalized_key, text_key, to_json, without_call_ids

# Bits of `flags`
LAST_LEARNED = 1  # the last answer is learned, or may be the reference of a held-out row
HAS_SYSTEM = 2  # with data.system
ADDED_SYSTEM = 4  # by data.system
PARTLY_LEARNED = 8
WEIGHTED = 16
PINNED_TO_TRAIN = 32  # its source is used for training only (data.sources, split: train)
TRAIN = "train"  # the set of rows that are not in a held-out file

Keys = NDArray[np.uint64]
Rows = NDArray[np.int64]  # row numbers


class ChatTable:
    """Rows with a chat, numbered from 0 in the order in which they are added.

    Args:
        folder: where the temporary file is. It has no name, so it vanishes if the process ends.
        config: the stage's config.

    Attributes:
        flags: bits of each row, see above.
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
        self.flags, self.drawn, self.group = array("B"), array("b"), array("i")
        self._set, self.source = array("h"), array("h")
        self._sources = {source.name: number for number, source in enumerate(config.sources)}
        self._ids, self._marks, self._keys = array("Q"), array("Q"), array("Q")
        # Without data.system, the prompt is what is drawn.
        self._drawn_keys = array("Q") if config.system else self._keys
        self._prompts, self._answers = array("Q"), array("Q")
        self._asked = array("Q") if config.system else self._prompts
        self._turns, self._prompt_characters, self._answer_characters = array("i"), array("i"), array("i")
        self._set_names, self._group_names = [TRAIN, GATE_SET], list[str]()
        self._sets: dict[str, int] = {TRAIN: 0, GATE_SET: 1}
        self._groups: dict[str, int] = {}
        is_near = config.near_duplicates is not None
        self.texts = Sketches(folder) if is_near else None
        self.prompts = Sketches(folder) if is_near else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        for sketches in (self.texts, self.prompts):
            if sketches is not None:
                sketches.close()

    def __len__(self) -> int:
        return len(self.flags)

    # -- while rows are read -----------------------------------------------------------------------------------------

    def add(self, row: Row, messages: list[Message], set_name: str) -> int:
        """Add a row with a chat; return its number."""
        system = self._config.system
        is_added = bool(system) and messages[0]["role"] != "system"
        chat = with_system(messages, system) if system and is_added else messages
        items = [_message_json(message) for message in chat]
        is_simple = all(len(message) == 2 for message in chat)
        hashed = items if is_simple else [_hashed(item, message) for item, message in zip(items, chat, strict=True)]
        prompt_key, row_key = _keys(hashed)
        self._ids.append(int(row_key, 16))
        self._keys.append(int(prompt_key, 16))
        self._set.append(_number(set_name, self._sets, self._set_names))
        self.group.append(-1 if row.group is None else _number(row.group, self._groups, self._group_names))
        if system:
            if is_added:
                prompt_key = _key([_hashed(_message_json(message), message) for message in messages[:-1]])
            self._drawn_keys.append(int(prompt_key, 16))
        source = self._sources.get(source_of(row.place), -1) if self._sources else -1
        self.source.append(source)
        is_pinned = source >= 0 and self._config.sources[source].split == TRAIN
        self.drawn.append(SPLITS.index(self._draw(prompt_key, row.group, set_name, is_pinned=is_pinned)))
        self._add_normalized(messages, chat, is_simple=is_simple)
        is_learned = is_answer_learned(row)
        self._add_text(
            row,
            items,
            added=is_added,
            needs_raw=not is_learned or (self._config.group is not None and row.group is None),
        )
        self._turns.append(len(chat))
        self._prompt_characters.append(sum(len(message["content"]) for message in chat[:-1]))
        self._answer_characters.append(len(chat[-1]["content"]))
        self.flags.append(
            LAST_LEARNED * is_learned
            | HAS_SYSTEM * (chat[0]["role"] == "system")
            | ADDED_SYSTEM * is_added
            | PARTLY_LEARNED * (row.learned is not None and is_partly_learned(row))
            | WEIGHTED * (row.weights is not None)
            | PINNED_TO_TRAIN * is_pinned
        )
        return len(self.flags) - 1

    def _draw(self, prompt_key: str, group: str | None, set_name: str, *, is_pinned: bool) -> Split:
        """Return a row's split by its file, or by the seeded hash of its prompt or group."""
        config = self._config
        if set_name != TRAIN:
            return "heldout"
        key = prompt_key if group is None else group_key(group)
        may_be_held_out = not config.heldout and not is_pinned
        if may_be_held_out and in_share(key, config.heldout_fraction, config.seed, "heldout"):
            return "heldout"
        if config.validation_fraction and in_share(key, config.validation_fraction, config.seed, "validation"):
            return "validation"
        return "train"

    def _add_normalized(self, messages: Chat, chat: Chat, *, is_simple: bool) -> None:
        """Add what is compared without differences of case and white space."""
        if is_simple and len(chat) == 2:  # as most chats are: the texts are normalised once
            asked, answer = (normalize(message["content"]) for message in messages)
            key = text_key(asked)
            said = text_key(answer)
            texts = (f"{asked} {answer}" if asked and answer else asked or answer, asked)
        else:
            key = normalized_key(chat[:-1])
            said = normalized_key(chat[-1:])
            texts = ("", "") if self.texts is None else (comparable_text(messages), comparable_text(messages[:-1]))
        self._prompts.append(key)
        self._answers.append(said)
        if self._asked is not self._prompts:
            self._asked.append(key if chat is messages else normalized_key(messages[:-1]))
        if self.texts is not None and self.prompts is not None:
            self.texts.add(texts[0])
            self.prompts.add(texts[1], key if is_simple and len(chat) == 2 else None)

    def _add_text(self, row: Row, items: list[str], *, added: bool, needs_raw: bool) -> None:
        marks = ""
        if row.learned is not None:
            learned = [number + added for number in row.learned]
            marks = f', "learned": {to_json(learned)}'
            if row.weights is not None:
                marks += f', "weights": {to_json(list(row.weights))}'
        self._marks.append(text_key(marks) if marks else 0)
        # JSON has no line breaks, so lines are its parts.
        text = (
            f"{encode_basestring(row.place)}\n[{', '.join(items)}]\n{marks}\n{to_json(row.raw) if needs_raw else ''}\n"
        )
        data = text.encode()
        self._file.write(data)
        self._start.append(self._start[-1] + len(data))
        self._is_unflushed = True

    # -- texts -------------------------------------------------------------------------------------------------------

    def place(self, number: int) -> str:
        """Return where a row was read."""
        place: str = json.loads(self._parts(number)[0])
        return place

    def id_of(self, number: int) -> str:
        """Return the id of a row's chat."""
        return f"{self._ids[number]:016x}"

    def raw(self, number: int) -> str:
        """Return the text of a row whose last answer is not learned or that has no group, as it was read."""
        raw: str = json.loads(self._parts(number)[3])
        return raw

    def messages(self, number: int) -> list[Message]:
        """Return a row's chat as it was read, without data.system."""
        chat: list[Message] = json.loads(self._parts(number)[1])
        return without_system(chat) if self.flags[number] & ADDED_SYSTEM else chat

    def line(self, number: int, split: Split, group: str | None) -> str:
        """Return a row's line of train.jsonl, validation.jsonl or heldout.jsonl, without the line break.

        Of a held-out row, only the last answer is used: marks and weights are left out.

        Args:
            number: the row.
            split: its split.
            group: its group.
        """
        place, messages, marks, _ = self._parts(number)
        rest = "" if split == "heldout" else marks
        if group is not None:
            rest += f', "group": {to_json(group)}'
        name = to_json(self.set_of(number, split))
        return f'{{"id": "{self.id_of(number)}", "set": {name}, "place": {place}, "messages": {messages}{rest}}}'

    def _parts(self, number: int) -> list[str]:
        if self._is_unflushed:
            self._file.flush()
            self._is_unflushed = False
        begin, end = self._start[number], self._start[number + 1]
        return os.pread(self._file.fileno(), end - begin, begin).decode().split("\n")[:4]

    def set_of(self, number: int, split: Split) -> str:
        """Return the name of a row's set, if it is in this split."""
        return self._set_names[self._set[number] or 1] if split == "heldout" else split

    def set_read(self, number: int) -> str:
        """Return the name of the set whose files have the row."""
        return self._set_names[self._set[number]]

    def group_name(self, number: int) -> str | None:
        """Return a row's group (data.group)."""
        return None if self.group[number] < 0 else self._group_names[self.group[number]]

    def drawn_key(self, number: int) -> str:
        """Return the key of a row's prompt, without data.system."""
        return f"{self._drawn_keys[number]:016x}"

    def unit(self, number: int, key: int) -> str:
        """Return what the seeded hash draws: the key of the row's group or of its prompt, which is `key`."""
        group = self.group_name(number)
        return f"{key:016x}" if group is None else group_key(group)

    # -- after all rows are read -------------------------------------------------------------------------------------

    def columns(self) -> Columns:
        """Return what is known of all rows. No row may be added after that."""
        return Columns(
            ids=np.frombuffer(self._ids, np.uint64),
            marks=np.frombuffer(self._marks, np.uint64),
            keys=np.frombuffer(self._keys, np.uint64),
            drawn_keys=np.frombuffer(self._drawn_keys, np.uint64),
            prompts=np.frombuffer(self._prompts, np.uint64),
            answers=np.frombuffer(self._answers, np.uint64),
            asked=np.frombuffer(self._asked, np.uint64),
            sets=np.frombuffer(self._set, np.int16),
            sources=np.frombuffer(self.source, np.int16),
            groups=np.frombuffer(self.group, np.int32),
            flags=np.frombuffer(self.flags, np.uint8),
            drawn=np.frombuffer(self.drawn, np.int8),
            turns=np.frombuffer(self._turns, np.int32),
            prompt_characters=np.frombuffer(self._prompt_characters, np.int32),
            answer_characters=np.frombuffer(self._answer_characters, np.int32),
        )


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
    """Return the number of a name; a new one if it has none."""
    number = numbers.get(name)
    if number is None:
        number = numbers[name] = len(names)
        names.append(name)
    return number


def _message_json(message: Message) -> str:
    """Return a message as `to_json` does, and faster."""
    if len(message) == 2:
        return f'{{"role": "{message["role"]}", "content": {encode_basestring(message["content"])}}}'
    return to_json(message)


def _hashed(item: str, message: Message) -> str:
    """Return the text of a message of which the chat's id is made. `item` is its JSON."""
    return item if len(message) == 2 else to_json(without_call_ids(message))


def _keys(items: list[str]) -> tuple[str, str]:
    """Return `_key` of the prompt's messages and of all messages. The prompt is hashed once."""
    prompt = hashlib.sha256(f"[{', '.join(items[:-1])}".encode())
    row = prompt.copy()
    prompt.update(b"]")
    row.update(f"{', ' if len(items) > 1 else ''}{items[-1]}]".encode())
    return prompt.hexdigest()[:16], row.hexdigest()[:16]


def _key(items: Iterable[str]) -> str:
    """Return what `row_id` returns for messages with these texts."""
    return hashlib.sha256(f"[{', '.join(items)}]".encode()).hexdigest()[:16]
