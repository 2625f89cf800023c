"""Check the messages of a chat: roles, their order, contents and tool calls."""

import itertools
import json
import re

from pydantic import JsonValue

from loraflow.data.cell_values import refuse_error_value
from loraflow.data.chats import BadRow, Message, Tool
from loraflow.data.formats.row_fields import RowFields, Turn, has_value
from loraflow.data.formats.tools import fitting_calls, read_tools

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}  # a role's own text, which all rows share
_TOOLS = re.compile(r"<tools>(.*?)(?:</tools>|$)", re.DOTALL)


def checked_messages(turns: list[Turn], tools: list[Tool] | None = None) -> list[Message]:
    """Return the messages of a chat whose roles, their order, contents and tool calls are valid.

    A system message comes first or not at all; user and assistant alternate; the last message is the assistant's.

    Raises:
        BadRow: a message is not valid.
    """
    if not turns:
        raise BadRow("the chat has no messages")
    has_calls = any(turn.calls for turn in turns)
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        message = _message(turn, number, has_calls=has_calls)
        if turn.reasoning:
            _refuse_nul(turn.reasoning, f"message {number}: reasoning:")
            message["reasoning_content"] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = fitting_calls(list(turn.calls), tools, f"message {number}: tool_calls")
        if has_calls and message["role"] == "tool":
            _add_origin(message, turn, messages, number)
        messages.append(message)
    speakers = [message["role"] for message in messages if message["role"] not in ("system", "tool")]
    if not speakers or speakers[0] != "user":
        raise BadRow("the first message (after the system message) must be a user message")
    if messages[-1]["role"] != "assistant":
        raise BadRow(f"the last message has the role {messages[-1]['role']}; expected assistant")
    for number, (speaker, following) in enumerate(itertools.pairwise(speakers), 1):
        if speaker == following == "user":
            raise BadRow(f"two user messages in a row (turns {number} and {number + 1})")
    if tools is not None:
        messages[0]["tools"] = tools
    return messages


def plain_messages(turns: JsonValue) -> list[Message] | None:
    """Return the chat of the most frequent kind of row, as all checks would; None for every other row.

    These are texts of user and assistant in turn, which `checked_messages` accepts. This saves half of the time of reading a
    file.
    """
    if not isinstance(turns, list) or not turns:
        return None
    has_system = len(turns) % 2 == 1  # else the last message is not the assistant's
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        role = "assistant" if (number + has_system) % 2 else "user"
        if has_system and number == 0:
            role = "system"
        if not isinstance(turn, dict) or len(turn) != 2 or turn.get("role") != role:
            return None
        content = turn.get("content")
        if not isinstance(content, str) or not content or content.isspace() or content[0] == "#" or "\0" in content:
            return None
        messages.append({"role": ROLES[role], "content": content})
    return messages if len(messages) > 1 else None


def _message(turn: Turn, number: int, *, has_calls: bool) -> Message:
    role, content = turn.role, turn.content
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"message {number}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    may_be_empty = role == "system" or bool(turn.calls) or (role == "tool" and has_calls)
    if content is None and may_be_empty:
        content = ""
    if role == "tool" and isinstance(content, dict):  # a result that is JSON
        content = json.dumps(content, ensure_ascii=False, default=str)
    if not isinstance(content, str):
        raise BadRow(f"message {number}: content is {type(content).__name__}; expected text")
    if not content.strip() and not may_be_empty:
        raise BadRow(f"message {number}: an empty {role} message")
    refuse_error_value(content, f"message {number}:")
    _refuse_nul(content, f"message {number}:")
    if role == "system" and number != 1:
        raise BadRow(f"message {number}: a system message must be the first message")
    return {"role": ROLES[role], "content": content}  # one text for all rows, which saves memory


def _refuse_nul(text: str, where: str) -> None:
    if "\0" in text:
        raise BadRow(f"{where} a NUL character (U+0000) at character {text.index(chr(0)) + 1}")


def _add_origin(message: Message, turn: Turn, before: list[Message], number: int) -> None:
    calls = next((m.get("tool_calls", []) for m in reversed(before) if m["role"] != "tool"), [])
    if not calls:
        raise BadRow(f"message {number}: a tool's result that does not follow a call")
    if isinstance(turn.call_id, str) and turn.call_id:
        identifiers = [call["id"] for call in calls if "id" in call]
        if identifiers and turn.call_id not in identifiers:
            raise BadRow(f"message {number}: tool_call_id {turn.call_id!r} is not among the calls before it")
        message["tool_call_id"] = turn.call_id
    if isinstance(turn.name, str) and turn.name:
        if turn.name not in (names := [call["function"]["name"] for call in calls]):
            raise BadRow(f"message {number}: name {turn.name!r} is not a tool that was called: {', '.join(names)}")
        message["name"] = turn.name


def messages_with_tools(fields: RowFields, turns: list[Turn], of_dataset: list[Tool] | None) -> list[Message]:
    """Return the checked messages of a chat, whose first has the tools that the template writes.

    A row's own tools replace those of the dataset. Hermes' rows have them in the system message too, as the template would
    write them: they are not written twice.

    Raises:
        BadRow: a message or a tool is not valid, or the row has two lists of tools.
    """
    tools, key_of_tools = of_dataset, None
    if fields.tools is not None:
        tools = read_tools(fields.tools, "system")
    for key in ("tools", "functions", "available_tools", "toolConfig"):
        value = fields.row.get(key)
        if key == "toolConfig":  # Bedrock's; Gemini's has no tools
            value = value.get("tools") if isinstance(value, dict) else None
        if has_value(value) and (found := read_tools(value, key)) is not None:
            if fields.tools is not None and found != tools:
                raise BadRow(f"{key} and the system message have different tools: remove one")
            tools, key_of_tools = found, key
            break
    messages = checked_messages(turns, tools)
    if tools is not None and _has_tools(turns, tools):
        messages[0].pop("tools", None)
    elif key_of_tools is not None:
        fields.value(key_of_tools)
    return messages


def _has_tools(turns: list[Turn], tools: list[Tool]) -> bool:
    """Tell whether the system message has tools: the name of each, in quotes or tags, in <tools> … </tools>."""
    system = turns[0].content if turns and turns[0].role == "system" else None
    if not isinstance(system, str) or "<tools>" not in system:
        return False
    written = " ".join(_TOOLS.findall(system))
    names = (re.escape(tool["function"]["name"]) for tool in tools)
    return all(re.search(rf"""["'>]{name}["'<]""", written) for name in names)
