"""Read YAML with line numbers. `5e-6` is a number, `no` is a word, and everything but plain data is refused."""

from __future__ import annotations

import re

import yaml
from pydantic import JsonValue

MAX_BYTES = 1_000_000
Path = tuple[str | int, ...]  # keys and indices that lead to a value


class Syntax(Exception):
    """The text is not valid YAML, or not plain data."""

    def __init__(self, line: int, message: str):
        self.line = line
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and floats."""


# YAML 1.1 reads `no` as false and `5e-6` as a string. Both are common values of training arguments.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def parse(text: str) -> tuple[JsonValue, dict[Path, int]]:
    """Return the document and the line, from 1, of each key and item.

    A date is the one value that JSON lacks; no key of a recipe accepts it.

    Raises:
        Syntax: the text is broken YAML, has a duplicated key, an alias (a few hundred bytes of them expand to gigabytes)
            or a tag, or is longer than MAX_BYTES.
    """
    if len(text) > MAX_BYTES:
        raise Syntax(1, f"a recipe has at most {MAX_BYTES:,} characters, this one has {len(text):,}")
    try:
        for event in yaml.parse(text, Loader=_Loader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.AliasEvent):
                raise Syntax(line, f"alias *{event.anchor}: write the value out instead")
            if tag := getattr(event, "tag", None):
                raise Syntax(line, f"tag {tag}: a recipe may have plain values only")
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Syntax(mark.line + 1 if mark else 1, error.problem or str(error)) from error
    except yaml.YAMLError as error:
        raise Syntax(1, str(error)) from error
    lines: dict[Path, int] = {}
    return (None, lines) if node is None else (_build(node, (), lines), lines)


def scalar(text: str) -> JsonValue:
    """Read a value as in a recipe, for `--set key=value`.

    Raises:
        Syntax: the text is not valid YAML, or not plain data.
    """
    return parse(text)[0]


def _build(node: yaml.Node, path: Path, lines: dict[Path, int]) -> JsonValue:
    """Return a node's value, and add the line of each key and item to `lines`."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, JsonValue] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise Syntax(key_node.start_mark.line + 1, "a key must be a word")
            if key in out:
                raise Syntax(key_node.start_mark.line + 1, f"key {key!r} is duplicated")
            lines[(*path, key)] = key_node.start_mark.line + 1
            out[key] = _build(value_node, (*path, key), lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), lines) for i, item in enumerate(node.value)]
    loader = _Loader("")
    try:
        value: JsonValue = loader.construct_object(node)
        return value
    except (yaml.YAMLError, ValueError) as error:
        raise Syntax(node.start_mark.line + 1, str(error)) from error
    finally:
        loader.dispose()
