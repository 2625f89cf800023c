"""Remove the keys that a recipe ignores: `quality`, or `metadata.quality` inside an object."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import JsonValue

from loraflow.data.beside import is_object_text
from loraflow.data.container_text import Unreadable, parsed_text


def without_ignored(row: Mapping[str, JsonValue], ignore: Collection[str]) -> dict[str, JsonValue]:
    """Return a row or message without the keys of `data.ignore`.

    Args:
        row: the row or message.
        ignore: the keys. `metadata.quality` is the key `quality` of the object, list of objects or JSON text `metadata`,
            unless a key has this whole name.
    """
    kept = {key: value for key, value in row.items() if key not in ignore}
    for name in ignore:
        outer, dot, inner = name.partition(".")
        if dot and name not in row and outer in kept:
            kept[outer] = _without_member(kept[outer], inner)
    return kept


def _without_member(value: JsonValue, name: str) -> JsonValue:
    if isinstance(value, str) and is_object_text(value):
        try:
            value = parsed_text(value)
        except Unreadable:
            return value
    if isinstance(value, dict):
        return without_ignored(value, (name,))
    if not isinstance(value, list):
        return value
    items: list[object] = list(value)
    if any(isinstance(item, tuple) for item in items):  # a map of Parquet
        return [item for item in value if not (isinstance(item, tuple) and item[:1] == (name,))]
    return [_without_member(item, name) for item in value]
