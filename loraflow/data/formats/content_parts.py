"""Contents of messages that are lists of parts: texts, reasoning, calls of tools and their results.

Anthropic, Bedrock, Gemini, Mistral and OpenAI's Responses API have such parts, each under names of its own.
"""

import json
import re
from dataclasses import dataclass, field

from pydantic import JsonValue

from loraflow.data.chats import BadRow, ToolCall
from loraflow.data.formats.tools import CALL_KEYS, MAX_DEPTH, is_deep, read_calls

_TEXTS = frozenset({"text", "input_text", "output_text"})
_REASONING = frozenset({"thinking", "reasoning"})
_CALLS = frozenset({"tool_use", "tool_call", "function_call"})
# The only key of a part of Bedrock or Gemini → its type
_KEYS = {
    "reasoningContent": "reasoning",
    "toolUse": "tool_use",
    "toolResult": "tool_result",
    **dict.fromkeys(("functionCall", "function_call"), "tool_use"),
    **dict.fromkeys(("functionResponse", "function_response"), "tool_result"),
    **{key: key for key in ("image", "audio", "video", "document")},
    **dict.fromkeys(("inlineData", "inline_data", "fileData", "file_data"), "file"),
}
_KINDS = _TEXTS | _REASONING | _CALLS | {"tool_result"}
_MEDIA = re.compile(r"(?:input_)?(?:image|audio|video|document|file)(?:_url)?")
_IDS = ("tool_use_id", "toolUseId", "call_id", "id")
_SIGNS = frozenset({"type", "thought", "signature", "thoughtSignature", "thought_signature"})  # that are no text


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

    Raises:
        BadRow: a part is of another type, or the parts are not in the order of templates: reasoning, text, calls; or
            results, text.
    """
    if is_deep(content):
        raise BadRow(f"{where}: parts are nested too deeply; at most {MAX_DEPTH} levels")
    parts, order, last = Parts(), 0, ""
    for part in content:
        if not isinstance(part, dict):
            raise BadRow(f"{where}: content is a list; expected text, or parts of type text")
        kind, body = _kind(part)
        if kind in _TEXTS:
            rank, read = 2, [_key(body, "text", "content", "value")]
            if not isinstance(text := body.get(read[0]), str):
                raise BadRow(f"{where}: a part of type {kind} without text")
            parts.texts.append(text)
        elif kind in _REASONING:
            rank, read = 1, [_key(body, "thinking", "reasoning", "text", "reasoningText", "content")]
            parts.reasoning.append(reasoning_text(body.get(read[0]), f"{where}: a part of type {kind}"))
        elif kind in _CALLS:
            rank, read = 3, [*CALL_KEYS, *_IDS]
            call = {**body, "id": body.get(_key(body, "id", "toolUseId", "call_id"))}
            parts.calls += read_calls([call], f"{where}: {kind}")
        elif kind == "tool_result":
            rank, read = 1, ["name", _key(body, *_IDS), _key(body, "content", "response", "output")]
            name, identifier, result = (body.get(key) for key in read)
            parts.results.append(Result(_result(result, f"{where}: {kind}"), identifier, name))
        else:
            of_kind = f"of type {kind}" if kind else f"with the keys {', '.join(body) or '(none)'}"
            raise BadRow(f"{where}: a part {of_kind}; only text is supported")
        if rank < order:
            raise BadRow(
                f"{where}: a part of type {kind} after one of {last}; expected reasoning, text, calls in this order"
            )
        order, last = rank, kind
        parts.unread.append({key: value for key, value in body.items() if key not in read and key not in _SIGNS})
    return parts


def _kind(part: dict[str, JsonValue]) -> tuple[str, dict[str, JsonValue]]:
    """Return the type of a part, and the object that has its members; without a type, all its keys must be known."""
    if part.get("thought") is True:  # Gemini's
        return "reasoning", part
    if (kind := part.get("type")) is not None:
        return str(kind), part
    keys = (
        {key for key, value in part.items() if key == "text" or value not in (None, "", [], {})}
        - _SIGNS
        - {"cachePoint"}
    )
    if keys == {"text"}:
        return "text", part
    kind, body = next(((_KEYS.get(key, ""), part[key]) for key in keys if len(keys) == 1), ("", None))
    return (kind, body) if kind and isinstance(body, dict) else ("", part)


def _key(body: dict[str, JsonValue], *names: str) -> str:
    return next((name for name in names if body.get(name) is not None), "")


def reasoning_text(value: JsonValue, where: str) -> str:
    """Return a reasoning's text: a text, a list of texts, parts with texts or reasoning, or Bedrock's reasoningText.

    Raises:
        BadRow: it is something else.
    """
    if isinstance(value, dict):
        value = value.get("text")
    if is_texts(value):
        return "".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, list):
        parts = read_parts(value, where)
        if not parts.calls and not parts.results:
            return "".join((*parts.reasoning, *parts.texts))
    raise BadRow(f"{where}: reasoning that is no text")


def is_texts(value: JsonValue) -> bool:
    """Tell whether a value is a text or a list of texts."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def is_parts(content: JsonValue) -> bool:
    """Tell whether a value is a list of parts, and not a tool's result that is a list."""
    kinds = [_kind(part)[0] for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return any(kind in _KINDS or _MEDIA.fullmatch(kind) for kind in kinds)


def _result(value: JsonValue, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or value == []:
        return ""
    if isinstance(value, list) and is_parts(value):
        parts = read_parts(value, where)
        if parts.calls or parts.reasoning or parts.results:
            raise BadRow(f"{where}: expected parts of type text")
        return "".join(parts.texts)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and value[0].keys() == {"json"}:
        value = value[0]["json"]  # Bedrock's
    return as_json(value)


def as_json(value: JsonValue) -> str:
    """Return a value as the text of a tool's result."""
    return json.dumps(value, ensure_ascii=False, default=str)
