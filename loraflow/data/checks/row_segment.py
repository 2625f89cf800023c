"""A segment of a file's rows, as check_dataset keeps it: what is known of each row, without where the row is.

So the same rows give the same segment in another place or file, and a cache can have it. `chat_table.py` joins the
segments of all files.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loraflow.config.stage_configs import CheckDatasetConfig
from loraflow.data.answers.labels import Question
from loraflow.data.chats import Chat, Message, with_system
from loraflow.data.checks.broken_text import has_carriage_return
from loraflow.data.checks.near import HASHES, comparable_text, sketch
from loraflow.data.checks.placement import SPLITS, Split
from loraflow.data.checks.split import (
    group_key,
    in_share,
    normalize,
    normalized_key,
    text_key,
    to_json,
    without_call_ids,
)
from loraflow.data.files.readers import Row, is_answer_learned, is_partly_learned
from loraflow.store.chunk_cache import split_head

# Bits of `flags`
LAST_LEARNED = 1  # the last answer is learned, or may be the reference of a held-out row
HAS_SYSTEM = 2  # with data.system
ADDED_SYSTEM = 4  # by data.system
PARTLY_LEARNED = 8
WEIGHTED = 16
PINNED_TO_TRAIN = 32  # its source is used for training only (data.sources, split: train)

Keys = NDArray[np.uint64]
# The arrays of a segment, and the types of their values
TYPES = {
    "numbers": "I",
    "ids": "Q",
    "marks": "Q",
    "keys": "Q",
    "drawn_keys": "Q",
    "prompts": "Q",
    "answers": "Q",
    "asked": "Q",
    "groups": "i",
    "flags": "B",
    "drawn": "b",
    "turns": "i",
    "prompt_characters": "i",
    "answer_characters": "i",
    "sizes": "q",
}
_NEAR_TYPES = {"text_keys": "Q", "text_sketches": "B", "prompt_keys": "Q", "prompt_sketches": "B"}


class LeftOut(NamedTuple):
    """A row without a chat."""

    number: int  # in the file, from the first line of the segment
    problem: str
    raw: str
    marked_by: str | None  # of a row that is marked false: by what; None: it is malformed


@dataclass(frozen=True)
class RowSegment:
    """Rows that were read.

    Attributes:
        arrays: values of each row with a chat [rows]; `numbers` are those in the file, from the segment's first line.
        texts: of these rows, one after another; `sizes` are their bytes.
        groups: names of the numbers in `arrays["groups"]`.
        left_out: the other rows, in order.
        unread: keys that have values and were not read → rows.
        told: (such a key, what its value says) → rows (`loraflow/data/answers/unread_values.py`).
        carriage_returns: rows with a chat that has carriage returns.
        asked: what the rows depend on beside their content: questions about the file, with the answers.
    """

    arrays: dict[str, np.ndarray]
    texts: bytes | memoryview
    groups: list[str]
    left_out: list[LeftOut]
    unread: dict[str, int]
    told: dict[tuple[str, str], int]
    carriage_returns: int
    asked: dict[Question, bool]

    def __len__(self) -> int:
        return len(self.arrays["ids"])

    def as_bytes(self) -> bytes:
        """Return the content of a cache's entry: a line of JSON, the arrays and the texts."""
        head = {
            "rows": len(self),
            "near": "text_keys" in self.arrays,
            "groups": self.groups,
            "left_out": self.left_out,
            "unread": self.unread,
            "told": [[*item, count] for item, count in self.told.items()],
            "carriage_returns": self.carriage_returns,
            "asked": [[list(question), answer] for question, answer in self.asked.items()],
        }
        parts = [json.dumps(head).encode(), b"\n", *(self.arrays[name].tobytes() for name in self.arrays), self.texts]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, content: bytes | memoryview) -> RowSegment:
        """Return what `as_bytes` wrote."""
        head, begin = split_head(content)
        arrays: dict[str, np.ndarray] = {}
        for name, code in {**TYPES, **(_NEAR_TYPES if head["near"] else {})}.items():
            count = head["rows"] * (HASHES if name.endswith("sketches") else 1)
            arrays[name] = np.frombuffer(content, np.dtype(code), count, begin)
            begin += arrays[name].nbytes
        left_out = [LeftOut(*values) for values in head["left_out"]]
        asked = {tuple(question): answer for question, answer in head["asked"]}
        told = {(key, word): count for key, word, count in head["told"]}
        return cls(
            arrays,
            memoryview(content)[begin:],
            head["groups"],
            left_out,
            head["unread"],
            told,
            head["carriage_returns"],
            asked,
        )


class SegmentBuilder:
    """Collect the rows of a segment.

    Args:
        is_training: the rows are not those of a held-out file.
        is_pinned: the source of the rows is used for training only.
    """

    def __init__(self, config: CheckDatasetConfig, *, is_training: bool, is_pinned: bool):
        self._config, self._is_training, self._is_pinned = config, is_training, is_pinned
        self._arrays = {name: array(code) for name, code in TYPES.items()}
        self._parts: list[bytes] = []
        self._groups: dict[str, int] = {}
        self._left_out: list[LeftOut] = []
        self._unread: Counter[str] = Counter()
        self._told: Counter[tuple[str, str]] = Counter()
        self._carriage_returns = 0
        self._is_near = config.near_duplicates is not None
        self._compared: list[str] = []  # of each row, the text that is compared with those of others
        self._compared_prompts: list[str] = []
        self._prompt_keys = array("Q")

    def add(self, number: int, row: Row) -> None:
        """Add a row, with or without a chat."""
        if row.unused_keys:
            self._unread.update(row.unused_keys)
            self._told.update(row.told)
        if row.messages is None:
            self._left_out.append(
                LeftOut(number, row.problem or "", row.raw, row.marked_by if row.is_marked_false else None)
            )
        else:
            self._carriage_returns += has_carriage_return(message["content"] for message in row.messages)
            self._arrays["numbers"].append(number)
            self._add_chat(row, row.messages)

    def segment(self, asked: dict[Question, bool]) -> RowSegment:
        """Return the segment. `asked` has the questions about the file that were answered for it."""
        arrays = {name: np.frombuffer(values, np.dtype(values.typecode)) for name, values in self._arrays.items()}
        if self._is_near:
            arrays["text_keys"] = np.fromiter(map(text_key, self._compared), np.uint64, len(self._compared))
            arrays["text_sketches"] = sketch(self._compared)
            arrays["prompt_keys"] = np.frombuffer(self._prompt_keys, np.uint64)
            arrays["prompt_sketches"] = sketch(self._compared_prompts)
        return RowSegment(
            arrays,
            b"".join(self._parts),
            list(self._groups),
            self._left_out,
            dict(self._unread),
            dict(self._told),
            self._carriage_returns,
            asked,
        )

    def _add_chat(self, row: Row, messages: list[Message]) -> None:
        system, arrays = self._config.system, self._arrays
        is_added = bool(system) and messages[0]["role"] != "system"
        chat = with_system(messages, system) if system and is_added else messages
        items = [message_json(message) for message in chat]
        is_simple = all(len(message) == 2 for message in chat)
        hashed = items if is_simple else [_hashed(item, message) for item, message in zip(items, chat, strict=True)]
        prompt_key, row_key = _keys(hashed)
        arrays["ids"].append(int(row_key, 16))
        arrays["keys"].append(int(prompt_key, 16))
        arrays["groups"].append(-1 if row.group is None else self._groups.setdefault(row.group, len(self._groups)))
        if system and is_added:
            prompt_key, _ = _keys([_hashed(message_json(message), message) for message in messages])
        arrays["drawn_keys"].append(int(prompt_key, 16))
        arrays["drawn"].append(SPLITS.index(self._draw(prompt_key, row.group)))
        self._add_normalized(messages, chat, is_simple=is_simple)
        is_learned = is_answer_learned(row)
        needs_raw = not is_learned or (self._config.group is not None and row.group is None)
        self._add_text(row, items, added=is_added, needs_raw=needs_raw)
        arrays["turns"].append(len(chat))
        arrays["prompt_characters"].append(sum(len(message["content"]) for message in chat[:-1]))
        arrays["answer_characters"].append(len(chat[-1]["content"]))
        arrays["flags"].append(
            LAST_LEARNED * is_learned
            | HAS_SYSTEM * (chat[0]["role"] == "system")
            | ADDED_SYSTEM * is_added
            | PARTLY_LEARNED * (row.learned is not None and is_partly_learned(row))
            | WEIGHTED * (row.weights is not None)
            | PINNED_TO_TRAIN * self._is_pinned
        )

    def _draw(self, prompt_key: str, group: str | None) -> Split:
        """Return a row's split by its file, or by the seeded hash of its prompt or group."""
        config = self._config
        if not self._is_training:
            return "heldout"
        key = prompt_key if group is None else group_key(group)
        may_be_held_out = not config.heldout and not self._is_pinned
        if may_be_held_out and in_share(key, config.heldout_fraction, config.seed, "heldout"):
            return "heldout"
        if config.validation_fraction and in_share(key, config.validation_fraction, config.seed, "validation"):
            return "validation"
        return "train"

    def _add_normalized(self, messages: Chat, chat: Chat, *, is_simple: bool) -> None:
        """Add what is compared without differences of case and white space."""
        is_pair = is_simple and len(chat) == 2
        if is_pair:  # as most chats are: the texts are normalised once
            asked, answer = (normalize(message["content"]) for message in messages)
            key = text_key(asked)
            answer_key = text_key(answer)
            texts = (f"{asked} {answer}" if asked and answer else asked or answer, asked)
        else:
            key = normalized_key(chat[:-1])
            answer_key = normalized_key(chat[-1:])
            texts = (comparable_text(messages), comparable_text(messages[:-1])) if self._is_near else ("", "")
        self._arrays["prompts"].append(key)
        self._arrays["answers"].append(answer_key)
        self._arrays["asked"].append(key if chat is messages else normalized_key(messages[:-1]))
        if self._is_near:
            self._compared.append(texts[0])
            self._compared_prompts.append(texts[1])
            self._prompt_keys.append(key if is_pair else text_key(texts[1]))

    def _add_text(self, row: Row, items: list[str], *, added: bool, needs_raw: bool) -> None:
        marks = ""
        if row.learned is not None:
            learned = [number + added for number in row.learned]
            marks = f', "learned": {to_json(learned)}'
            if row.weights is not None:
                marks += f', "weights": {to_json(list(row.weights))}'
        self._arrays["marks"].append(text_key(marks) if marks else 0)
        # JSON has no line breaks, so lines are its parts.
        data = f"[{', '.join(items)}]\n{marks}\n{to_json(row.raw) if needs_raw else ''}\n".encode()
        self._parts.append(data)
        self._arrays["sizes"].append(len(data))


def message_json(message: Message) -> str:
    """Return a message as `to_json` does, and faster."""
    if len(message) == 2:
        return f'{{"role": "{message["role"]}", "content": {encode_basestring(message["content"])}}}'
    return to_json(message)


def _hashed(item: str, message: Message) -> str:
    """Return the text of a message of which the chat's id is made. `item` is its JSON."""
    return item if len(message) == 2 else to_json(without_call_ids(message))


def _keys(items: list[str]) -> tuple[str, str]:
    """Return what `row_id` returns for the prompt's messages and for all messages. The prompt is hashed once."""
    prompt = hashlib.sha256(f"[{', '.join(items[:-1])}".encode())
    row = prompt.copy()
    prompt.update(b"]")
    row.update(f"{', ' if len(items) > 1 else ''}{items[-1]}]".encode())
    return prompt.hexdigest()[:16], row.hexdigest()[:16]
