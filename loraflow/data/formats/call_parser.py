"""Find the tool calls in an answer's text, in the formats of common chat templates.

- Qwen's and Hermes': `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, several of them; the tags may be missing, since
  they are control tokens of some tokenizers, which decoding leaves out;
- Qwen 3.5's: `<tool_call><function=NAME><parameter=KEY>VALUE</parameter>…</function></tool_call>`;
- Llama 3's: `{"name": …, "parameters": {…}}`, after `<|python_tag|>` or not;
- Mistral's: `[TOOL_CALLS] [{"name": …, "arguments": {…}}]`, or `[TOOL_CALLS]NAME[ARGS]{…}`.
"""

import json
import re

from pydantic import JsonValue

from loraflow.data.chats import CalledFunction

_TAGS = re.compile(r"</?tool_call>|\[/?TOOL_CALLS\]|<\|python_tag\|>|<think>.*?</think>", re.DOTALL)
_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)</function>", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_WITH_ARGS = re.compile(r"\s*([\w.-]+)\[ARGS\]\s*")
_CALL_KEY = re.compile(r'\s*\[?\s*\{\s*"(?:name|type|function|arguments|parameters)"')
_decoder = json.JSONDecoder()


def parse_calls(text: str) -> list[CalledFunction] | None:
    """Return the calls of an answer: none if it is text; None if it begins a call that cannot be read."""
    if found := _FUNCTION.findall(text):
        return [
            {"name": name.strip(), "arguments": dict(map(_parameter, _PARAMETER.findall(body)))} for name, body in found
        ]
    is_tagged = _TAGS.search(text) is not None and "</think>" not in text
    plain = _TAGS.sub(" ", text)
    start = _start(plain)
    if start is None:
        return None if is_tagged or "<function=" in text else []
    calls: list[CalledFunction] = []
    at, is_call = start, False
    while at < len(plain):
        named = _WITH_ARGS.match(plain, at)
        begin = named.end() if named else _skip(plain, at)
        if begin == len(plain):
            break
        try:
            value, at = _decoder.raw_decode(plain, begin)
        except (ValueError, RecursionError):
            begins_call = is_tagged or is_call or named is not None or _CALL_KEY.match(plain, begin) is not None
            return None if begins_call else []
        values: list[JsonValue] = value if isinstance(value, list) else [value]
        for item in values:
            call = _call({"name": named[1], "arguments": item} if named else item)
            if call is None:
                return None if is_tagged or is_call else []
            is_call = True
            calls.append(call)
    return calls


def _start(text: str) -> int | None:
    """Return where JSON begins: at the start of the text or of a line."""
    found = re.compile(r"(?:\A|\n)\s*(?=[\[{]|[\w.-]+\[ARGS\])").search(text)
    return found.end() if found else None


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n;,":
        at += 1
    return at


def _call(value: JsonValue) -> CalledFunction | None:
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters", {}))
    return {"name": name, "arguments": arguments} if isinstance(name, str) and isinstance(arguments, dict) else None


def _parameter(found: tuple[str, str]) -> tuple[str, JsonValue]:
    key, text = found
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    return key.strip(), value
