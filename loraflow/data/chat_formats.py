"""Convert rows to chats: messages, ShareGPT, Alpaca and prompt/completion.

Nothing is dropped silently. A key that no format reads is reported (`unused_keys`). If the key changes what should be
learned, the row is rejected.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.chats import Message

RawRow = dict[str, JsonValue]  # a row as its file has it
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
_SYSTEM_KEYS = ("system", "system_prompt")  # Anthropic's and Alpaca's; OpenOrca's
_TURN_KEYS = ("role", "content", "from", "value", "weight", "train", "training")
_EMPTY: tuple[JsonValue, ...] = (None, "", [], {}, "[]", "{}", "null")


class BadRow(Exception):
    """A row that is not a valid chat. The message says what was expected; it is written to quarantine.jsonl."""


class Turn(NamedTuple):
    """A message whose role and content are not checked yet."""

    role: JsonValue
    content: JsonValue


def to_messages(row: JsonValue, format_name: str = "auto") -> list[Message]:
    """Return a row's chat.

    Raises:
        BadRow: the row is not a valid chat.
    """
    _reject_untrained_answers(row)
    return _chat(row, format_name)


def to_prompt(row: JsonValue, format_name: str = "auto") -> list[Message]:
    """Return a row's prompt: its chat without the last answer, whether the row has that answer or not.

    Raises:
        BadRow: the row has no prompt.
    """
    return _chat(_with_dummy_answer(row) if isinstance(row, dict) else row, format_name)[:-1]


def _chat(row: JsonValue, format_name: str) -> list[Message]:
    if not isinstance(row, dict):
        raise BadRow(f"expected an object, got {type(row).__name__}")
    if format_name == "auto":
        format_name = detect_format(row)
    return _checked(_with_system(row, FORMATS[format_name].read(row)))


def _objects(value: JsonValue) -> list[RawRow] | None:
    """Return the value if it is a list of objects, else None."""
    if not isinstance(value, list):
        return None
    objects = [item for item in value if isinstance(item, dict)]
    return objects if len(objects) == len(value) else None


def _reject_untrained_answers(row: JsonValue) -> None:
    """Reject rows with a flag that excludes an answer from training: loraflow would train on that answer.

    Known flags are OpenAI's `weight`, axolotl's `train` and `training`, and the `label` of trl's KTO.

    Raises:
        BadRow: the row has such a flag.
    """
    if not isinstance(row, dict):
        return
    if row.get("label") is False and "completion" in row:
        raise BadRow("label is false: trl's KTO format marks an undesirable completion; remove such rows")
    turns = row.get("messages", row.get("conversations"))
    for number, turn in enumerate(turns if isinstance(turns, list) else [], 1):
        if not isinstance(turn, dict):
            continue
        who = turn.get("role", turn.get("from"))
        if not isinstance(who, str) or _SHAREGPT_ROLES.get(who) != "assistant":
            continue
        for key in ("weight", "train", "training"):
            mark = turn.get(key)
            if isinstance(mark, bool | int | float) and not mark:
                raise BadRow(
                    f"message {number}: {key} {json.dumps(mark)} excludes an answer from training, which is not supported; "
                    "remove the flag (data.loss_on: last_assistant trains on the last answer only)"
                )


def _with_system(row: RawRow, chat: list[Turn]) -> list[Turn]:
    """Put the system message of a row's own column before the chat."""
    system = next((row[key] for key in _SYSTEM_KEYS if row.get(key)), None)
    if isinstance(system, list):
        system = _text(system, 0)
    if not isinstance(system, str) or not system.strip():
        return chat
    if chat and chat[0].role == "system":
        if chat[0].content == system:
            return chat
        raise BadRow("two different system messages: one in the chat, one in the system column")
    return [Turn("system", system), *chat]


def _with_dummy_answer(row: RawRow) -> RawRow:
    """Put a dummy answer where the answer belongs, so that a prompt passes the checks of a whole chat."""
    out = dict(row)
    for key, role, content in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = _objects(out.get(key))
        if turns:
            last = turns[-1].get(role)
            answered = isinstance(last, str) and _SHAREGPT_ROLES.get(last) == "assistant"
            out[key] = [*(turns[:-1] if answered else turns), {role: "assistant", content: "."}]
    if "instruction" in out:
        out["output"] = "."
    if "prompt" in out:
        is_chat = isinstance(out["prompt"], list)
        out["completion"] = [{"role": "assistant", "content": "."}] if is_chat else "."
    return out


def detect_format(row: RawRow) -> str:
    """Return the name of the format whose keys a row has.

    Raises:
        BadRow: the row does not have the keys of any format.
    """
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row and ("output" in row or "response" in row):
        return "alpaca"
    if "prompt" in row and ("completion" in row or "response" in row):
        return "prompt_completion"
    pairs = "; for the chosen answers of preference pairs, set data.columns: {completion: chosen} or {messages: chosen}"
    raise BadRow(
        "expected messages, conversations, instruction/output or prompt/completion; "
        f"got the keys {', '.join(map(str, list(row)[:8])) or '(none)'}{pairs if 'chosen' in row else ''}"
    )


def has_known_keys(row: RawRow) -> bool:
    """Tell whether a row has the keys of a format. Their values are not checked."""
    try:
        detect_format(row)
    except BadRow:
        return False
    return True


def unused_keys(row: JsonValue, format_name: str, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys of a row, and of its turns, that have a value which no format reads."""
    if not isinstance(row, dict):
        return ()
    renamed: RawRow = {**row, **dict.fromkeys(columns, "")}
    if format_name == "auto":
        format_name = detect_format(renamed)
    read = {*FORMATS[format_name].keys, *_SYSTEM_KEYS, *columns.values()}
    found = [str(key) for key, value in row.items() if key not in read and value not in _EMPTY]
    for key in sorted({"messages", "conversations", *columns.values()} & row.keys() & read):
        turns = _objects(row[key]) or []
        turn_keys = dict.fromkeys(name for turn in turns for name, value in turn.items() if value not in _EMPTY)
        found += [f"{key}.{name}" for name in turn_keys if name not in _TURN_KEYS]
    return tuple(found)


# -- one function per format ----------------------------------------------------------------------------------------


def _field(row: RawRow, *names: str) -> JsonValue:
    for name in names:
        if name in row:
            return row[name]
    raise BadRow(f"expected the key {' or '.join(names)}; got {', '.join(map(str, list(row)[:8]))}")


def _messages(row: RawRow) -> list[Turn]:
    messages = _objects(_field(row, "messages"))
    if messages is None:
        raise BadRow("messages: expected a list of {role, content}")
    for key in ("tool_calls", "function_call"):
        if any(m.get(key) for m in messages):
            raise BadRow(f"messages: {key} is not supported")
    return [Turn(m.get("role"), _text(m.get("content"), i)) for i, m in enumerate(messages, 1)]


def _text(content: JsonValue, number: int) -> JsonValue:
    """Join a message's parts, if its content is a list of parts: [{"type": "text", "text": …}]."""
    if not isinstance(content, list):
        return content
    parts = _objects(content)
    if parts is None:
        raise BadRow(f"message {number}: content is a list; expected text, or parts of type text")
    texts: list[str] = []
    for part in parts:
        text = part.get("text")
        if part.get("type") != "text" or not isinstance(text, str):
            raise BadRow(f"message {number}: a part of type {part.get('type')}; only text is supported")
        texts.append(text)
    return "".join(texts)


def _sharegpt(row: RawRow) -> list[Turn]:
    turns = _objects(_field(row, "conversations"))
    if turns is None:
        raise BadRow("conversations: expected a list of {from, value}")
    out: list[Turn] = []
    for number, turn in enumerate(turns, 1):
        who = turn.get("from", turn.get("role"))
        if not isinstance(who, str) or who not in _SHAREGPT_ROLES:
            raise BadRow(f"turn {number}: unknown role {who!r}; expected one of {', '.join(sorted(_SHAREGPT_ROLES))}")
        out.append(Turn(_SHAREGPT_ROLES[who], turn.get("value", turn.get("content"))))
    return out


def _alpaca(row: RawRow) -> list[Turn]:
    instruction, context = _field(row, "instruction"), row.get("input", row.get("context"))  # Dolly says context
    if not isinstance(instruction, str):
        raise BadRow(f"instruction is {type(instruction).__name__}; expected text")
    if context is not None and not isinstance(context, str):
        raise BadRow(f"input is {type(context).__name__}; expected text")
    user = f"{instruction}\n\n{context}" if context is not None and context.strip() else instruction
    out: list[Turn] = []
    history = row.get("history") or []  # LLaMA-Factory's: earlier questions and answers
    if not isinstance(history, list):
        raise BadRow("history: expected a list of [question, answer]")
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow("history: expected a list of [question, answer]")
        out += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return [*out, Turn("user", user), Turn("assistant", _field(row, "output", "response"))]


def _prompt_completion(row: RawRow) -> list[Turn]:
    prompt, completion = _field(row, "prompt"), _field(row, "completion", "response")
    if isinstance(prompt, list) and isinstance(completion, list):  # trl's conversational format
        return _messages({"messages": [*prompt, *completion]})
    return [Turn("user", prompt), Turn("assistant", completion)]


@dataclass(frozen=True)
class ChatFormat:
    """A format: the function that reads it, and the keys that it reads."""

    read: Callable[[RawRow], list[Turn]]
    keys: tuple[str, ...]


FORMATS = {
    "messages": ChatFormat(_messages, ("messages",)),
    "sharegpt": ChatFormat(_sharegpt, ("conversations",)),
    "alpaca": ChatFormat(_alpaca, ("instruction", "input", "context", "output", "response", "history")),
    "prompt_completion": ChatFormat(_prompt_completion, ("prompt", "completion", "response")),
}


def _checked(turns: list[Turn]) -> list[Message]:
    """Check roles, their order, and contents.

    A system message comes first or not at all; user and assistant alternate; the last message is the assistant's.
    """
    if not turns:
        raise BadRow("the chat has no messages")
    messages: list[Message] = []
    for number, (role, content) in enumerate(turns, 1):
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow(f"message {number}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadRow(f"message {number}: content is {type(content).__name__}; expected text")
        if not content.strip() and role != "system":
            raise BadRow(f"message {number}: an empty {role} message")
        if role == "system" and number != 1:
            raise BadRow(f"message {number}: a system message must be the first message")
        messages.append({"role": role, "content": content})
    speakers = [message["role"] for message in messages if message["role"] not in ("system", "tool")]
    if not speakers or speakers[0] != "user":
        raise BadRow("the first message (after the system message) must be a user message")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"the last message has the role {messages[-1]['role']}; expected assistant")
    for number, (speaker, following) in enumerate(itertools.pairwise(speakers), 1):
        if speaker == following == "user":
            raise BadRow(f"two user messages in a row (turns {number} and {number + 1})")
    return messages
