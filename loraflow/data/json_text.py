"""Parse JSON strictly."""

from __future__ import annotations

import json
from collections import Counter
from typing import NoReturn

from pydantic import JsonValue


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
