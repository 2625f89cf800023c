"""The roles of messages, in the spellings of published datasets."""

from __future__ import annotations

from pydantic import JsonValue

FUNCTION_CALL = "function_call"  # ShareGPT's role of an answer that is a call; ms-swift's tool_call
ASSISTANT, TOOL = "assistant", "tool"
ROLES = {
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "model", "bing", "bot", "chatbot", "ai"), ASSISTANT),
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("system", "developer"), "system"),  # developer: OpenAI's newer name
    **dict.fromkeys(
        ("tool", "observation", "function", "ipython", "tool_response", "tool_result", "function_response"), TOOL
    ),
    **dict.fromkeys((FUNCTION_CALL, "tool_call"), FUNCTION_CALL),
}


def normal_role(value: JsonValue) -> JsonValue:
    """Return a role as user, assistant, system or tool, for `Human`, `gpt` and the like; an unknown role unchanged."""
    if not isinstance(value, str):
        return value
    return ROLES.get(value) or ROLES.get(value.strip().lower(), value)
