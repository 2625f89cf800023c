"""Refuse chats whose answers cannot be learned as a chat template renders them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from loraflow.data.chats import Message
from loraflow.data.rendered_calls import missing_part
from loraflow.failures import BadModel

_SHOWN = 80  # characters of a text in a message


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
    raise BadModel(
        "The chat template leaves out or changes a part of an answer, so the model would learn another answer.",
        where="chat_template",
        expected=repr(cut.content[:_SHOWN]),
        got=f"{turn}: {cut.rendered[:_SHOWN]!r}",
        next_step="; ".join(ways),
        chat=turn.chat,
    ) from cut


def refuse_missing_call(rendered: str, message: Message, turn: AnswerTurn) -> None:
    """Refuse an answer whose calls the template does not render completely.

    Raises:
        BadModel: a part is missing.
    """
    missing = missing_part(rendered, message)
    if missing is not None:
        raise BadModel(
            "The chat template leaves out a tool call, or a part of it.",
            where="chat_template",
            expected=missing[:_SHOWN],
            got=f"{turn}: {rendered[:_SHOWN]!r}",
            next_step="choose a base whose chat template knows tools, name another template (base.chat_template), or remove "
            "these rows",
            chat=turn.chat,
        )


def refuse_prompt(text: str, head: str, turn: AnswerTurn) -> NoReturn:
    """Refuse an answer that does not follow the prompt that a server sends."""
    at = next((i for i, (a, b) in enumerate(zip(text, head, strict=False)) if a != b), min(len(text), len(head)))
    ways = [] if turn.is_last else ["data.loss_on: last_assistant learns the last answer only"]
    if re.search("think|thought", head[max(0, at - 10) :].lower()):
        ways.append("data.thinking: empty serves a prompt without reasoning")
        ways.append("base.chat_template names another template")
    else:
        ways.append(
            "make add_generation_prompt add exactly the text before an answer, and put {% generation %} after it"
        )
    raise BadModel(
        "The chat template renders prompts differently in training and in generation, so the model would see prompts that "
        "it was not trained on.",
        where="chat_template",
        expected=f"{turn} after the prompt that a server sends, which ends with {head[max(0, at - 20) :][:_SHOWN]!r}",
        got=repr(text[max(0, at - 20) : at + 60]),
        next_step="; ".join(ways),
        chat=turn.chat,
    )


def refuse_open(following: str, turn: AnswerTurn) -> NoReturn:
    """Refuse an answer that no control token ends."""
    raise BadModel(
        "The chat template does not end an answer with a control token, so the model would not learn to stop.",
        where="chat_template",
        got=repr(following),
        next_step="choose an instruct model, or add the stop token to its chat template",
        chat=turn.chat,
    )


def refuse_ignored_prompt(inserted: str, turn: AnswerTurn) -> NoReturn:
    """Refuse a template that ignores add_generation_prompt, and writes a text before an answer."""
    raise BadModel(
        "The chat template does not render an answer right after the rendered prompt, because it ignores "
        "add_generation_prompt: a server would not ask for an answer.",
        where="chat_template",
        got=repr(inserted[:_SHOWN]),
        next_step="add the start of an answer to the template, for add_generation_prompt",
        chat=turn.chat,
    )


def refuse_unmarked(turn: AnswerTurn) -> NoReturn:
    """Refuse a template with {% generation %} blocks that has none around an answer."""
    raise BadModel(
        "The chat template does not mark the answer of a chat.",
        where="chat_template",
        got=str(turn),
        next_step="put {% generation %} … {% endgeneration %} around every answer in chat_template.jinja",
        chat=turn.chat,
    )
