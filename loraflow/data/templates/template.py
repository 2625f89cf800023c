"""Compile and render chat templates in the same Jinja environment as transformers: sandbox, filters, `{% generation %}`.

Importing transformers' own function takes longer than tokenizing a small dataset, and today's date would change the
output from day to day. Tests compare the two environments and the texts that they render.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from loraflow.data.chats import Chat, Message

if TYPE_CHECKING:  # each process that renders imports this module, so it has to be light
    from pydantic import JsonValue

MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "\ue0a1question\ue0a1"  # no chat contains these characters
TODAY = time.gmtime(1_721_952_000)  # a constant date, because some templates write today's


def variables_of(source: str) -> set[str]:
    """Return the names that a template reads and does not define. Jinja computes constants, which may need much memory."""
    environment = _environment()
    return meta.find_undeclared_variables(environment.parse(source))


class CompiledTemplate:
    """A template and the variables that it reads, such as `bos_token`.

    Texts are given to it as texts; if it does not render them, as lists of parts.

    Raises:
        TemplateError: the source is not a valid template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]):
        self._environment = _environment()
        self._marks = _Generation.of(self._environment)
        self._template = self._environment.from_string(source)
        self._variables: dict[str, str | None] = {"tools": None, "documents": None, **variables}
        self._takes_parts: bool | None = None  # asked with the first chat

    def render(self, chat: Chat, *, prompt: bool = False) -> str:
        """Return a chat as the model reads it. `prompt` adds the head of an answer (add_generation_prompt)."""
        values = self._values(chat)
        return self._template.render(**values, add_generation_prompt=prompt)

    def marked(self, chat: Chat) -> list[tuple[int, int]]:
        """Return the spans of characters that are inside `{% generation %}` blocks."""
        values = self._values(chat)  # before marks are collected, because it may render a probe
        with self._marks.collect() as marks:
            for block in self._template.generate(**values, add_generation_prompt=False):
                marks.at += len(block)
        return marks.spans

    def _values(self, chat: Chat) -> dict[str, object]:
        """Return the variables of a template. A chat's tools are in its first message."""
        if self._takes_parts is None:
            self._takes_parts = self._reads_parts_only()
        messages = [aliased(message) for message in chat]
        if self._takes_parts:
            messages = [in_parts(message) for message in messages]
        tools = messages[0].pop("tools", None) if messages else None
        return {**self._variables, "messages": messages, **({} if tools is None else {"tools": tools})}

    def _reads_parts_only(self) -> bool:
        """Tell whether the template renders a text only in a list of parts, as some of vision models: servers send it so."""
        asked: dict[str, object] = {"role": "user", "content": _PROBE}
        for message in (asked, in_parts(asked)):
            try:
                text = self._template.render(**self._variables, messages=[message], add_generation_prompt=False)
            except Exception:  # a template may refuse such a chat, and can raise anything
                continue
            if _PROBE in text:
                return message is not asked
        return False


def in_parts(message: Mapping[str, object]) -> dict[str, object]:
    """Return a message whose content is a list of parts, with its text as the only part."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def aliased(message: Message) -> dict[str, object]:
    """Return a copy of a message. As in transformers, reasoning has a second name, which gpt-oss's template reads."""
    if "reasoning_content" in message:
        return {"thinking": message["reasoning_content"], **message}
    return {**message}


class _Marks:
    """The length of the output so far, and the spans that were marked in it."""

    def __init__(self) -> None:
        self.at = 0
        self.spans: list[tuple[int, int]] = []


class _Generation(Extension):
    """The block `{% generation %} … {% endgeneration %}`: renders its text unchanged and can record its span."""

    tags = {"generation"}

    def __init__(self, environment: Environment):
        super().__init__(environment)
        self._marks: _Marks | None = None

    @classmethod
    def of(cls, environment: Environment) -> _Generation:
        """Return the environment's instance of this extension."""
        extension = environment.extensions[cls.identifier]
        assert isinstance(extension, cls)
        return extension

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        text = caller()
        if self._marks is not None:
            self._marks.spans.append((self._marks.at, self._marks.at + len(text)))
        return text

    @contextmanager
    def collect(self) -> Iterator[_Marks]:
        """Record the spans of blocks that are rendered meanwhile."""
        self._marks = _Marks()
        try:
            yield self._marks
        finally:
            self._marks = None


class _Dict:
    """`dict` for templates, without the class's other attributes. A template may pass any arguments and values."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates. Names that begin with an underscore are refused: they could lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):  # a template may pass anything as a name
        raise SecurityError(f"a namespace of a chat template cannot hold {name!r}")


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(
    value: JsonValue,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of Jinja's own `tojson`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": _refuse,
        "strftime_now": lambda form: time.strftime(form, TODAY),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment
