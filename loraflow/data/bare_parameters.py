"""Parameters of a tool that are not quite JSON schema: xLAM's {"city": {"type": "str, optional"}}, types such as dict."""

from __future__ import annotations

import re
from typing import TypeGuard

from pydantic import JsonValue

_TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "tuple": "array", "set": "array",
    "dict": "object", "object": "object", "null": "null", "long": "integer", "double": "number", "char": "string",
    "arraylist": "array", "hashmap": "object",
}  # fmt: skip
_JSON_TYPES = {*_TYPES.values(), "null"}
_BASE = re.compile(r"(\w+)\s*(?:\[.*\])?")


def is_bare_parameters(parameters: JsonValue) -> TypeGuard[dict[str, JsonValue]]:
    """Tell whether each key of an object is a parameter: none is a keyword of JSON schema."""
    if not isinstance(parameters, dict) or not parameters:
        return False
    return all(
        isinstance(value, dict) and isinstance(value.get("type"), str) and "properties" not in value
        for value in parameters.values()
    )


def schema_of(parameters: dict[str, JsonValue]) -> JsonValue:
    """Return the JSON schema. A type of Python that has none in JSON, such as Union[…], is left out.

    A parameter is required unless its type says optional or it has a default.
    """
    properties: dict[str, JsonValue] = {}
    required: list[JsonValue] = []
    for name, value in parameters.items():
        assert isinstance(value, dict)
        said = str(value["type"])
        properties[name] = {**{key: item for key, item in value.items() if key != "type"}, **_json_type(said)}
        if "optional" not in said.lower() and "default" not in value:
            required.append(name)
    return {"type": "object", "properties": properties, "required": required}


def with_json_types(schema: JsonValue) -> JsonValue:
    """Return a schema with the types of JSON schema instead of Python's and Java's (dict: BFCL) and Gemini's (OBJECT).

    The type any is left out. A type that is none of these is kept: the schema is then not valid.
    """
    if isinstance(schema, list):
        return [with_json_types(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, JsonValue] = {}
    for key, value in schema.items():
        if key in ("enum", "const", "default", "examples", "example"):
            out[key] = value
        elif key == "type" and isinstance(value, str) and value not in _JSON_TYPES:
            out |= {} if value.lower() == "any" else _json_type(value) or {key: value}
        else:
            out[key] = with_json_types(value)
    return out


def _json_type(said: str) -> dict[str, JsonValue]:
    found = _BASE.fullmatch(said.split(", optional")[0].split(",optional")[0].strip())
    name = None if found is None else _TYPES.get(found[1].lower())
    return {} if name is None else {"type": name}
