"""Tools of a chat, as OpenAI and transformers write them, and the calls of an answer, checked against their JSON schemas.

Inside loraflow, a chat's tools are the key `tools` of its first message: so each part of a chat that is rendered has them.
Arguments are objects, as chat templates expect them; files may have them as JSON texts, as OpenAI's API does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, TypeGuard, cast

from pydantic import JsonValue

from loraflow.data.cell_values import strict_json
from loraflow.data.chats import BadRow, Function, Tool, ToolCall
from loraflow.failures import BadData

if TYPE_CHECKING:
    from jsonschema.protocols import Validator


MAX_DEPTH = 64
_OBJECTS = re.compile(r"\s*(?:\[\s*)?\{")  # the JSON text of an object, or of a list of them
# OpenAI's; InternLM's, Llama's and ChatGLM's; Anthropic's and Bedrock's; Gemini's and LangChain's
_ARGUMENTS = ("arguments", "parameters", "input", "args", "kwargs")
CALL_KEYS = frozenset({*_ARGUMENTS, "name", "id", "type", "function", "index"})
_MAX_SHOWN = 120  # characters of a schema's complaint


def read_tools(value: JsonValue, where: str = "tools") -> list[Tool] | None:
    """Return the tools of a row, or of a file: a list of functions, its JSON text, or a list of their JSON texts.

    None if there are none, or if the value is a list of names: without descriptions they are no part of a prompt.

    Raises:
        BadRow: the value is something else, a name is duplicated, or a schema is not valid.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        value = _parsed(value, where)
    if isinstance(value, dict) and "name" in value:  # one function, not in a list
        value = [value]
    if value is None or value == [] or value == {}:
        return None
    if not isinstance(value, list):
        raise BadRow(f"{where} is {type(value).__name__}; expected a list of functions with name and parameters")
    if is_deep(value):
        raise BadRow(f"{where} are nested too deeply; at most {MAX_DEPTH} levels")
    if all(isinstance(item, str) for item in value):
        if not all(isinstance(item, str) and _OBJECTS.match(item) for item in value):
            return None
        parsed = [_parsed(str(item), f"{where}[{number}]") for number, item in enumerate(value)]
        value = [tool for item in parsed for tool in (item if isinstance(item, list) else [item])]
    return _checked_tools(json.dumps(value, ensure_ascii=False, default=str), where) or None


@lru_cache(256)
def _checked_tools(text: str, where: str) -> list[Tool]:
    """Return the tools of a JSON list. Rows with the same tools share one list, which saves memory."""
    tools: list[Tool] = []
    for number, item in enumerate(_functions(json.loads(text))):
        field = f"{where}[{number}]"
        if not isinstance(item, dict):
            raise BadRow(f"{field} is {type(item).__name__}; expected an object with name and parameters")
        function = _without_nulls(item.get("function", item))
        if item.get("type") not in (None, "function") or not isinstance(function, dict):
            raise BadRow(f"{field} is of type {item.get('type')!r}; expected a function")
        name = function.get("name")
        if not isinstance(name, str) or not name.strip():
            raise BadRow(f"{field}.function.name is {name!r}; expected the function's name")
        if any(tool["function"]["name"] == name for tool in tools):
            raise BadRow(f"{field}.function.name {name!r} is duplicated")
        for key in ("input_schema", "inputSchema"):  # Anthropic's and Bedrock's names
            if key in function and "parameters" not in function:
                schema = function.pop(key)
                function["parameters"] = (
                    schema["json"] if isinstance(schema, dict) and schema.keys() == {"json"} else schema
                )
        parameters = function.get("parameters", {})
        if isinstance(parameters, str):
            parameters = _parsed(parameters, f"{field}.function.parameters")
            if is_deep(parameters):
                raise BadRow(f"{field}.function.parameters are nested too deeply; at most {MAX_DEPTH} levels")
            function["parameters"] = parameters
        if is_bare_parameters(parameters):
            parameters = function["parameters"] = schema_of(parameters)
        _validator(json.dumps(parameters), f"{field}.function.parameters")
        tools.append({"type": "function", "function": cast(Function, function)})
    return tools


def _functions(items: list[JsonValue]) -> Iterator[JsonValue]:
    """Yield the tools of a list, without the objects in which Gemini and Bedrock have them."""
    for item in items:
        if isinstance(item, dict) and isinstance(declared := item.get("functionDeclarations"), list):
            yield from declared
        else:
            yield item.get("toolSpec", item) if isinstance(item, dict) else item


def dataset_tools(value: list[JsonValue] | None, where: str) -> list[Tool] | None:
    """Return the tools of all rows of a dataset: the content of the file of `data.tools`.

    Raises:
        BadData: they are not functions with JSON schemas.
    """
    try:
        tools = None if value is None else read_tools(value, where)
        if value is not None and tools is None:
            raise BadRow("a list of names; expected functions with name and parameters")
        return tools
    except BadRow as problem:
        raise BadData(
            "The tools of the dataset are malformed.",
            where=where,
            got=str(problem),
            next_step="correct the file of data.tools",
        ) from problem


def is_deep(value: JsonValue) -> bool:
    """Tell whether a value is nested more deeply than templates and schemas can be applied to it."""
    level: list[JsonValue] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for item in level
            if isinstance(item, list | dict)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _without_nulls(value: JsonValue) -> JsonValue:
    """Leave null members out: Parquet gives every object of a column the members of all of them.

    Pydantic's `"default": null` is kept.
    """
    if isinstance(value, dict):
        kept = "default" if _takes_null(value) else None
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == kept}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _takes_null(schema: dict[str, JsonValue]) -> bool:
    kinds, types = schema.get("anyOf"), schema.get("type")
    if isinstance(kinds, list):
        types = [kind.get("type") for kind in kinds if isinstance(kind, dict)]
    return isinstance(types, str | list) and "null" in types


@lru_cache(1024)
def _validator(schema: str, where: str) -> Validator:
    """Return the validator of a JSON schema. References to other documents are not followed."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    value = with_json_types(json.loads(schema))
    if isinstance(value, dict) and not isinstance(value.get("$schema", ""), str):
        raise BadRow(f"{where}.$schema is not text")
    kind = validator_for(value) if isinstance(value, dict) else validator_for({})
    try:
        kind.check_schema(value)
    except SchemaError as error:
        raise BadRow(f"{where} is not a JSON schema: {error.message[:_MAX_SHOWN]}") from None
    registry: Registry[JsonValue] = Registry()
    registry = registry.with_resource("", DRAFT202012.create_resource(value))
    validator: Validator = kind(value, registry=registry)
    return validator


def read_calls(value: JsonValue, where: str) -> list[ToolCall]:
    """Return the calls of an answer: a list of calls, one call, or their JSON text.

    Raises:
        BadRow: the value is something else, or a call's arguments are not an object.
    """
    if isinstance(value, str):
        value = _parsed(value, where) if value.strip() else None
    if isinstance(value, dict):
        value = [value] if value else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadRow(f"{where} is {type(value).__name__}; expected a list of calls with name and arguments")
    return [_call(item, f"{where}[{number}]") for number, item in enumerate(value)]


def _call(item: JsonValue, where: str) -> ToolCall:
    function = item.get("function", item) if isinstance(item, dict) else None
    if isinstance(item, dict) and isinstance(function, str):  # {"function": "f", "arguments": {}}
        function = {"name": function, **{key: value for key, value in item.items() if key != "function"}}
    if not isinstance(item, dict) or not isinstance(function, dict):
        raise BadRow(f"{where} is {type(item).__name__}; expected an object with name and arguments")
    name, arguments = function.get("name"), _arguments(function, where)
    if not isinstance(name, str) or not name.strip():
        raise BadRow(f"{where}.function.name is {name!r}; expected the function's name")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{where}.function.arguments") if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if is_deep(arguments):
        raise BadRow(f"{where}.function.arguments are nested too deeply; at most {MAX_DEPTH} levels")
    if not isinstance(arguments, dict):
        raise BadRow(f"{where}.function.arguments is {type(arguments).__name__}; expected an object, or its JSON text")
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:  # a date, a Decimal or NaN of a Parquet column
        raise BadRow(f"{where}.function.arguments cannot be written as JSON: {error}") from None
    call: ToolCall = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(identifier := item.get("id"), str) and identifier:
        call["id"] = identifier
    return call


def _arguments(function: dict[str, JsonValue], where: str) -> JsonValue:
    """Return the arguments of a call, under the names that vendors give them; None if there are none."""
    named = {key: value for key in _ARGUMENTS if (value := function.get(key)) is not None}
    found = {key: value for key, value in named.items() if not isinstance(value, str) or value.strip()}
    if "arguments" in found:  # beside it, `parameters` may be the function's schema
        return found["arguments"]
    values = [_parsed(value, f"{where}: {key}") if isinstance(value, str) else value for key, value in found.items()]
    if any(value != values[0] for value in values):
        raise BadRow(f"{where}: {' and '.join(found)} have different values; expected the arguments once")
    others = [
        key for key, value in function.items() if key not in CALL_KEYS and isinstance(value, dict | list) and value
    ]
    if others and not function.keys() & set(_ARGUMENTS):
        raise BadRow(f"{where}: {others[0]} is not read; expected an object with name and arguments")
    return values[0] if values else None


def fitting_calls(calls: list[ToolCall], tools: list[Tool] | None, where: str) -> list[ToolCall]:
    """Return the calls, each of which fits the schema of its tool. Without tools, nothing is checked.

    Raises:
        BadRow: a call names no tool, or its arguments do not fit.
    """
    if tools is None:
        return calls
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}
    return [_fitting(call, schemas, f"{where}[{number}].function") for number, call in enumerate(calls)]


def _fitting(call: ToolCall, schemas: dict[str, JsonValue], where: str) -> ToolCall:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if name not in schemas:
        raise BadRow(f"{where}.name {name!r} is not one of the tools: {', '.join(list(schemas)[:8])}")
    call = _without_nulls_of_other_tools(call, schemas[name])
    arguments = call["function"]["arguments"]
    validator = _validator(json.dumps(schemas[name]), "tools")
    problem = _problem(validator, arguments)
    if problem is None:
        return call
    plain = _without_nulls(arguments)
    if isinstance(plain, dict) and plain != arguments and _problem(validator, plain) is None:
        return {**call, "function": {"name": name, "arguments": plain}}
    raise BadRow(f"{where}.arguments{problem}")


def _without_nulls_of_other_tools(call: ToolCall, schema: JsonValue) -> ToolCall:
    """Leave out nulls that the tool's schema does not know: Parquet gives each call the arguments of all tools."""
    known = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(known, dict):
        return call
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    kept = {key: value for key, value in arguments.items() if value is not None or key in known}
    return call if kept == arguments else {**call, "function": {"name": name, "arguments": kept}}


def _problem(validator: Validator, arguments: dict[str, JsonValue]) -> str | None:
    from referencing.exceptions import Unresolvable

    try:
        error = min(validator.iter_errors(arguments), key=lambda e: e.json_path, default=None)
    except Unresolvable as reference:
        return f": the schema of its tool refers to another document, {reference.ref[:_MAX_SHOWN]}"
    except (RecursionError, ArithmeticError, ValueError) as failure:  # such as a schema that refers to itself
        return f": the schema of its tool cannot be applied ({type(failure).__name__})"
    return None if error is None else f"{error.json_path.removeprefix('$')}: {error.message[:_MAX_SHOWN]}"


def _parsed(text: str, where: str) -> JsonValue:
    try:
        return strict_json(text)
    except json.JSONDecodeError as error:
        raise BadRow(f"{where} is not valid JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        raise BadRow(f"{where} is not valid JSON: {error}") from None


# Parameters of a tool that are not quite JSON schema: xLAM's {"city": {"type": "str, optional"}}, types such as dict.

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
        written = str(value["type"])
        properties[name] = {**{key: item for key, item in value.items() if key != "type"}, **_json_type(written)}
        if "optional" not in written.lower() and "default" not in value:
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


def _json_type(written: str) -> dict[str, JsonValue]:
    found = _BASE.fullmatch(written.split(", optional")[0].split(",optional")[0].strip())
    name = None if found is None else _TYPES.get(found[1].lower())
    return {} if name is None else {"type": name}
