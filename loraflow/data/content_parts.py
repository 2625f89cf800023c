"""Contents of messages that are lists of parts: texts, reasoning, calls of tools and their results.

Anthropic, Bedrock, Gemini, Mistral and OpenAI's Responses API have such parts, each under names of its own.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

from pydantic import JsonValue

from loraflow.data.chats import BadRow, ToolCall
from loraflow.data.tools import read_calls

_TEXTS = frozenset({"text", "input_text", "output_text"})
_REASONING = frozenset({"thinking", "reasoning"})
_CALLS = frozenset({"tool_use", "tool_call", "function_call"})
# The only key of a part of Bedrock or Gemini → its type
_KEYS = {
    "reasoningContent": "reasoning",
    "toolUse": "tool_use",
    "functionCall": "tool_use",
    "toolResult": "tool_result",
    "functionResponse": "tool_result",
}
_KINDS = _TEXTS | _REASONING | _CALLS | {"tool_result"}
_MEDIA = re.compile(r"(?:input_)?(?:image|audio|video|document|file)")
_IDS = ("tool_use_id", "toolUseId", "call_id", "id")


@dataclass(frozen=True, slots=True)
class Result:
    """A tool's result."""

    text: str
    call_id: JsonValue = None
    name: JsonValue = None


@dataclass(slots=True)
class Parts:
    """What the parts of a message are."""

    texts: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    unread: list[dict[str, JsonValue]] = field(default_factory=list)  # the keys of each part that were not read


def read_parts(content: list[JsonValue], where: str) -> Parts:
    """Read a message's parts, such as [{"type": "text", "text": "Look."}, {"type": "tool_use", "name": …, "input": …}].

    Args:
        content: the parts.
        where: the message, for the problem's text.

    Raises:
        BadRow: a part is of another type, or the parts are not in the order of templates: reasoning, text, calls; or
            results, text.
    """
    parts, order, last = Parts(), 0, ""
    for part in content:
        if not isinstance(part, dict):
            raise BadRow(f"{where}: content is a list; expected text, or parts of type text")
        kind, body = _kind(part)
        if kind in _TEXTS:
            rank, text = 2, _first(body, "text", "content", "value")
            if not isinstance(text, str):
                raise BadRow(f"{where}: a part of type {kind} without text")
            parts.texts.append(text)
        elif kind in _REASONING:
            rank = 1
            parts.reasoning.append(_reasoning(body, where))
        elif kind in _CALLS:
            rank = 3
            parts.calls += read_calls([_as_call(body)], f"{where}: {kind}")
        elif kind == "tool_result":
            rank = 1
            name, identifier = body.get("name"), _first(body, *_IDS)
            parts.results.append(
                Result(_result(_first(body, "content", "response", "output"), where), identifier, name)
            )
        else:
            raise BadRow(f"{where}: a part of type {kind}; only text is supported")
        if rank < order:
            raise BadRow(
                f"{where}: a part of type {kind} after one of {last}; expected reasoning, text, calls in this order"
            )
        order, last = rank, kind
        parts.unread.append(_unread(part, kind))
    return parts


def _kind(part: dict[str, JsonValue]) -> tuple[str, dict[str, JsonValue]]:
    """Return the type of a part, and the object that has its members."""
    kind = part.get("type")
    if isinstance(kind, str):
        return kind, part
    if isinstance(part.get("text"), str):  # Bedrock's and Gemini's
        return "text", part
    keys = [key for key, value in part.items() if value is not None]
    found = _KEYS.get(keys[0]) if len(keys) == 1 else None
    if found is None:
        return str(kind), part
    body = part[keys[0]]
    return found, body if isinstance(body, dict) else part


def _first(body: dict[str, JsonValue], *names: str) -> JsonValue:
    return next((body[name] for name in names if body.get(name) is not None), None)


def _reasoning(body: dict[str, JsonValue], where: str) -> str:
    """Return a reasoning's text: Anthropic's, Mistral's list of texts, or Bedrock's reasoningText."""
    value = _first(body, "thinking", "reasoning", "text", "reasoningText")
    if isinstance(value, list):
        return "".join(read_parts(value, where).texts)
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise BadRow(f"{where}: a part with reasoning that is no text")
    return text


def _as_call(body: dict[str, JsonValue]) -> dict[str, JsonValue]:
    return {**body, "id": _first(body, "id", "toolUseId", "call_id")}


def is_parts(content: JsonValue) -> bool:
    """Tell whether a value is a list of parts, and not a tool's result that is a list."""
    return isinstance(content, list) and any(
        isinstance(part, dict) and (_kind(part)[0] in _KINDS or _has_media(part)) for part in content
    )


def _has_media(part: dict[str, JsonValue]) -> bool:
    return _MEDIA.match(str(part.get("type", next(iter(part), "")))) is not None


def _result(value: JsonValue, where: str) -> str:
    """Return a result as text: parts of text are joined, anything else is written as JSON."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list) and is_parts(value):
        return "".join(read_parts(value, f"{where}: tool_result").texts)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].keys() == {"json"}:
        value = value[0]["json"]  # Bedrock's
    return as_json(value)


def as_json(value: JsonValue) -> str:
    """Return a value as the text of a tool's result."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _unread(part: dict[str, JsonValue], kind: str) -> dict[str, JsonValue]:
    """Return the keys of a part that say something else, such as cache_control, is_error and marks."""
    if kind not in _TEXTS | _REASONING:
        return {key: value for key, value in part.items() if key in ("is_error", "status", "cache_control")}
    read = {"type", *_TEXTS, *_REASONING, "content", "value", "reasoningContent", "signature"}
    return {key: value for key, value in part.items() if key not in read}
