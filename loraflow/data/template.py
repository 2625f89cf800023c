"""A chat template, compiled once, in the environment that transformers gives it: the same sandbox, filters and marks.

transformers' own function would do, but importing it takes longer than tokenizing a small dataset, and its wrapper
turns `strftime_now` into a string. Tests compare the two environments, and what they render, name by name.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Chat = Sequence[Mapping[str, str]]
_TODAY = time.gmtime(1_721_952_000)  # some templates write today's date: equal runs would differ from day to day


class CompiledTemplate:
    """A template and the variables that it may read, such as `bos_token`."""

    def __init__(self, source: str, variables: Mapping[str, Any]):
        self._environment = _environment()
        self._template = self._environment.from_string(source)
        self._variables = {"tools": None, "documents": None, **variables}

    def render(self, chat: Chat, *, prompt: bool = False) -> str:
        """Return a chat as the model reads it; `prompt` ends it with the head of an answer."""
        return self._template.render(messages=_copy(chat), add_generation_prompt=prompt, **self._variables)

    def marked(self, chat: Chat) -> list[tuple[int, int]]:
        """Return the spans of characters that `{% generation %}` marks."""
        with self._environment.loraflow_marks() as marks:  # type: ignore[attr-defined]
            for block in self._template.generate(messages=_copy(chat), add_generation_prompt=False, **self._variables):
                marks.at += len(block)
        return marks.spans


def _copy(chat: Chat) -> list[dict[str, str]]:
    return [{**message} for message in chat]


class _Marks:
    """Where the output has got to, and the spans that were marked on the way."""

    def __init__(self) -> None:
        self.at = 0
        self.spans: list[tuple[int, int]] = []


class _Generation(Extension):
    """The block `{% generation %} … {% endgeneration %}`: its text, unchanged, and its place if somebody asks."""

    tags = {"generation"}

    def __init__(self, environment: Any):
        super().__init__(environment)
        self._marks: _Marks | None = None
        environment.extend(loraflow_marks=self._collect)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text: str = caller()
        if self._marks is not None:
            self._marks.spans.append((self._marks.at, self._marks.at + len(text)))
        return text

    @contextmanager
    def _collect(self) -> Any:
        self._marks = _Marks()
        try:
            yield self._marks
        finally:
            self._marks = None


class _Dict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates: no name may begin with an underscore, for those lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot hold {name!r}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """`tojson` without the escapes that jinja puts in for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: time.strftime(form, _TODAY),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
