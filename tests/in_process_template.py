"""Render templates in the test's own process, to test many of them quickly. `test_template_limits` compares the two."""

from __future__ import annotations

from jinja2.exceptions import TemplateError

from loraflow.data.templates.template import CompiledTemplate, variables_of
from loraflow.failures import BadModel


class InProcessTemplate:
    """The interface of `TemplateProcess`."""

    def __init__(self, source, variables):
        self._source = source
        self._compiled = CompiledTemplate(source, variables)

    def compile(self):
        pass

    def variables(self):
        return variables_of(self._source)

    def render(self, chats, *, prompt):
        return [
            self._each(n, lambda chat=chat: self._compiled.render(chat, prompt=prompt)) for n, chat in enumerate(chats)
        ]

    def marked(self, chats):
        return [self._each(n, lambda chat=chat: self._compiled.marked(chat)) for n, chat in enumerate(chats)]

    @staticmethod
    def _each(number, call):
        try:
            return call()
        except TemplateError as error:
            raise BadModel("The chat template raises an error for a chat.", got=str(error), chat=number) from error
