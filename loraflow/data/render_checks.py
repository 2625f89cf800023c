"""Refuse chats of which a chat template leaves out or changes a part. The checks of answers are in `answer_spans`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from loraflow.data.chats import Chat
from loraflow.data.rendered_calls import has_text, missing_part, without_tools
from loraflow.failures import BadModel


def refuse_left_out(chats: Sequence[Chat], texts: Sequence[str]) -> None:
    """Refuse messages that the template does not render. Questions and answers have checks of their own.

    Raises:
        BadModel: there is one. The failure's details have the number of the chat.
    """
    for number, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        for message in chat:
            if message["role"] in ("system", "tool") and not has_text(text, message["content"]):
                raise BadModel(
                    f"The chat template leaves out or changes a part of {message['role']} messages.",
                    where="chat_template",
                    got=message["content"][:80],
                    next_step=f"remove {message['role']} messages from the dataset, or correct the template",
                    chat=number,
                )
            if "tool_calls" in message and (missing := missing_part(text, message)) is not None:
                raise BadModel(
                    "The chat template leaves out a tool call, or a part of it.",
                    where="chat_template",
                    got=missing[:80],
                    next_step="choose a base whose chat template knows tools, name another template (base.chat_template), "
                    "or remove these rows",
                    chat=number,
                )


def refuse_cut_questions(chats: Sequence[Chat], texts: Sequence[str]) -> None:
    """Refuse questions that the template does not render completely.

    Raises:
        BadModel: there is one. The failure's details have the number of the chat.
    """
    for number, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        for message in chat:
            if message["role"] == "user" and not has_text(text, message["content"]):
                raise BadModel(
                    "The chat template leaves out or changes a part of a question, so the model would not see it.",
                    where="chat_template",
                    got=message["content"][:80],
                    next_step="correct the template, name another one (base.chat_template), or remove these rows",
                    chat=number,
                )


def refuse_other_text(texts: Sequence[str], marked: Sequence[str]) -> None:
    """Refuse a training template that renders another text than the template that a server uses.

    Raises:
        BadModel: a text differs. The failure's details have the number of the chat.
    """
    for number, (served, trained) in enumerate(zip(texts, marked, strict=True)):
        if served != trained:
            at = len(os.path.commonprefix([served, trained]))  # noqa: RUF071 (letters, not folders)
            raise BadModel(
                "The training template renders another text than the model's own template, which serves it.",
                where="base.chat_template",
                expected=f"{served[max(0, at - 30) : at + 40]!r}, the first difference at character {at}",
                got=repr(trained[max(0, at - 30) : at + 40]),
                next_step="remove base.chat_template; or write the template without {% generation %} blocks, to serve it",
                chat=number,
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
            raise BadModel(
                "The chat template leaves out the tools of a chat, so the model would not know what it can call.",
                where="chat_template",
                got=f"the tools {', '.join(names[:8])}",
                next_step="choose a base whose chat template knows tools, name another template (base.chat_template), "
                "or remove the tools",
                chat=number,
            )
