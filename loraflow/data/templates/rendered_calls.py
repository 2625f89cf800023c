"""Tools and tool calls in a rendered chat: what a template renders of them. Refuse chats of which it
leaves out or changes a part.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pydantic import JsonValue

from loraflow.data.chats import Chat, Message, ToolCall
from loraflow.failures import BadModel

# Tokens that close an answer with a call in templates that close other answers differently: Llama's, gpt-oss's, GLM's,
# Gemma 4's, Apertus'.
CALL_ENDS = ("<|eom_id|>", "<|call|>", "<|observation|>", "<|tool_response>", "<|tools_suffix|>")


def missing_part(rendered: str, message: Message) -> str | None:
    """Return a part of an answer with calls that is missing in its rendered text; None if all of it is there.

    The calls must be rendered in their order, each with its name, and with the names and values of its arguments.
    """
    if message["content"].strip() not in rendered:
        return message["content"]
    at = 0
    for call in message.get("tool_calls", []):
        name = call["function"]["name"]
        found = rendered.find(name, at)
        if found < 0:
            return f"the call of {name}"
        at = found + len(name)
        if (part := _missing_argument(rendered[found:], call)) is not None:
            return f"{name}: {part}"
    return None


def _missing_argument(rendered: str, call: ToolCall) -> str | None:
    for text in _leaves(call["function"]["arguments"]):
        if not any(form in rendered for form in _forms(text.strip())):
            return text
    return None


def _leaves(value: JsonValue) -> Iterator[str]:
    """Yield the texts of a value that a rendering of it must contain."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif value is not None and not isinstance(value, bool):  # a template may write None and True, or null and true
        yield json.dumps(value)


def _forms(text: str) -> Iterator[str]:
    """Yield a text as templates write it: as it is, or in JSON, with or without escapes of other than ASCII letters."""
    yield text
    for ascii_only in (False, True):
        encoded = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        yield encoded
        yield json.dumps(encoded)[1:-1]  # JSON in JSON


def has_text(rendered: str, text: str) -> bool:
    """Tell whether a rendered chat contains a text, as it is or in JSON; the template may trim white space at its ends."""
    return any(form in rendered for form in _forms(text.strip()))


def call_end(text: str, start: int, ends: Sequence[str]) -> int | None:
    """Return where an answer with calls ends that starts at `start`: behind the first of the tokens that end answers."""
    found = re.compile("|".join(map(re.escape, ends))).search(text, start) if ends else None
    return found.end() if found else None


def without_tools(chat: Chat) -> list[Message]:
    """Return a chat without its tools."""
    first = chat[0].copy()
    first.pop("tools", None)
    return [first, *chat[1:]]


def call_text(message: Message) -> str:
    """Return what a message has beside its content, to look for control tokens in it: its reasoning, its calls as JSON."""
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if "tool_calls" in message else ""
    return message.get("reasoning_content", "") + calls


def tools_text(message: Message) -> str:
    """Return the tools of a chat as JSON text, which its first message has."""
    return json.dumps(message["tools"], ensure_ascii=False) if "tools" in message else ""


def refuse_left_out(chats: Sequence[Chat], texts: Sequence[str]) -> None:
    """Refuse messages that the template does not render. Questions and answers have checks of their own.

    Raises:
        BadModel: there is one. The failure's details have the number of the chat.
    """
    for number, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        for message in chat:
            if message["role"] in ("system", "tool") and not has_text(text, message["content"]):
                raise _failure(
                    f"The chat template leaves out or changes a part of {message['role']} messages.",
                    number,
                    f"remove {message['role']} messages from the dataset, or correct the template",
                    got=message["content"][:_SHOWN],
                )
            if "tool_calls" in message and (missing := missing_part(text, message)) is not None:
                raise _failure(_LOST_CALL, number, f"{_OTHER_TOOLS} these rows", got=missing[:_SHOWN])


def refuse_cut_questions(chats: Sequence[Chat], texts: Sequence[str]) -> None:
    """Refuse questions that the template does not render completely.

    Raises:
        BadModel: there is one. The failure's details have the number of the chat.
    """
    for number, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        for message in chat:
            if message["role"] == "user" and not has_text(text, message["content"]):
                raise _failure(
                    "The chat template leaves out or changes a part of a question, so the model would not see it.",
                    number,
                    "correct the template, name another one (base.chat_template), or remove these rows",
                    got=message["content"][:_SHOWN],
                )


def refuse_other_text(texts: Sequence[str], marked: Sequence[str]) -> None:
    """Refuse a training template that renders another text than the template that a server uses.

    Raises:
        BadModel: a text differs. The failure's details have the number of the chat.
    """
    for number, (served, trained) in enumerate(zip(texts, marked, strict=True)):
        if served != trained:
            at = len(os.path.commonprefix([served, trained]))  # noqa: RUF071 (letters, not folders)
            raise _failure(
                "The training template renders another text than the model's own template, which serves it.",
                number,
                "remove base.chat_template; or write the template without {% generation %} blocks, to serve it",
                f"{served[max(0, at - 30) : at + 40]!r}, the first difference at character {at}",
                repr(trained[max(0, at - 30) : at + 40]),
                "base.chat_template",
            )


def refuse_ignored_tools(
    chats: Sequence[Chat], texts: Sequence[str], render: Callable[[Sequence[Chat]], Sequence[str]]
) -> None:
    """Refuse tools that the template does not render. `render` is the function that rendered `texts`.

    Raises:
        BadModel: a chat is rendered as without its tools. The failure's details have the number of the chat.
    """
    numbers = [number for number, chat in enumerate(chats) if "tools" in chat[0]]
    if not numbers:
        return
    without = render([without_tools(chats[number]) for number in numbers])
    for number, plain in zip(numbers, without, strict=True):
        names = [tool["function"]["name"] for tool in chats[number][0]["tools"]]
        lost = next((name for name in names if name not in texts[number]), None)
        if plain == texts[number] or lost is not None:
            what = "The chat template leaves out the tools of a chat, so the model would not know what it can call."
            raise _failure(what, number, f"{_OTHER_TOOLS} the tools", got=f"the tools {', '.join(names[:8])}")


_SHOWN = 80  # characters of a text in a message
_LOST_CALL = "The chat template leaves out a tool call, or a part of it."
_OTHER_TOOLS = "choose a base whose chat template knows tools, name another template (base.chat_template), or remove"


def _failure(
    what: str, chat: int, next_step: str, expected: str = "", got: str = "", where: str = "chat_template"
) -> BadModel:
    """Return the failure for the chat with a number."""
    return BadModel(what, where=where, expected=expected, got=got, next_step=next_step, chat=chat)


# Refuse chats whose answers cannot be learned as a chat template renders them.


@dataclass(frozen=True)
class AnswerTurn:
    """Which answer of which chat."""

    chat: int
    message: int
    number: int  # of the answer, from 1
    of: int  # answers in the chat
    is_last: bool

    def __str__(self) -> str:
        return f"answer {self.number} of {self.of}" if self.of > 1 else "the answer"


class CutAnswer(Exception):
    """The template does not render an answer completely."""

    def __init__(self, content: str, rendered: str, *, is_reasoning: bool = False):
        super().__init__("the answer is not rendered completely")
        self.content, self.rendered = content, rendered
        self.is_reasoning = is_reasoning or "</think>" in content or "[/THINK]" in content


def refuse_cut(cut: CutAnswer, turn: AnswerTurn) -> NoReturn:
    """Refuse an answer that the template does not render completely."""
    ways = []
    if not turn.is_last:
        ways.append("data.loss_on: last_assistant learns the last answer only")
    if cut.is_reasoning:
        if not turn.is_last:
            ways.append("data.thinking: keep learns only the answers that are rendered completely")
        ways.append("data.thinking: strip removes the reasoning from all answers")
    ways.append("base.chat_template names another template")
    raise _failure(
        "The chat template leaves out or changes a part of an answer, so the model would learn another answer.",
        turn.chat,
        "; ".join(ways),
        repr(cut.content[:_SHOWN]),
        f"{turn}: {cut.rendered[:_SHOWN]!r}",
    ) from cut


def refuse_missing_call(rendered: str, message: Message, turn: AnswerTurn) -> None:
    """Refuse an answer whose calls the template does not render completely.

    Raises:
        BadModel: a part is missing.
    """
    if (missing := missing_part(rendered, message)) is not None:
        got = f"{turn}: {rendered[:_SHOWN]!r}"
        raise _failure(_LOST_CALL, turn.chat, f"{_OTHER_TOOLS} these rows", missing[:_SHOWN], got)


def refuse_prompt(text: str, head: str, turn: AnswerTurn) -> NoReturn:
    """Refuse an answer that does not follow the prompt that a server sends."""
    at = len(os.path.commonprefix([text, head]))  # noqa: RUF071 (letters, not folders)
    ways = [] if turn.is_last else ["data.loss_on: last_assistant learns the last answer only"]
    if re.search("think|thought", head[max(0, at - 10) :].lower()):
        ways.append("data.thinking: empty serves a prompt without reasoning")
        ways.append("base.chat_template names another template")
    else:
        ways.append(
            "make add_generation_prompt add exactly the text before an answer, and put {% generation %} after it"
        )
    raise _failure(
        "The chat template renders prompts differently in training and in generation, so the model would see prompts that "
        "it was not trained on.",
        turn.chat,
        "; ".join(ways),
        f"{turn} after the prompt that a server sends, which ends with {head[max(0, at - 20) :][:_SHOWN]!r}",
        repr(text[max(0, at - 20) : at + 60]),
    )


def refuse_open(following: str, turn: AnswerTurn) -> NoReturn:
    """Refuse an answer that no control token ends."""
    what = "The chat template does not end an answer with a control token, so the model would not learn to stop."
    way = (
        "choose an instruct model, or add the stop token to its chat template. If it is there, name it as eos_token in "
    )
    way += "tokenizer_config.json: tokenizer.json does not call it special"
    raise _failure(what, turn.chat, way, got=repr(following))


def refuse_ignored_prompt(inserted: str, turn: AnswerTurn) -> NoReturn:
    """Refuse a template that ignores add_generation_prompt, and writes a text before an answer."""
    raise _failure(
        "The chat template does not render an answer right after the rendered prompt, because it ignores "
        "add_generation_prompt: a server would not ask for an answer.",
        turn.chat,
        "add the start of an answer to the template, for add_generation_prompt",
        got=repr(inserted[:_SHOWN]),
    )


def refuse_unmarked(turn: AnswerTurn) -> NoReturn:
    """Refuse a template with {% generation %} blocks that has none around an answer."""
    way = "put {% generation %} … {% endgeneration %} around every answer in chat_template.jinja"
    raise _failure("The chat template does not mark the answer of a chat.", turn.chat, way, got=str(turn))
