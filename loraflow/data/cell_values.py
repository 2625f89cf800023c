"""Texts that stand for something else: a missing value, an error of a spreadsheet, a list that was written as text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pydantic import JsonValue

from loraflow.data.chats import BadRow
from loraflow.data.json_text import strict_json

# What pandas, databases and Alpaca's authors write for "nothing", in lower case.
_MISSING = frozenset({
    "nan", "<na>", "\\n", "null", "none", "nil", "<noinput>", "<no input>", "<nooutput>", "#n/a",
})  # fmt: skip
_NULLS = frozenset({"\\N", "<NA>"})  # written by a database or pandas, never by a person
_SPREADSHEET_ERRORS = frozenset({
    "#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#NUM!", "#NULL!", "#N/A", "#SPILL!", "#CALC!", "#FIELD!", "#BLOCKED!",
    "#UNKNOWN!", "#BUSY!",
})  # fmt: skip
_CHAT = re.compile(r"""\[\s*\{\s*['"](?:role|from|content|value)['"]\s*:.*\}\s*\]""", re.DOTALL)
_PLACEHOLDER = re.compile(r"<(image|video|audio)>")
_MEDIA = re.compile(
    r"(image|video|audio|img|picture|photo)s?(_?(path|paths|url|urls|file|files|bytes))?", re.IGNORECASE
)


def is_missing(value: JsonValue) -> bool:
    """Tell whether an optional text, such as Alpaca's `input`, stands for no value: nan, None, <noinput>."""
    return isinstance(value, str) and value.strip().lower() in _MISSING


def is_null(cell: str) -> bool:
    r"""Tell whether a table's cell is a null of a database or of pandas: \N, <NA>."""
    return cell in _NULLS


def refuse_error_value(text: str, where: str) -> None:
    """Refuse a text that is an error of a spreadsheet.

    Raises:
        BadRow: the text is one, such as #NAME?.
    """
    if text.startswith("#") and text.strip() in _SPREADSHEET_ERRORS:
        raise BadRow(f"{where} {text.strip()} is an error of a spreadsheet, not a text; correct the cell")


def is_chat_as_text(value: JsonValue) -> bool:
    """Tell whether a text is a list of messages, as JSON or in Python's notation (what pandas writes to CSV)."""
    return isinstance(value, str) and value.lstrip().startswith("[") and bool(_CHAT.fullmatch(value.strip()))


def parsed_list(value: JsonValue, key: str) -> JsonValue:
    """Return a list that a cell holds as JSON text; any other value unchanged.

    Raises:
        BadRow: the text begins like a list and is not valid JSON.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return strict_json(value)
    except ValueError as error:
        notation = " (this is Python's notation: write the cell with json.dumps)" if _is_python(value) else ""
        raise BadRow(f"{key} is not valid JSON: {error}{notation}") from None


def _is_python(text: str) -> bool:
    return re.match(r"\s*[\[{(]+\s*'", text) is not None


def _is_media(value: JsonValue) -> bool:
    """Tell whether a value is an image, video or sound as `datasets` stores it: {bytes, path}, or a list of them."""
    if isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, bytes) or (
        isinstance(value, dict) and "path" in value and not value.keys().isdisjoint({"bytes", "array"})
    )


def refuse_media(row: Mapping[str, JsonValue], texts: Sequence[JsonValue]) -> None:
    """Refuse a row with an image, video or sound: its answer would be learned without it.

    A path or URL alone may belong to a text that does not need it, so it counts only beside a placeholder in the text.

    Raises:
        BadRow: it has one.
    """
    for key, value in row.items():
        if _is_media(value) and _MEDIA.fullmatch(str(key)):
            raise BadRow(f"{key} is not read: only text is supported; remove it if the answer does not depend on it")
    for text in texts:
        found = _PLACEHOLDER.search(text) if isinstance(text, str) else None
        if found and (keys := [key for key, value in row.items() if value and _MEDIA.fullmatch(str(key))]):
            raise BadRow(f"the text has {found[0]}, and {keys[0]} is not read: only text is supported")
