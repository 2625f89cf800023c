"""Tool calls of an answer in the shape of OpenAI's API, and the parser by which a server of vLLM finds them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, TypedDict

from loraflow.data.chats import Chat, Message
from loraflow.data.formats.call_parser import parse_calls
from loraflow.failures import BadModel

if TYPE_CHECKING:
    import pyarrow as pa

    from loraflow.data.tokens.loss_mask import ChatTemplate


class WrittenFunction(TypedDict):
    """The function of a call. As in OpenAI's API, its arguments are JSON text."""

    name: str
    arguments: str


class WrittenCall(TypedDict):
    """A call. Its id has nine letters and digits, as Mistral's templates ask for."""

    id: str
    type: str  # function
    function: WrittenFunction


# Values of vLLM's option --tool-call-parser, by the texts that a chat template has, all of them. The first that fits counts.
_VLLM_PARSERS = (
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>", "<arg_value>"), "glm45"),
    (("<tool_call>", "arguments"), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>", "<|start_header_id|>", '"parameters": '), "llama3_json"),
    (("<|start_header_id|>", "ipython", '"parameters": '), "llama3_json"),
    (("<|channel|>", "<|call|>", "functions."), "openai"),
)


def written_calls(text: str, chat: Chat) -> list[WrittenCall] | None:
    """Return the calls of an answer; None if there are none, or if a call is begun that cannot be read.

    Args:
        chat: the prompt. The ids of calls are hashes of both, so a repeated prediction has the same ones.
    """
    called = parse_calls(text)
    if not called:
        return None
    seed = json.dumps([chat, text], ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
    found: list[WrittenCall] = []
    for number, function in enumerate(called):
        identifier = hashlib.sha256(number.to_bytes(4) + seed).hexdigest()[:9]
        arguments = json.dumps(function["arguments"], ensure_ascii=False)
        found.append(
            {"id": identifier, "type": "function", "function": {"name": function["name"], "arguments": arguments}}
        )
    return found


def reads_calls_of(template: ChatTemplate) -> bool:
    """Tell whether the calls that a chat template writes are found in its text again."""
    question: Message = {
        "role": "user",
        "content": "When?",
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_time",
                    "description": "Get the time.",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ],
    }
    answer: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"type": "function", "function": {"name": "get_time", "arguments": {"city": "Rome"}}, "id": "call00001"}
        ],
    }
    try:
        (text,) = template.answer_texts([[question, answer]])
    except BadModel:  # a template without tools
        return False
    return parse_calls(text) == [answer["tool_calls"][0]["function"]]


def vllm_parser(template: str) -> str | None:
    """Return the value of vLLM's option --tool-call-parser for a chat template; None if it is not known.

    See https://docs.vllm.ai/en/latest/features/tool_calling.html.
    """
    return next((parser for texts, parser in _VLLM_PARSERS if all(text in template for text in texts)), None)


def calls_type() -> pa.DataType:
    """Return the type of a Parquet column of calls."""
    import pyarrow as pa

    function = pa.struct({"name": pa.string(), "arguments": pa.string()})
    return pa.list_(pa.struct({"id": pa.string(), "type": pa.string(), "function": function}))
