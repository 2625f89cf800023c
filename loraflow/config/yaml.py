"""YAML that keeps line numbers, reads `5e-6` as a number and `no` as a word, and refuses what is not plain data."""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 1_000_000
Path = tuple[str | int, ...]


class Syntax(Exception):
    """The text is no YAML that a recipe may be."""

    def __init__(self, line: int, message: str):
        self.line = line
        super().__init__(message)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's idea of booleans and floats."""


# YAML 1.1 reads `no` as false and `5e-6` as a string; both stand in people's training arguments.
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


def parse(text: str) -> tuple[Any, dict[Path, int]]:
    """Return the document and the line (from 1) of each key and item.

    Raises:
        Syntax: broken YAML, a key twice, an alias (a few hundred bytes of them unfold to gigabytes), a tag, or more
            than a megabyte.
    """
    if len(text) > MAX_BYTES:
        raise Syntax(1, f"a recipe has at most {MAX_BYTES:,} characters, this one {len(text):,}")
    try:
        for event in yaml.parse(text, Loader=_Loader):
            line = event.start_mark.line + 1 if event.start_mark else 1
            if isinstance(event, yaml.AliasEvent):
                raise Syntax(line, f"alias *{event.anchor}: write the value out instead")
            if tag := getattr(event, "tag", None):
                raise Syntax(line, f"tag {tag}: a recipe holds plain values only")
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Syntax(mark.line + 1 if mark else 1, error.problem or str(error)) from error
    except yaml.YAMLError as error:
        raise Syntax(1, str(error)) from error
    lines: dict[Path, int] = {}
    return (None, lines) if node is None else (_build(node, (), lines), lines)


def scalar(text: str) -> Any:
    """Read one value as a recipe would, for `--set key=value`."""
    return parse(text)[0]


def _build(node: yaml.Node, path: Path, lines: dict[Path, int]) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value
            if not isinstance(key, str):
                raise Syntax(key_node.start_mark.line + 1, "a key must be a word")
            if key in out:
                raise Syntax(key_node.start_mark.line + 1, f"key {key!r} stands twice")
            lines[(*path, key)] = key_node.start_mark.line + 1
            out[key] = _build(value_node, (*path, key), lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), lines) for i, item in enumerate(node.value)]
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise Syntax(node.start_mark.line + 1, str(error)) from error
    finally:
        loader.dispose()
