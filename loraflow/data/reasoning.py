"""Remove the reasoning from answers (data.thinking: strip)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from loraflow.data.chats import Message

# The opening tag may be missing: some prompts end with it. Templates that cut reasoning look for the last closing tag too.
_REASONING = re.compile(r".*(?:</think>|\[/THINK\])\s*", re.DOTALL)


def without_reasoning(chat: Sequence[Message]) -> list[Message]:
    """Return a chat whose answers have no reasoning: `<think> … </think>` or `[THINK] … [/THINK]` before the answer."""
    return [
        {**message, "content": _REASONING.sub("", message["content"], count=1)}
        if message["role"] == "assistant"
        else message
        for message in chat
    ]
