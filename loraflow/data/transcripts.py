"""Chats that are written into one text: `Human: …` and `Assistant: …`, `### Human: …`, ChatML, and Glaive's calls.

Only texts that begin with a question's label are read so: a label somewhere in a text is a part of it.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.chats import BadRow
from loraflow.data.json_text import strict_json
from loraflow.data.roles import ASSISTANT, TOOL, normal_role
from loraflow.data.row_fields import RowFields, Turn
from loraflow.data.tools import read_calls


class _Dialect(NamedTuple):
    begin: re.Pattern[str]  # of a text
    label: re.Pattern[str]  # before each message; its group is the role
    answer: re.Pattern[str]  # the label of an answer
    end: str = ""  # after each message


_DIALECTS = (
    # Anthropic's; BELLE has no blank lines
    _Dialect(
        re.compile(r"\s*Human:"), re.compile(r"(?:\A\s*|\n+)(Human|Assistant):[ \t]?"), re.compile(r"\n+Assistant:")
    ),
    # openassistant-guanaco
    _Dialect(
        re.compile(r"\s*### Human:"), re.compile(r"\s*### (Human|Assistant):[ \t]?"), re.compile(r"### Assistant:")
    ),
    # ChatML
    _Dialect(
        re.compile(r"\s*<\|im_start\|>"),
        re.compile(r"\s*<\|im_start\|>(\w+)\n"),
        re.compile(r"<\|im_start\|>assistant\n"),
        "<|im_end|>",
    ),
)
_NEMO = re.compile(r"\n<extra_id_1>(User|Assistant)\n")  # HelpSteer's, after the first question
_GLAIVE = re.compile(r"(?:\A|\n\n\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_GLAIVE_ROLES = {"USER": "user", "ASSISTANT": ASSISTANT, "FUNCTION RESPONSE": TOOL}
_CALL = re.compile(r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*(?:,\s*"arguments"\s*:\s*(.*?)\s*)?\}\s*', re.DOTALL)
_HAS_FUNCTIONS = re.compile(
    r"You are a helpful assistant with access to the following functions\. Use them if required\s*-?"
)


def is_transcript(value: JsonValue) -> bool:
    """Tell whether a value is a text that has a chat, with a question and an answer."""
    dialect = _dialect(value)
    return dialect is not None and isinstance(value, str) and dialect.answer.search(value) is not None


def read_transcript(fields: RowFields) -> list[Turn]:
    """Read a row whose `text` has a chat.

    Raises:
        BadRow: the text has no chat, or two answers follow each other.
    """
    text = fields.value("text")
    if not isinstance(text, str) or not is_transcript(text):
        raise BadRow("text: expected a chat with the labels Human: and Assistant:, ### Human:, or <|im_start|>")
    return _turns(text)


def prompt_turns(prompt: str, answer: JsonValue) -> list[Turn] | None:
    """Return the messages of a prompt that has the chat so far and ends with the label of the answer; else None.

    Args:
        prompt: such as "Human: q Assistant:", with line breaks before the labels.
        answer: the text that follows it.

    Raises:
        BadRow: two answers follow each other.
    """
    if not isinstance(answer, str):
        return None
    if _NEMO.search(prompt):
        first, *rest = _NEMO.split(prompt)
        turns = [Turn("user", first), *map(Turn, map(normal_role, rest[::2]), rest[1::2])]
        return alternating([*turns, Turn(ASSISTANT, answer)])
    dialect = _dialect(prompt)
    if dialect is None:
        return None
    labels = list(dialect.label.finditer(prompt))
    if labels[-1].end() < len(prompt.rstrip()) or normal_role(labels[-1][1]) != ASSISTANT:
        return None
    return _turns(prompt[: labels[-1].start()] + labels[-1][0].rstrip(" ") + answer)


def _dialect(text: JsonValue) -> _Dialect | None:
    if not isinstance(text, str):
        return None
    return next((dialect for dialect in _DIALECTS if dialect.begin.match(text)), None)


def _turns(text: str) -> list[Turn]:
    dialect = _dialect(text)
    assert dialect is not None
    labels = list(dialect.label.finditer(text))
    ends = [label.start() for label in labels[1:]] + [len(text)]
    turns: list[Turn] = []
    for label, end in zip(labels, ends, strict=True):
        content = text[label.end() : end].strip()
        if dialect.end:
            content, found, rest = content.partition(dialect.end)
            if rest.strip() and found:
                raise BadRow(f"a text between two messages: {rest.strip()[:40]!r}")
        turns.append(Turn(normal_role(label[1]), content.strip()))
    return alternating(turns)


def alternating(turns: list[Turn]) -> list[Turn]:
    """Return the messages of a text, in which two answers that follow each other have been cut at the wrong places.

    Raises:
        BadRow: they do.
    """
    for number, (turn, following) in enumerate(itertools.pairwise(turns), 1):
        if turn.role == following.role == ASSISTANT:
            raise BadRow(f"two answers in a row (turns {number} and {number + 1}): a label in an answer cuts it")
    return turns


def is_glaive(row: dict[str, JsonValue]) -> bool:
    """Tell whether a row has the texts `system` and `chat` of Glaive's function calls."""
    chat = row.get("chat")
    return isinstance(row.get("system"), str) and isinstance(chat, str) and _GLAIVE.match(chat) is not None


def read_glaive(fields: RowFields) -> list[Turn]:
    """Read Glaive's function calls: the tools are JSON in the system text, the calls follow `<functioncall>`.

    Raises:
        BadRow: a tool or a call is no JSON.
    """
    system, chat = fields.value("system"), fields.value("chat")
    if not isinstance(system, str) or not isinstance(chat, str) or not _GLAIVE.match(chat):
        raise BadRow("expected the texts system and chat, with the labels USER: and ASSISTANT:")
    text, fields.tools = _functions(system.removeprefix("SYSTEM:").strip())
    labels = list(_GLAIVE.finditer(chat))
    ends = [label.start() for label in labels[1:]] + [len(chat)]
    turns = [Turn("system", text)] if text else []
    for label, end in zip(labels, ends, strict=True):
        content = chat[label.end() : end].replace("<|endoftext|>", "").strip()
        turn = Turn(_GLAIVE_ROLES[label[1]], content)
        if turn.role == ASSISTANT and "<functioncall>" in content:
            said, _, call = content.partition("<functioncall>")
            turn = turn._replace(content=said.strip(), calls=tuple(read_calls(_call(call.strip()), "functioncall")))
        turns.append(turn)
    return alternating(turns)


def _functions(system: str) -> tuple[str, JsonValue]:
    """Return a system text without its functions, and the functions."""
    begin = re.search(r"^\{", system, re.MULTILINE)
    if begin is None:
        return system, None
    text, rest = system[: begin.start()].strip(), system[begin.start() :].strip()
    decoder, tools = json.JSONDecoder(), list[JsonValue]()
    while rest:
        try:
            tool, end = decoder.raw_decode(rest)
        except ValueError as error:
            raise BadRow(f"system: a function is no JSON: {error}") from None
        tools.append(tool)
        rest = rest[end:].strip()
    return _HAS_FUNCTIONS.sub("", text).strip(), tools


def _call(text: str) -> JsonValue:
    """Return a call whose arguments are JSON, or JSON in single quotes as Glaive writes them."""
    found = _CALL.fullmatch(text)
    if found is None:
        raise BadRow(f"expected <functioncall> with name and arguments; got {text[:60]!r}")
    arguments = (found[2] or "{}").strip()
    if len(arguments) > 1 and arguments[0] == arguments[-1] == "'":
        arguments = arguments[1:-1]
    try:
        return {"name": strict_json(found[1]), "arguments": strict_json(arguments)}
    except ValueError as error:
        raise BadRow(f"the arguments of a call are no JSON: {error}") from None
