"""The reasoning of answers: the keys that hold it beside the content, and its removal (data.thinking: strip)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraflow.data.chats import Message

# The opening tag may be missing: some prompts end with it. Templates that cut reasoning look for the last closing tag too.
_REASONING = re.compile(r".*(?:</think>|\[/THINK\])\s*", re.DOTALL)
# Of a message, beside its content. A text is rendered; templates read it as reasoning_content or as thinking.
KEYS = ("reasoning_content", "reasoning", "thinking")


def without_reasoning(chat: Sequence[Message]) -> list[Message]:
    """Return a chat whose answers have no reasoning: neither `<think> … </think>` or `[THINK] … [/THINK]` before the
    answer, nor a text beside it.
    """
    return [_without(message) if message["role"] == "assistant" else message for message in chat]


def _without(message: Message) -> Message:
    stripped: Message = {**message, "content": _REASONING.sub("", message["content"], count=1)}
    stripped.pop("reasoning_content", None)
    return stripped
