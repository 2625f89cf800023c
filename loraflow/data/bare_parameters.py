"""Parameters of a tool without a JSON schema around them, as xLAM has them: {"city": {"type": "str, optional"}}."""

from __future__ import annotations

import re
from typing import TypeGuard

from pydantic import JsonValue

_TYPES = {
    "str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number", "number": "number",
    "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array", "tuple": "array", "set": "array",
    "dict": "object", "object": "object",
}  # fmt: skip
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


def _json_type(said: str) -> dict[str, JsonValue]:
    found = _BASE.fullmatch(said.split(", optional")[0].split(",optional")[0].strip())
    name = None if found is None else _TYPES.get(found[1].lower())
    return {} if name is None else {"type": name}
