"""Change single words of a YAML text, and nothing else: comments, quotes, order and line ends stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import yaml

from loraflow.config.yaml import Path, Syntax, load_plain


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
