"""A chat template is code from outside: it is rendered in a process with limits of time and memory."""

import json
import multiprocessing
import os
import time

import pytest

from loraflow.data.templates.template import CompiledTemplate
from loraflow.data.templates.template_child import SECONDS
from loraflow.data.templates.template_process import TemplateProcess
from loraflow.data.tokens.loss_mask import ChatTemplate, name_row
from loraflow.failures import BadModel, Killed
from tests.conftest import PHI3_TEMPLATE, build_tokenizer

CHATS = [[{"role": "user", "content": text}] for text in ("one", "x", "three")]
EVIL = "{% if messages[0].content == 'x' %}BOMB{% endif %}fine"  # only the second chat sets it off

MEMORY = {
    "repeat": "{{ messages[0].content * 4000000000 }}",
    "doubled text": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "concatenated": "{% set n = namespace(t='x') %}{% for i in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "width": "{{ '%3999999999s' % 'x' }}",
    "filter": "{{ 'x' | center(3999999999) }}",
    "method": "{{ 'x'.ljust(3999999999) }}",
    "list": "{{ [messages] * 3999999999 }}",
    "format": "{{ '{:>3999999999}'.format('x') }}",
}
TIME = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "number": "{{ (messages | length + 6) ** 99999999 % 3 }}",
}
OTHER = {
    "output": ("{{ messages[0].content * 18000000 }}", "far more text"),
    "macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "in each other"),
}
BOMBS = {
    # Slow ones reach the time limit of this test first: a second of processor time, or less.
    **{name: (text, "of memory|of processor time", 0) for name, text in MEMORY.items()},
    **{name: (text, "of processor time", 0) for name, text in TIME.items()},
    **{name: (*bomb, SECONDS) for name, bomb in OTHER.items()},
}


@pytest.mark.parametrize(("bomb", "limit", "seconds"), BOMBS.values(), ids=BOMBS)
def test_a_template_that_exceeds_a_limit_is_refused_and_the_chat_is_named(bomb, limit, seconds):
    template = TemplateProcess(EVIL.replace("BOMB", bomb), {}, seconds=seconds)
    start = time.monotonic()
    with pytest.raises(BadModel, match=limit) as caught:
        template.render(CHATS, prompt=True)
    assert time.monotonic() - start < 30, "one second of processor time, on a loaded machine"
    assert caught.value.where == "chat_template" and caught.value.details["chat"] == 1
    assert "'x'" in caught.value.got and "at most" in caught.value.expected
    assert template.render(CHATS[::2], prompt=False) == ["fine", "fine"], "the next chats are rendered"


@pytest.mark.parametrize(
    "source",
    ["{{ 'x' * 4000000000 }}", "{{ 7 ** 999999999 }}", "{{ " + "(" * 100_000, "{% if a %}" * 3000],
    ids=["folded text", "folded number", "parentheses", "blocks"],
)
def test_a_template_that_cannot_be_compiled_within_the_limits_is_refused(source):
    with pytest.raises(BadModel):
        TemplateProcess(source, {}, seconds=0).render(CHATS, prompt=False)


def test_an_invalid_template_is_named_at_once(tmp_path):
    build_tokenizer(tmp_path, template="{% for %}")
    with pytest.raises(BadModel, match="is not valid"):
        ChatTemplate(tmp_path)


def test_the_row_of_a_template_failure_is_named():
    template = TemplateProcess("{% if messages[0].content == 'x' %}{{ raise_exception('no') }}{% endif %}", {})
    with pytest.raises(BadModel, match="raises an error") as caught, name_row(["a:1", "a:2", "a:3"]):
        template.render(CHATS, prompt=False)
    assert caught.value.where == "chat_template, a:2" and caught.value.got == "no"


def test_good_templates_give_the_same_bytes_as_in_this_process():
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
        for text in ("plain", "ü漢😀\u2028", "\ud800 lone", "</s><|end|>\n\0", "x" * 100_000)
    ] * 250
    inside, outside = CompiledTemplate(PHI3_TEMPLATE, {"eos_token": "</s>"}), TemplateProcess(
        PHI3_TEMPLATE, {"eos_token": "</s>"}
    )  # fmt: skip
    for prompt in (True, False):
        assert outside.render(chats, prompt=prompt) == [inside.render(chat, prompt=prompt) for chat in chats]
    marked = "{% for m in messages %}a{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert TemplateProcess(marked, {}).marked(chats[:5]) == [CompiledTemplate(marked, {}).marked(c) for c in chats[:5]]


def _render_in(template, queue):
    queue.put((os.getpid(), template.render(CHATS, prompt=False)))


def test_a_forked_process_has_a_renderer_of_its_own():
    template = TemplateProcess("{{ messages[0].content }}", {})
    template.compile()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    forks = [context.Process(target=_render_in, args=(template, queue)) for _ in range(2)]
    for fork in forks:
        fork.start()
    assert template.render(CHATS, prompt=False) == ["one", "x", "three"]
    assert [queue.get(timeout=60)[1] for _ in forks] == [["one", "x", "three"]] * 2
    for fork in forks:
        fork.join()


def test_a_renderer_that_was_killed_is_a_reason_to_retry():
    template = TemplateProcess("{{ messages[0].content }}", {})
    template.compile()
    assert template._process is not None
    template._process.child.kill()
    template._process.child.wait()
    with pytest.raises(Killed):
        template.render(CHATS, prompt=False)
    assert json.dumps(template.render(CHATS, prompt=False)) == '["one", "x", "three"]'
