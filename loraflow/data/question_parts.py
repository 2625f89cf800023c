"""Parts of a question that no column of a chat can name, such as the choices of a quiz.

Without them, the answer cannot be known.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import JsonValue

# Of these, a text is a part as well; an object must have texts, because `options` may be settings.
_CHOICES = frozenset({"choices", "options", "candidates", "endings"})
_PARTS = frozenset({
    "documents", "contexts", "passages", "paragraphs", "table", "image", "images", "audio", "video", "schema",
})  # fmt: skip
_LETTERS = frozenset("abcd")
_ONE_CHOICE = re.compile(r"op[a-d]|options?_?[a-e1-5]|choices?_?[a-e1-5]|ending_?[0-4]")


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
