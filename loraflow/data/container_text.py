"""Parse the text of an object in a table's cell: strict JSON, or Python's notation as `str` and pandas write it."""

from __future__ import annotations

import ast
import json
from collections import Counter
from typing import NoReturn

from pydantic import JsonValue

MAX_CHARACTERS = 1_000_000  # of a text that is parsed
_NAMES: dict[str, JsonValue] = {
    "true": True, "false": False, "null": None, "nan": None, "NaN": None, "NaT": None, "NA": None,
    "False_": False, "True_": True, "inf": float("inf"),
}  # fmt: skip


class Unreadable(ValueError):
    """A text that begins as an object or a list, and is neither JSON nor Python's notation."""


def parsed_text(text: str) -> JsonValue:
    """Return the value of a text that begins with { or [. NaN, numpy's values and a call such as Timestamp(…) are allowed.

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
        case ast.Call(args=[argument, *_]) if _is_array_or_number(node):
            return _value(argument)
    return None


def _is_array_or_number(node: ast.Call) -> bool:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return name.rstrip("_0123456789") in {
        "array",
        "bool",
        "int",
        "uint",
        "float",
        "str",
        "Decimal",
        "dict",
        "OrderedDict",
    }


def _key(node: ast.expr | None) -> str:
    key = None if node is None else _value(node)
    return key if isinstance(key, str) else repr(key)


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
