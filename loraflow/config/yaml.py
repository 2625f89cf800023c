"""Read YAML with line numbers, in bounded time and memory, whatever the text is.

`parse` reads a recipe: `5e-6` is a number, `no` is a word, and everything but plain data is refused. `load_plain` reads the
files of other tools, which may use aliases and merge keys. `scalars` and `apply` change single words of a text, and nothing
else: comments, quotes, order and line ends stay.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import yaml
from pydantic import JsonValue

# The limits keep the time below a second on two slow cores. The longest recipe of configs/ is a fiftieth of each.
MAX_CHARACTERS = 200_000
MAX_VALUES = 5_000  # with aliases written out: a few hundred bytes can expand to gigabytes
MAX_DEPTH = 40  # sections and lists inside each other
MAX_DIGITS = 300  # digits of a number
TOO_DEEP = f"values are nested more than {MAX_DEPTH} deep"
_CONFLICT = re.compile(r"^(<{7}|>{7})( |\r?$)", re.MULTILINE)  # a marker of git's
Path = tuple[str | int, ...]  # keys and indices that lead to a value


class Syntax(Exception):
    """The text is not valid YAML, or not plain data. The message is one line."""

    def __init__(self, line: int, message: str):
        self.line = line
        super().__init__(" ".join(message.split()))


class DuplicatedKey(Syntax):
    """A mapping has a duplicate key."""

    def __init__(self, line: int, key: str):
        super().__init__(line, f"key {key!r} is duplicated")


class _BoundedLoader(yaml.SafeLoader):
    """SafeLoader that refuses deep nesting while it reads: PyYAML's time grows with the square of the depth."""

    depth = 0
    values = 0

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        """Read `[` or `{`, unless it is too deep. The scanner is up to a thousand characters ahead of compose_node."""
        if self.flow_level >= MAX_DEPTH:
            raise Syntax(self.line + 1, TOO_DEEP)
        super().fetch_flow_collection_start(TokenClass)

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node, unless it is too deep."""
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1 if event.start_mark else 1
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Syntax(line, TOO_DEEP)
        self.values += 1
        if self.values > MAX_VALUES:
            raise Syntax(line, f"there are more than {MAX_VALUES:,} values")
        self.check_event_is_allowed(event, line)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and len(node.value) > MAX_DIGITS:
            raise Syntax(line, f"a number has at most {MAX_DIGITS} characters, this one has {len(node.value):,}")
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> JsonValue:
        """Return a node's value. Python's errors, such as that of a 13th month, get the node's line."""
        try:
            value: JsonValue = super().construct_object(node, deep)
            return value
        except (ValueError, OverflowError) as error:
            raise Syntax(node.start_mark.line + 1, str(error)) from error

    def check_event_is_allowed(self, event: yaml.Event, line: int) -> None:
        """Accept everything; a subclass may raise Syntax."""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(_BoundedLoader):
    """A loader with YAML 1.2's booleans and floats, for plain data without aliases and tags."""

    def check_event_is_allowed(self, event: yaml.Event, line: int) -> None:
        """Refuse aliases and tags."""
        if isinstance(event, yaml.AliasEvent):
            raise Syntax(line, f"alias *{event.anchor}: write the value out instead")
        if tag := getattr(event, "tag", None):
            raise Syntax(line, f"tag {tag}: a recipe may have plain values only")


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
    """Return the document of a recipe and the line, from 1, of each key and item.

    A date is the one value that JSON lacks; no key of a recipe accepts it.

    Raises:
        Syntax: the text is broken YAML, has a duplicated key, an alias or a tag, or exceeds a limit of this module.
    """
    node = _compose(text, _Loader)
    lines: dict[Path, int] = {}
    return (None, lines) if node is None else (_build(node, (), lines), lines)


def load_plain(text: str) -> JsonValue:
    """Return the document of another tool's file: YAML 1.1 as SafeLoader reads it, with aliases and merge keys.

    Raises:
        Syntax: the text is broken YAML, has a duplicated key, or exceeds a limit of this module.
    """
    node = _compose(text, _BoundedLoader)
    if node is None:
        return None
    _count_nodes(node, {}, set())
    loader = _BoundedLoader("")
    try:
        value: JsonValue = loader.construct_document(node)
        return value
    except yaml.YAMLError as error:
        raise _syntax_error(text, error) from error
    finally:
        loader.dispose()


def _compose(text: str, kind: type[_BoundedLoader]) -> yaml.Node | None:
    if len(text) > MAX_CHARACTERS:
        raise Syntax(1, f"at most {MAX_CHARACTERS:,} characters are read, this text has {len(text):,}")
    if marker := _CONFLICT.search(text):
        line = text.count("\n", 0, marker.start()) + 1
        raise Syntax(
            line, "conflict markers of git: keep one of the two versions, and remove the lines with <<<, === and >>>"
        )
    try:
        loader = kind(text)
        try:
            node: yaml.Node | None = loader.get_single_node()
            return node
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _syntax_error(text, error) from error


def _syntax_error(text: str, error: Exception) -> Syntax:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        problem = error.problem or str(error)
        if problem.startswith("but ") and error.context:
            problem = f"{error.context}, {problem}"
        if problem.startswith("found character '\\t'"):
            problem = "a tab, where YAML takes spaces only"
        return Syntax(mark.line + 1 if mark else 1, problem)
    if isinstance(error, yaml.reader.ReaderError) and isinstance(error.character, int):
        line = text.count("\n", 0, error.position) + 1
        return Syntax(line, f"the character U+{error.character:04X} is not allowed")
    return Syntax(1, str(error))


def _count_nodes(node: yaml.Node, counted: dict[int, int], parents: set[int]) -> int:
    """Return how many nodes a node expands to."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    line = node.start_mark.line + 1
    if id(node) in parents:
        raise Syntax(line, "an alias names a value that it is part of")
    if id(node) not in counted:
        inside, keys = parents | {id(node)}, set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = (key.tag, str(key.value))
            if name in keys and name[1] != "<<":  # SafeLoader would take the last one
                raise DuplicatedKey(key.start_mark.line + 1, name[1])
            keys.add(name)
        children = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        counted[id(node)] = 1 + sum(_count_nodes(child, counted, inside) for child in children)
        if counted[id(node)] > MAX_VALUES:
            raise Syntax(line, f"with its aliases the file has more than {MAX_VALUES:,} values")
    return counted[id(node)]


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
                raise DuplicatedKey(key_node.start_mark.line + 1, key)
            lines[(*path, key)] = key_node.start_mark.line + 1
            out[key] = _build(value_node, (*path, key), lines)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, i), lines) for i, item in enumerate(node.value)]
    loader = _Loader("")
    try:
        value: JsonValue = loader.construct_object(node)
    except yaml.YAMLError as error:
        raise Syntax(node.start_mark.line + 1, str(error)) from error
    finally:
        loader.dispose()
    if isinstance(value, float) and not math.isfinite(value):
        raise Syntax(node.start_mark.line + 1, f"{node.value} is too large")
    return value


class Edit(NamedTuple):
    """Replace the characters from `start` to `end` of a text."""

    start: int
    end: int
    text: str


class Scalar(NamedTuple):
    """A key or a plain value of a document, by its place in the text."""

    path: Path  # keys and indices that lead to it; a key has its own name last
    is_key: bool
    value: str
    start: int
    end: int

    def replaced_by(self, text: str) -> Edit:
        """Return the edit that writes another word in its place."""
        return Edit(self.start, self.end, text)


def scalars(text: str) -> Iterator[Scalar]:
    """Yield the keys and scalar values of a YAML text, in their order. What an alias repeats is not repeated.

    Raises:
        Syntax: the text is not valid YAML, or beyond the limits of `loraflow.config.yaml`.
    """
    load_plain(text)  # also refuses a text beyond the limits
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise Syntax(1, str(error)) from error
    if root is not None:
        yield from _scalars(root, (), set())


def first_lines(text: str) -> dict[Path, int]:
    """Return the line, from 1, at which each key and item of a YAML text begins.

    Raises:
        Syntax: see `scalars`.
    """
    lines: dict[Path, int] = {}
    for found in scalars(text):
        line = text.count("\n", 0, found.start) + 1
        for end in range(1, len(found.path) + 1):
            lines.setdefault(found.path[:end], line)
    return lines


def nearest_line(lines: dict[Path, int], path: Path) -> int:
    """Return the line of a key or item, or of the nearest section around it; 0 if there is none."""
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 0)


def _scalars(node: yaml.Node, path: Path, seen: set[int]) -> Iterator[Scalar]:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                inner = (*path, str(key.value))
                yield Scalar(inner, True, str(key.value), key.start_mark.index, key.end_mark.index)
                yield from _scalars(value, inner, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _scalars(value, (*path, number), seen)
    elif isinstance(node, yaml.ScalarNode):
        yield Scalar(path, False, str(node.value), node.start_mark.index, node.end_mark.index)


def apply(text: str, edits: Iterable[Edit]) -> str:
    """Return the text with all edits, which must not overlap."""
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text
