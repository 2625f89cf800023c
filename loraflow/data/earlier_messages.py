"""Read the earlier messages of a conversation that a column such as `history` has beside a question and its answer."""

from __future__ import annotations

from itertools import pairwise

from pydantic import JsonValue

from loraflow.data.cell_values import is_missing, parsed_list
from loraflow.data.chats import BadRow
from loraflow.data.mark_names import normal_name
from loraflow.data.message_checks import ROLES, checked_messages
from loraflow.data.row_fields import (
    ASSISTANT,
    CALLS,
    CONTENTS,
    ROLE_KEYS,
    TOOL,
    RawRow,
    RowFields,
    Turn,
    has_value,
    key_of,
    normal_role,
    objects,
)

_CONTEXTS = ("context", "contexts")
# Other names with "history" are often no part of the chat: rejected_history, edit_history, order_history.
_NAMES = {
    *_CONTEXTS,
    "history",
    *(f"{kind}_history" for kind in ["chat", "conversation", "dialog", "dialogue", "message"]),
}
# `text`, `speaker`, `author` and the like also name passages and log lines.
_ROLES, _TEXTS = ("role", "from"), ("content", "value", "message")


def history_keys(fields: RowFields) -> list[str]:
    """Return the keys of a row's columns that may have earlier messages and were not read as something else."""
    names = (key for key in fields.row if normal_name(key) in _NAMES and key not in fields.used.values())
    keys = [key for key in names if has_value(fields.row[key])]
    missing = [key for key in keys if is_missing(fields.row[key])]
    if "history" in missing:
        fields.value("history")
    return [key for key in keys if key not in missing]


def with_history(fields: RowFields, keys: list[str], turns: list[Turn]) -> list[Turn]:
    """Put earlier messages before a question, behind its system message.

    They are LLaMA-Factory's and ms-swift's pairs in `history`, or messages with roles. What the conversation has too is not
    written twice.

    Raises:
        BadRow: the messages are not valid, the question is among them, or two columns differ.
    """
    first = _has_system(turns)
    if not turns[first:] or turns[first].role != "user":
        return turns  # no valid chat, which earlier messages would hide
    earlier: dict[str, list[Turn]] = {}
    for key in keys:
        name = fields.own_name(key)
        try:
            if found := _earlier(fields, key, turns):
                earlier[name] = found
                before = _before(found, turns, objects(fields.row[key]) is None)
        except BadRow as error:
            raise BadRow(f"{name}: {error}{_hint(name)}") from None
    if not earlier:
        return turns
    name, *others = earlier
    if any(list(map(_compared, earlier[other])) != list(map(_compared, earlier[name])) for other in others):
        raise BadRow(f"{' and '.join(earlier)} have different messages: remove one{_hint(others[0])}")
    return [*turns[:first], *before, *turns[first:]]


def are_earlier_messages(value: JsonValue) -> bool:
    """Tell whether a column's value is the messages of a conversation, which a user begins."""
    items = objects(value) or []
    role, content = key_of(items, _ROLES), key_of(items, _TEXTS)
    roles = [normal_role(item.get(role)) for item in items]
    own = roles[roles[:1] == ["system"] :]
    return (
        own[:1] == ["user"]
        and all(said in ("user", ASSISTANT, TOOL) for said in own)
        and all(item.get(content) is not None or any(item.get(key) for key in CALLS) for item in items)
    )


def _hint(column: str) -> str:
    return f"; if these are no earlier messages, name {column} in data.ignore"


def _earlier(fields: RowFields, key: str, turns: list[Turn]) -> list[Turn]:
    """Return the messages of a column; empty if it has none, or if the question has their texts.

    Raises:
        BadRow: a message is not valid, or the column's messages have another shape.
    """
    value = parsed_list(fields.row[key], "the text") if key == "history" else fields.row[key]
    items = objects(value) or []
    are_read = are_earlier_messages(value)
    role = key_of(items, ROLE_KEYS[:4])
    are_context = normal_name(key) in _CONTEXTS and all(normal_role(item.get(role)) in [*ROLES] for item in items)
    if items and (are_read or are_context):
        if _are_written(items, turns[:-1]):
            return []
        if not are_read:
            raise BadRow("messages that are not read: expected {role, content}, the first a user's")
        fields.value(key)
        return fields.turns(key, items, (key_of(items, _ROLES),), (key_of(items, _TEXTS),))
    if key != "history":
        return []
    pairs = [pair for pair in value if isinstance(pair, list)] if isinstance(value, list) else []
    if not isinstance(value, list) or len(pairs) < len(value) or any(len(pair) != 2 for pair in pairs):
        raise BadRow("expected a list of [question, answer], or of {role, content}, the first a user's")
    fields.value(key)
    return [Turn(*turn) for pair in pairs for turn in zip(("user", ASSISTANT), pair, strict=True)]


def _are_written(items: list[RawRow], asked: list[Turn]) -> bool:
    """Tell whether a question has the texts of all messages, in their order."""
    rest = " ".join(text for turn in asked if isinstance(turn.content, str) for text in turn.content.split())
    for item in items:
        texts = [" ".join(text.split()) for key in CONTENTS if isinstance(text := item.get(key), str)]
        if not any(texts) or any(item.get(key) for key in CALLS):
            return False
        for text in texts:
            _, found, rest = rest.partition(text) if text else ("", text, rest)
            if text and not found:
                return False
    return bool(items)


def _before(found: list[Turn], turns: list[Turn], are_pairs: bool) -> list[Turn]:
    """Return earlier messages without their end that the conversation begins with.

    Raises:
        BadRow: the row's answer is still among them, or its question is their last one; or they are no valid chat.
    """
    if _has_system(turns) and _has_system(found):
        if _compared(turns[0]) != _compared(found[0]):
            raise BadRow("its system message is not the row's")
        found = found[1:]
    texts, rest = [*map(_compared, found)], [*map(_compared, turns[_has_system(turns) :])]
    same = next((count for count in range(len(found), 0, -1) if texts[-count:] == rest[:count]), 0)
    found = found[: len(found) - same]
    texts = [text[:2] for text in texts[: len(found)]]
    exchanges = [*pairwise(rest)]
    has_answer = any((question[:2], answer[:2]) in pairwise(texts) for question, answer in exchanges)
    last = [text for text in texts if text[0] == "user"][-1:]
    if has_answer or (
        not are_pairs and last == [rest[0][:2]]
    ):  # people repeat `continue`, so other repetitions are read
        raise BadRow("the question is among its messages, with its answer or as the last one")
    if found[_has_system(found) :]:
        checked_messages(found)
    return found


def _has_system(turns: list[Turn]) -> bool:
    return bool(turns) and turns[0].role == "system"


def _compared(turn: Turn) -> tuple[object, ...]:
    """Return what two equal messages have in common."""
    content = turn.content
    text = " ".join(content.split()) if isinstance(content, str) else content
    return turn.role, text, turn.weight, turn.calls, turn.reasoning
