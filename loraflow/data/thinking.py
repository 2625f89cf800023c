"""Rows as data.thinking wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from loraflow.data.readers import Row
from loraflow.data.reasoning import KEYS, without_reasoning

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
