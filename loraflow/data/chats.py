"""The values that the data stages pass on: messages, chats, and the rows of a checked dataset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict


class Message(TypedDict):
    """One message of a chat."""

    role: str  # system, user, assistant or tool
    content: str


Chat = Sequence[Message]
GATE_SET = "heldout"  # the held-out set that the gate uses; extra held-out sets are only reported


class BadRow(Exception):
    """A row that is not a valid chat. The message says what was expected; it is written to quarantine.jsonl."""


class ChatRecord(TypedDict):
    """A line of train.jsonl, validation.jsonl or heldout.jsonl."""

    id: str  # hash of the chat
    set: str  # train, heldout, or the name of an extra held-out set
    place: str  # where the row was read: file:line, or file:row
    messages: list[Message]
    learned: NotRequired[list[int]]  # numbers of the answers that are learned, from 0; absent: all of them
    weights: NotRequired[list[float]]  # of each of `learned` in the loss; absent: 1 for all
    group: NotRequired[str]  # the value of data.group
