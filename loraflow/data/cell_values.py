"""Texts that stand for something else: a missing value, an error of a spreadsheet, a list that was written as text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from pydantic import JsonValue

from loraflow.data.chats import BadRow
from loraflow.data.container_text import strict_json

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
    r"([a-z]+_)*(image|video|audio|img|picture|photo|screenshot)s?(_?\d+)?(_?(path|paths|url|urls|file|files|bytes))?",
    re.IGNORECASE,
)
# Data URLs; PNG, JPEG, and WAV or WebP in base64
_MEDIA_TEXTS = ("data:image/", "data:audio/", "data:video/", "iVBORw0KGgo", "/9j/4", "UklGR")
_MAGIC = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"RIFF",
    b"ID3",
    b"OggS",
    b"fLaC",
    b"II*\0",
    b"MM\0*",
    b"BM",
    b"\x1aE\xdf\xa3",
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


def _is_media(key: str, value: JsonValue) -> bool:
    """Tell whether a value is an image, video or sound, or a list with one.

    `datasets` stores it as {bytes, path} or {array, path, sampling_rate}, in a column of any name; others
    as a data URL or base64.
    """
    if isinstance(value, list):
        return any(_is_media(key, item) for item in value if isinstance(item, dict | bytes | str))
    if isinstance(value, str):
        return value.startswith(_MEDIA_TEXTS)
    if isinstance(value, bytes):
        return value.startswith(_MAGIC) or (bool(value) and _MEDIA.fullmatch(key) is not None)
    if not isinstance(value, dict) or value.keys().isdisjoint({"bytes", "array", "path"}):
        return False
    has_name = _MEDIA.fullmatch(key) is not None
    content = value.get("bytes") or value.get("array")
    if isinstance(content, str | bytes | list) and content:
        return has_name or isinstance(content, bytes) or not value.keys().isdisjoint({"path", "sampling_rate"})
    return has_name and isinstance(value.get("path"), str) and bool(value["path"])


def media_key(row: Mapping[str, JsonValue], read: Collection[str]) -> str | None:
    """Return the key of a row or message that has an image, video or sound; None without.

    Args:
        row: the row or message.
        read: the keys that were read.
    """
    for key, value in row.items():
        if isinstance(value, str) and not value.startswith(_MEDIA_TEXTS):
            continue
        if isinstance(value, dict | list | bytes | str) and key not in read and _is_media(str(key), value):
            return key
    return None


def refuse_media(row: Mapping[str, JsonValue], texts: Sequence[JsonValue], found: str | None) -> None:
    """Refuse a row with an image, video or sound: its answer would be learned without it.

    A path or URL alone may belong to a text that does not need it, so it counts only beside a placeholder in the text.

    Args:
        row: the row.
        texts: the texts of its chat.
        found: the key of the row, or of a message, that has one.

    Raises:
        BadRow: it has one.
    """
    if found is not None:
        name = found if found in row else found.rpartition(".")[2]  # of a message: messages.images
        raise BadRow(
            f"{found} is not read: only text is supported; if the answer does not depend on it, name {name} in data.ignore"
        )
    for text in texts:
        placeholder = _PLACEHOLDER.search(text) if isinstance(text, str) else None
        if placeholder and (keys := [key for key, value in row.items() if value and _MEDIA.fullmatch(str(key))]):
            raise BadRow(f"the text has {placeholder[0]}, and {keys[0]} is not read: only text is supported")
