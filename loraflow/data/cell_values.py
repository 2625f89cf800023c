"""Texts and values of a table's cells: objects as JSON or in Python's notation, chats as text, missing values, and media."""

import ast
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import NoReturn

from pydantic import JsonValue

from loraflow.data.chats import BadRow

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
    b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"ID3", b"OggS", b"fLaC", b"II*\0", b"MM\0*", b"BM", b"\x1aE\xdf\xa3",
)  # fmt: skip


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
    if not isinstance(value, str) or not is_object_text(value):
        return value
    try:
        return strict_json(value)
    except ValueError as error:
        notation = (
            " (this is Python's notation: write the cell with json.dumps)" if re.match(r"\s*[\[{(]+\s*'", value) else ""
        )
        raise BadRow(f"{key} is not valid JSON: {error}{notation}") from None


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
    """Return the key of a row or message that has an image, video or sound; None without."""
    for key, value in row.items():
        if isinstance(value, str) and not value.startswith(_MEDIA_TEXTS):
            continue
        if isinstance(value, dict | list | bytes | str) and key not in read and _is_media(str(key), value):
            return key
    return None


def refuse_media(row: Mapping[str, JsonValue], texts: Sequence[JsonValue], found: str | None) -> None:
    """Refuse a row with an image, video or sound: its answer would be learned without it.

    A path or URL alone may belong to a text that does not need it, so it counts only beside a placeholder in the text.

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


MAX_CHARACTERS = 1_000_000  # of a text that is parsed
_NAMES: dict[str, JsonValue] = {
    "true": True, "false": False, "null": None, "nan": None, "NaN": None, "NaT": None, "NA": None,
    "False_": False, "True_": True, "inf": float("inf"),
}  # fmt: skip


class Unreadable(ValueError):
    """A text that begins as an object or a list, and is neither JSON nor Python's notation."""


@lru_cache(1)
def parsed_text(text: str) -> JsonValue:
    """Return the value of a text that begins with { or [. NaN, numpy's values and calls such as Timestamp(…) are allowed.

    Nothing may change the value: the same text is parsed by several readers of a row, and once.

    Raises:
        Unreadable: it cannot be parsed.
    """
    if len(text) > MAX_CHARACTERS:
        raise Unreadable(f"it has more than {MAX_CHARACTERS:,} characters")
    try:
        value: JsonValue = json.loads(text, object_pairs_hook=_agreeing)
    except (ValueError, RecursionError):
        pass
    else:
        return value
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise Unreadable("it is neither JSON nor Python's notation") from error


def _agreeing(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    values = dict(pairs)
    if len(values) != len(pairs) and any(repr(values[key]) != repr(value) for key, value in pairs):
        raise ValueError("a key with two values")
    return values


def _value(node: ast.expr) -> JsonValue:
    """Return the value of a literal; of `np.bool_(False)` or `array([…])` their argument, of other expressions None."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Dict():
            pairs = [(_key(k), _value(v)) for k, v in zip(node.keys, node.values, strict=True)]
            return _agreeing(pairs)
        case ast.List(elts=[_, *_] as items) if all(isinstance(i, ast.Tuple) and len(i.elts) == 2 for i in items):
            return _agreeing([(_key(i.elts[0]), _value(i.elts[1])) for i in items if isinstance(i, ast.Tuple)])  # a map
        case ast.List() | ast.Tuple() | ast.Set():
            return [_value(item) for item in node.elts]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            number = _value(operand)
            return -number if isinstance(number, int | float) else None
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return _NAMES.get(name)
        case ast.Call(args=[argument, *_]) if (
            getattr(node.func, "attr", getattr(node.func, "id", "")).rstrip("_0123456789") in _CALLS
        ):
            return _value(argument)
    return None


_CALLS = frozenset({"array", "bool", "int", "uint", "float", "str", "Decimal", "dict", "OrderedDict"})


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    return key if isinstance(key, str) else repr(key)


def is_object_text(value: JsonValue) -> bool:
    """Tell whether a value is a text that begins as an object or a list."""
    return isinstance(value, str) and value.lstrip().startswith(("{", "["))


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


def strict_json(text: str) -> JsonValue:
    """Parse JSON without NaN, infinities, lone surrogates and duplicated keys, which Python's parser accepts.

    Raises:
        ValueError: the text is not valid JSON.
    """
    try:
        value: JsonValue = _decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("a lone surrogate (half of a character) is not valid text") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("a whole number of more than 4,300 digits") from None
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not valid JSON")


def _unique_keys(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    values = dict(pairs)
    if len(values) != len(pairs):
        key = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {json.dumps(key, ensure_ascii=False)[:60]} is duplicated in an object")
    return values


_decode = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant).decode
