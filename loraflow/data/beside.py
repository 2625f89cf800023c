"""What stands beside an answer: the values of a key, which may be in objects and lists, and what a key says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from pydantic import JsonValue

from loraflow.data.container_text import Unreadable, parsed_text
from loraflow.data.labels import Labels, plain


class Said(NamedTuple):
    """What a key says about an answer."""

    is_learned: bool | None  # None: it may say that it is wrong
    text: str  # the key and its value; what is unclear


@dataclass(frozen=True)
class Beside:
    """What a key stands beside."""

    answers: tuple[str, ...] = ()  # of the row, or the message
    labels: Labels | None = None  # knows the other rows of the file; None for a message
    row: Mapping[str, JsonValue] | None = None  # the row; None for a message

    @cached_property
    def said(self) -> tuple[str, ...]:
        """The answers as `plain` returns them. Few keys need them, and long texts take time."""
        return tuple(map(plain, self.answers))


def shown(here: tuple[str, ...], value: JsonValue) -> str:
    """Return a key and its value for people."""
    text = value if isinstance(value, str) else "" if isinstance(value, dict | list) else repr(value)
    return f"{'.'.join(here)}: {' '.join(text.split())[:40]}"


def objects_of(value: JsonValue) -> list[Mapping[str, JsonValue]]:
    """Return the objects of a value: itself, or those of a list; also if it is their text."""
    if isinstance(value, str) and is_object_text(value):
        try:
            value = parsed_text(value)
        except Unreadable:
            return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        return []
    items: list[object] = list(value)
    pairs = {item[0]: item[1] for item in items if isinstance(item, tuple) and len(item) == 2}  # a map of Parquet
    return [pairs] if pairs else [item for item in value if isinstance(item, dict)]


def is_object_text(value: JsonValue) -> bool:
    """Tell whether a value is a text that begins as an object or a list."""
    return isinstance(value, str) and value.lstrip().startswith(("{", "["))


def values_at(row: Mapping[str, JsonValue], here: tuple[str, ...]) -> list[JsonValue]:
    """Return the values of a key in a row, which may be in objects and lists."""
    found = [row.get(here[0])]
    for key in here[1:]:
        found = [members[key] for value in found for members in objects_of(value) if key in members]
    flat = [item for value in found for item in (value if isinstance(value, list) else [value])]
    return [item.get("value") if isinstance(item, dict) else item for item in flat]


def is_answer(value: str, said: tuple[str, ...]) -> bool:
    """Tell whether a text is one of the answers, which are as `plain` returns them."""
    text = plain(value).rstrip(".!")
    return any(text == answer.rstrip(".!") for answer in said)
