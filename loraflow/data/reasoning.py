"""The reasoning of answers: the keys that hold it beside the content, and its removal (data.thinking: strip)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from loraflow.data.chats import Message
from loraflow.data.readers import Row

# The opening tag may be missing: some prompts end with it. Templates that cut reasoning look for the last closing tag too.
_REASONING = re.compile(r".*(?:</think>|\[/THINK\])\s*", re.DOTALL)
# Of a message, beside its content. A text is rendered; templates read it as reasoning_content or as thinking.
KEYS = ("reasoning_content", "reasoning", "thinking")
NOT_RENDERED = "would not be learned: put it into content, as <think> … </think>, or leave it out: data.thinking: strip"


def with_thinking(row: Row, thinking: Literal["strip"] | None) -> Row:
    """Return a row as data.thinking wants it: without its reasoning, or malformed if its reasoning would not be learned.

    Args:
        row: as read.
        thinking: whether reasoning is removed.
    """
    if row.messages is None:
        return row
    if thinking == "strip":
        messages = without_reasoning(row.messages)
        if any(not m["content"].strip() for m in messages if m["role"] == "assistant" and "tool_calls" not in m):
            return replace(row, messages=None, problem="an answer is empty without its reasoning (data.thinking)")
        return replace(row, messages=messages)
    if reasoning := reasoning_key(row.unused_keys):
        return replace(row, messages=None, problem=f"{reasoning} {NOT_RENDERED}")
    return row


def reasoning_key(unused_keys: Sequence[str]) -> str | None:
    """Return the key of messages whose reasoning is not read, because it is no text of an answer; None if there is none."""
    return next((key for key in unused_keys if "." in key and key.rpartition(".")[2] in KEYS), None)


def without_reasoning(chat: Sequence[Message]) -> list[Message]:
    """Return a chat whose answers have no reasoning: neither `<think> … </think>` or `[THINK] … [/THINK]` before the
    answer, nor a text beside it.
    """
    return [_without(message) if message["role"] == "assistant" else message for message in chat]


def _without(message: Message) -> Message:
    stripped: Message = {**message, "content": _REASONING.sub("", message["content"], count=1)}
    stripped.pop("reasoning_content", None)
    return stripped
