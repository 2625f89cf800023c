"""Parts of a question that no column of a chat can name, such as the choices of a quiz.

Without them, the answer cannot be known.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from pydantic import JsonValue

from loraflow.data.chats import BadRow, Message
from loraflow.data.labels import plain

# Of these, a text is a part as well; an object must have texts, because `options` may be settings.
_CHOICES = frozenset({"choices", "options", "candidates", "endings"})
_PARTS = frozenset({
    "documents", "context", "contexts", "passages", "paragraphs", "table", "image", "images", "audio", "video", "schema",
})  # fmt: skip
# Usual names of a text that a question is about, or of the question itself beside a rendered prompt.
_TEXT_PARTS = (
    "context", "input", "passage", "paragraph", "document", "article", "story", "premise", "question", "query", "problem",
    "definition", "hypothesis", "transcript", "dialogue", "contract", "clause", "background", "facts", "schema", "table",
)  # fmt: skip
_TEXT_OR_LISTED = frozenset({*_TEXT_PARTS, "contexts", "documents", "passages", "paragraphs", "retrieved_contexts"})
_LETTERS = frozenset("abcd")
_ONE_CHOICE = re.compile(r"op[a-d]|options?_?[a-e1-5]|choices?_?[a-e1-5]|ending_?[0-4]")

_LABEL = re.compile(r"\(?(?:[A-Ha-h]|[0-9])[.)]*")
_QUOTED = re.compile(r"""(?<=['"])[^'"]+(?=['"])""")
_NUMBERING = re.compile(r"^\s*\(?(?:[A-Ha-h]|[0-9])[.):]\s*")


class LostPart(BadRow):
    """A row whose question has a part that is not in its prompt."""


def question_parts(row: Mapping[str, JsonValue]) -> list[str]:
    """Return the keys of a row that hold parts of its question beside the question itself."""
    names = {str(key).lower(): str(key) for key in row}
    found = [key for name, key in names.items() if _is_part(name, row[key])]
    single = [key for name, key in names.items() if _ONE_CHOICE.fullmatch(name) and _is_text(row[key])]
    if len(single) > 1:
        found += single
    if names.keys() >= _LETTERS:
        found += [names[name] for name in sorted(_LETTERS)]
    return found


def refuse_answers_by_letter(row: Mapping[str, JsonValue], messages: list[Message], read: Collection[str]) -> None:
    """Refuse a row whose answer is the letter or number of a choice, if its question names no choice.

    Args:
        row: the row.
        messages: its chat.
        read: the keys that were read.

    Raises:
        BadRow: it is. What would be learned is a guess.
    """
    answer = messages[-1]["content"].strip()
    if not _LABEL.fullmatch(answer):
        return
    keys = [key for key in question_parts(row) if key not in read and key.lower() not in _PARTS]
    choices = {plain(text) for key in keys for text in _texts_of(row[key])} - {""}
    asked = plain(" ".join(message["content"] for message in messages[:-1]))
    if len(choices) > 1 and plain(answer) not in choices and not any(choice in asked for choice in choices):
        raise BadRow(
            f"the answer {answer!r} is the label of a choice, and {keys[0]} is not read: write a prompt that has "
            f"the choices, or name {keys[0]} in data.ignore"
        )


def refuse_lost_parts(
    row: Mapping[str, JsonValue], messages: list[Message], used: Mapping[str, str], columns: Mapping[str, str]
) -> None:
    """Refuse a row whose question has a part that is neither read nor written in the chat, such as the text `context`.

    Args:
        row: the row.
        messages: its chat.
        used: the keys that were read: loraflow's name → the row's column. Chats of messages have their parts.
        columns: data.columns.

    Raises:
        LostPart: it has. The answer would be learned without it.
    """
    ours = next((key for key in ("prompt", "instruction") if key in used), None)
    answer = next((key for key in ("completion", "output", "response") if key in used), None)
    if ours is None or answer is None:
        return
    keys = [key for key in row if key.lower() in _TEXT_OR_LISTED and key not in used and key not in used.values()]
    asked = None
    for key in keys:
        texts = [text for text in map(plain, _plain_texts(row[key])) if text not in ("", "nan", "none", "null")]
        if isinstance(row[key], str) and key.lower() != "input" and not any(" " in text for text in texts):
            continue  # the name of a document, or a category
        if not texts:
            continue
        asked = asked or plain(" ".join(message["content"] for message in messages))
        if not any(text in asked for text in texts):
            raise LostPart(
                f"{key} has a text that the prompt lacks: {_way_out(key, row, (ours, answer), used, columns)}"
            )


def _way_out(
    key: str, row: Mapping[str, JsonValue], ours: tuple[str, str], used: Mapping[str, str], columns: Mapping[str, str]
) -> str:
    """Return what to do about a part that is not in the prompt."""
    if key in columns:
        return f"in data.columns, {key} goes with instruction and output, not with {ours[0]} and {ours[1]}"
    way = "write it there"
    if isinstance(row[key], str) and "input" not in used:
        way = f"set data.columns: {{instruction: {used[ours[0]]}, input: {key}, output: {used[ours[1]]}}}"
    return f"{way}, or name {key} in data.ignore if no answer needs it"


def _plain_texts(value: JsonValue) -> Iterable[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _plain_texts(item)
    elif isinstance(value, str):
        yield value


def _texts_of(value: JsonValue) -> Iterable[str]:
    """Yield the texts of choices: of a list, of an object, or the parts of a text such as "['w', 'x']"."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_of(item)
    elif isinstance(value, str):
        texts = _QUOTED.findall(value) if value.lstrip().startswith(("[", "{")) else value.splitlines()
        yield from (_NUMBERING.sub("", text).strip() for text in texts)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _is_part(name: str, value: JsonValue) -> bool:
    if name in _CHOICES:
        return _is_choices(value)
    return name in _PARTS and isinstance(value, dict | list) and bool(value)


def _is_choices(value: JsonValue) -> bool:
    """Tell whether a value is a text, a list, or an object of texts or lists: {"A": "w"}, {"text": [], "label": []}."""
    if isinstance(value, dict):
        return any(isinstance(item, list) or _is_text(item) for item in value.values())
    return _is_text(value) or (isinstance(value, list) and bool(value))


def _is_text(value: JsonValue) -> bool:
    return isinstance(value, str) and bool(value.strip())
