"""The values that the data stages pass on: messages, chats, and the rows of a checked dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:  # the processes that render templates import this module, so it has to be light
    from pathlib import Path

    from pydantic import JsonValue


class Function(TypedDict):
    """A function that a model may call. Its parameters are a JSON schema."""

    name: str
    description: NotRequired[str]
    parameters: NotRequired[JsonValue]


class Tool(TypedDict):
    """A tool, as OpenAI's API and chat templates have it."""

    type: str  # function
    function: Function


class CalledFunction(TypedDict):
    """The function of a call, and its arguments."""

    name: str
    arguments: dict[str, JsonValue]


class ToolCall(TypedDict):
    """A call of a tool."""

    type: str  # function
    function: CalledFunction
    id: NotRequired[str]


class Message(TypedDict):
    """One message of a chat."""

    role: str  # system, user, assistant or tool
    content: str  # may be empty beside tool_calls
    reasoning_content: NotRequired[str]  # of an assistant: its reasoning, if that stands beside the content
    tool_calls: NotRequired[list[ToolCall]]  # of an assistant
    tool_call_id: NotRequired[str]  # of a tool's result
    name: NotRequired[str]  # of the tool, beside its result
    tools: NotRequired[list[Tool]]  # of the chat; only in its first message


Chat = Sequence[Message]
GATE_SET = "heldout"  # the held-out set that the gate uses; extra held-out sets are only reported


def with_system(chat: list[Message], system: str) -> list[Message]:
    """Return a chat with a system message before it. The chat's tools go to the new first message."""
    first = chat[0].copy()
    message: Message = {"role": "system", "content": system}
    if "tools" in first:
        message["tools"] = first.pop("tools")
    return [message, first, *chat[1:]]


def without_system(chat: list[Message]) -> list[Message]:
    """Return the chat to which `with_system` added a system message."""
    first = chat[1].copy()
    if "tools" in chat[0]:
        first["tools"] = chat[0]["tools"]
    return [first, *chat[2:]]


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


# The opening tag may be missing: some prompts end with it. Templates that cut reasoning look for the last closing tag too.
_REASONING = re.compile(r".*(?:</think>|\[/THINK\])\s*", re.DOTALL)
# Of a message, beside its content. A text is rendered; templates read it as reasoning_content or as thinking.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")


def without_reasoning(chat: Sequence[Message]) -> list[Message]:
    """Return a chat whose answers have no reasoning: neither `<think> … </think>` or `[THINK] … [/THINK]` before the
    answer, nor a text beside it.
    """
    return [_without(message) if message["role"] == "assistant" else message for message in chat]


def _without(message: Message) -> Message:
    stripped: Message = {**message, "content": _REASONING.sub("", message["content"], count=1)}
    stripped.pop("reasoning_content", None)
    return stripped


GENERAL_FILE = "general.jsonl"  # of check_general


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
