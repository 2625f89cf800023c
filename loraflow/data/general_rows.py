"""The rows of evaluation.general, as check_general writes them and score_general reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from loraflow.data.chats import Message

FILE = "general.jsonl"


class GeneralRow(TypedDict):
    """A line of general.jsonl: a chat or a question."""

    id: str
    kind: Literal["chat", "choice"]
    place: str  # file:line
    messages: NotRequired[list[Message]]  # of a chat
    context: NotRequired[str]  # of a question: the text before a choice
    choices: NotRequired[list[str]]
    answer: NotRequired[int]  # the position of the right choice


def read_general(file: Path) -> list[GeneralRow]:
    """Return the rows of a general.jsonl."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]
