"""The template that is trained and served: chosen by the recipe, with its date and its thinking fixed."""

import json
import re
import time
from importlib.util import find_spec

import pytest
from transformers import AutoTokenizer

from loraflow.data.chats import without_reasoning
from loraflow.data.templates import served_template
from loraflow.data.templates.served_template import pinned, pinned_date, read_named_template, write_served_template
from loraflow.data.templates.template import CompiledTemplate
from loraflow.data.tokens import loss_mask
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadConfig, BadModel
from tests.conftest import PHI3_TEMPLATE, build_tokenizer
from tests.in_process_template import InProcessTemplate
from tests.unit.data.test_trl_templates import ONE, TEMPLATES, THOUGHT, TWO

needs_trl = pytest.mark.skipif(find_spec("trl") is None, reason="trl is not installed")
MARKED = PHI3_TEMPLATE.replace(
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
    "{{'<|assistant|>\n'}}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}",
)
DATED = "{{ '<|system|>' + strftime_now('%d %b %Y') + '<|end|>' }}" + PHI3_TEMPLATE
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    for module in (loss_mask, served_template):
        monkeypatch.setattr(module, "template_process", InProcessTemplate)


def text_of(encoded, template) -> str:
    return template.tokenizer.decode(encoded.ids[encoded.labels != IGNORED].tolist(), skip_special_tokens=False)


@needs_trl
@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if "strftime_now" in text])
def test_the_date_is_the_same_in_training_and_on_any_day_of_serving(name):
    fixed = CompiledTemplate(pinned(TEMPLATES[name]), VARIABLES)
    today = CompiledTemplate(TEMPLATES[name], VARIABLES)
    trained = today.render(ONE)
    assert fixed.render(ONE) == trained and re.search("2024-07-26|26 Jul 2024", trained)
    fixed._environment.globals["strftime_now"] = lambda form: time.strftime(form, time.gmtime(0))
    today._environment.globals["strftime_now"] = fixed._environment.globals["strftime_now"]
    assert fixed.render(ONE) == trained != today.render(ONE)
    assert pinned_date(pinned(TEMPLATES[name])) == "2024-07-26"
    assert pinned(pinned(TEMPLATES[name])) == pinned(TEMPLATES[name]), "a merged model can be a base"


@needs_trl
@pytest.mark.parametrize(
    "name",
    [
        name
        for name, text in TEMPLATES.items()
        if re.search(r"\benable_thinking\b", re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL))
    ],
)
def test_a_template_that_is_fixed_not_to_think_equals_the_switch(name):
    fixed, free = CompiledTemplate(pinned(TEMPLATES[name], no_thinking=True), VARIABLES), CompiledTemplate(
        TEMPLATES[name], VARIABLES
    )  # fmt: skip
    free._variables["enable_thinking"] = False
    for chat, prompt in ((ONE, False), (ONE[:1], True), (TWO, False), (TWO[:3], True)):
        assert fixed.render(chat, prompt=prompt) == free.render(chat, prompt=prompt)
    fixed._variables["enable_thinking"] = free._variables["enable_thinking"] = True
    assert fixed.render(ONE[:1], prompt=True) == free.render(ONE[:1], prompt=True), "a server can still ask for it"


@needs_trl
@pytest.mark.parametrize("name", ["qwen3", "nemotron_3_nano", "qwen3_6", "qwen3_training"])
def test_an_empty_think_block_belongs_to_the_prompt(tmp_path, name):
    build_tokenizer(tmp_path, TEMPLATES[name].replace("<|im_end|>", "<|end|>"))
    write_served_template(tmp_path, None, no_thinking=True)
    template, served = ChatTemplate(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    (encoded,) = template.encode([ONE], "assistant")
    assert text_of(encoded, template).rstrip() == "a color<|end|>"
    prompt = served.apply_chat_template(ONE[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded.ids[: encoded.prompt].tolist() == prompt and "</think>" in served.decode(prompt)


@needs_trl
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_without_a_switch_the_prompt_no_longer_opens_the_reasoning(tmp_path, name):
    build_tokenizer(tmp_path, TEMPLATES[name].replace("<｜end▁of▁sentence｜>", "<|end|>"))
    own = CompiledTemplate(TEMPLATES[name], {**VARIABLES, "eos_token": "<|endoftext|>"}).render(ONE[:1], prompt=True)
    write_served_template(tmp_path, None, no_thinking=True)
    template, served = ChatTemplate(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for chat in (ONE, TWO):
        (encoded,) = template.encode([chat], "assistant")
        assert encoded.ids.tolist() == served.apply_chat_template(chat, return_dict=True)["input_ids"]
        prompt = served.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert encoded.ids[: encoded.prompt].tolist() == prompt
    assert text_of(encoded, template) == "a color<|end|>the house<|end|>"
    asked = served.apply_chat_template(ONE[:1], add_generation_prompt=True, tokenize=False)
    assert own.rstrip() == asked + "<think>"
    once = pinned(TEMPLATES[name], no_thinking=True)
    assert pinned(once, no_thinking=True) == once, "a merged model can be a base"


@pytest.mark.parametrize(
    "block",
    ["<|channel>thought\n<channel|>", "<|START_THINKING|><|END_THINKING|>", "<think>\n\n</think>\n\n", "\n<think></think>",
     "<seed:think></seed:think>"],
)  # fmt: skip
def test_an_empty_block_that_is_in_prompts_only_is_removed(tmp_path, block):
    """Gemma 4 and EXAONE 4 are served with it, and render answers without."""
    start = "{{ '<|assistant|>\n' }}"
    with_block = PHI3_TEMPLATE.replace(start, start + f"{{% if not enable_thinking %}}{{{{ {block!r} }}}}{{% endif %}}")
    build_tokenizer(tmp_path, with_block)
    with pytest.raises(BadModel, match="differently in training") as caught:
        ChatTemplate(tmp_path).encode([ONE], "assistant")
    assert "data.thinking: empty" in caught.value.next_step
    write_served_template(tmp_path, None, no_thinking=True)
    plain = CompiledTemplate(PHI3_TEMPLATE, VARIABLES)
    fixed = CompiledTemplate((tmp_path / "chat_template.jinja").read_text(), VARIABLES)
    assert fixed.render(TWO) == plain.render(TWO)
    assert fixed.render(ONE[:1], prompt=True) == plain.render(ONE[:1], prompt=True)
    (encoded,) = ChatTemplate(tmp_path).encode([ONE], "assistant")
    assert encoded.labels[-1] == encoded.ids[-1]


@pytest.mark.parametrize(
    ("prompt", "head"),
    [
        ("<think>\n", "<think>\n\n</think>\n\n"),  # Qwen3-Thinking-2507
        ("<think>\n", "<think>\n\n</think>\n"),  # StepFun3.5-Flash
        ("<|START_THINKING|><|END_THINKING|>", "<|START_RESPONSE|>"),  # Command R7B
    ],
)
@pytest.mark.parametrize("condition", ["true", "not enable_thinking"])
def test_answers_that_begin_with_a_block_of_their_own_follow_prompts_without_one(tmp_path, prompt, head, condition):
    start, answer = "{{ '<|assistant|>\n' }}", "{{'<|assistant|>\n' + message['content']"
    answers = PHI3_TEMPLATE.replace(answer, f"{{{{'<|assistant|>\n' + {head!r} + message['content']")
    source = answers.replace(start, start + f"{{% if {condition} %}}{{{{ {prompt!r} }}}}{{% endif %}}")
    own = CompiledTemplate(source, {**VARIABLES, "eos_token": "<|endoftext|>"})
    assert own.render(ONE[:1], prompt=True).endswith(prompt)
    build_tokenizer(tmp_path, source)
    write_served_template(tmp_path, None, no_thinking=True)
    template, served = ChatTemplate(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for chat in (ONE, TWO):
        assert template.render([chat]) == [own.render(chat)], "the texts stay as they are"
        asked = served.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
        assert asked == own.render(chat[:-1], prompt=True).removesuffix(prompt)
    (encoded,) = template.encode([ONE], "assistant")
    prompt_ids = served.apply_chat_template(ONE[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded.ids[: encoded.prompt].tolist() == prompt_ids
    assert text_of(encoded, template).startswith(f"{head}a color<|end|>")
    once = served.chat_template
    assert pinned(once, no_thinking=True) == once, "a merged model can be a base"


def test_answers_that_only_open_the_reasoning_are_refused():
    """Nemotron Nano 2 renders `<think>` and the answer: without it in prompts, answers would be learned as reasoning."""
    opened = PHI3_TEMPLATE.replace("<|assistant|>\n", "<|assistant|>\n<think>\n")
    with pytest.raises(BadModel, match="cannot put an empty think block") as caught:
        pinned(opened, no_thinking=True)
    assert "data.thinking to strip" in caught.value.next_step


@pytest.mark.parametrize("defined", ["", "{% set enable_thinking = enable_thinking | default(true) %}"])
def test_a_template_that_thinks_unless_it_is_told_not_to_is_told_so_before_its_empty_block_is_removed(defined):
    start, block = "{{ '<|assistant|>\n' }}", "<|START_THINKING|><|END_THINKING|>"
    thinks = f"{{% if enable_thinking is not defined or enable_thinking %}}<|think|>{{% else %}}{block}{{% endif %}}"
    source = defined + PHI3_TEMPLATE.replace(start, start + thinks)
    own, once = CompiledTemplate(source, VARIABLES), pinned(source, no_thinking=True)
    assert own.render(ONE[:1], prompt=True).endswith("<|think|>")
    fixed, plain = CompiledTemplate(once, VARIABLES), CompiledTemplate(PHI3_TEMPLATE, VARIABLES)
    for chat, prompt in ((ONE, False), (ONE[:1], True), (TWO, False), (TWO[:3], True)):
        assert fixed.render(chat, prompt=prompt) == plain.render(chat, prompt=prompt)
    fixed._variables["enable_thinking"] = True
    assert fixed.render(ONE[:1], prompt=True).endswith("<|think|>"), "a server can still ask for it"
    assert pinned(once, no_thinking=True) == once, "a merged model can be a base"


@pytest.mark.parametrize(
    "text",
    ["{# enable_thinking #}", "{{ m.thinking }}", "{{ m['thinking'] }}", "thinking", "{% set n = namespace(thinking=true) %}",
     "{% set thinking = 1 %}{{ thinking }}"],
)  # fmt: skip
def test_a_template_without_the_switch_cannot_be_fixed(text):
    with pytest.raises(BadModel, match="cannot put an empty think block"):
        pinned(text + PHI3_TEMPLATE, no_thinking=True)


@pytest.mark.parametrize(
    ("source", "match"),
    [("{% if x %}" * 2000 + "{% endif %}" * 2000, "recursion limit"), ("{{ (", "not valid"),
     ("{{ 'a' * 10**11 }}", "cannot put an empty think block")],
)  # fmt: skip
def test_a_templates_switch_is_looked_for_with_limits_of_time_and_memory(monkeypatch, source, match):
    monkeypatch.undo()
    with pytest.raises(BadModel, match=match):
        pinned(source, no_thinking=True)


def test_a_template_without_a_date_stays_as_it_is(tmp_path):
    build_tokenizer(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert write_served_template(tmp_path, None, no_thinking=False) is None
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_recipes_template_replaces_the_models(tmp_path):
    build_tokenizer(tmp_path, "{{ messages }}")
    assert write_served_template(tmp_path, DATED, no_thinking=False) == "2024-07-26"
    served = AutoTokenizer.from_pretrained(tmp_path)
    (encoded,) = ChatTemplate(tmp_path).encode([ONE], "assistant")
    assert encoded.ids.tolist() == served.apply_chat_template(ONE, return_dict=True)["input_ids"]
    assert "26 Jul 2024" in served.decode(encoded.ids)


@pytest.mark.parametrize("where", ["files", "two defaults", "list", "object"])
def test_a_second_template_renders_the_chats_with_tools_as_in_transformers(tmp_path, where):
    tool_use = "  {%- for t in tools %}{{ t['function']['name'] }}{% endfor %}\n" + PHI3_TEMPLATE + "  \n  \n"
    plain = "\n  " + PHI3_TEMPLATE + "\n"
    build_tokenizer(tmp_path, plain)
    named = {"default": plain, "tool_use": tool_use}
    if where in ("list", "object"):
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "chat_template.jinja").unlink()
        listed = named if where == "object" else [{"name": n, "template": text} for n, text in named.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": listed}))
    else:
        (tmp_path / "chat_template.jinja").write_text(plain if where == "files" else "not the template {{ messages }}")
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use)
        if where == "two defaults":
            (tmp_path / "additional_chat_templates" / "default.jinja").write_text(plain)
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    own = AutoTokenizer.from_pretrained(tmp_path)
    expected = [own.apply_chat_template(ONE, tools=given, tokenize=False) for given in (None, tools)]
    assert expected[1].lstrip().startswith("weather") and "weather" not in expected[0] and "not the" not in expected[0]
    chats = [ONE, [{**ONE[0], "tools": tools}, ONE[1]]]
    assert ChatTemplate(tmp_path).render(chats) == expected, "a merged model that other programs saved"

    write_served_template(tmp_path, None, no_thinking=False)
    served, template = AutoTokenizer.from_pretrained(tmp_path), ChatTemplate(tmp_path)
    assert isinstance(served.chat_template, str)
    assert [served.apply_chat_template(ONE, tools=given, tokenize=False) for given in (None, tools)] == expected
    assert template.render(chats) == expected


@pytest.mark.parametrize("in_config", [False, True])
def test_a_template_with_marks_only_marks_the_answers(tmp_path, in_config):
    build_tokenizer(tmp_path)
    if in_config:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "chat_template.jinja").unlink()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": PHI3_TEMPLATE}))
    unmarked = text_of(ChatTemplate(tmp_path).encode([ONE], "assistant")[0], ChatTemplate(tmp_path))
    write_served_template(tmp_path, MARKED, no_thinking=False)
    template = ChatTemplate(tmp_path)
    (encoded,) = template.encode([ONE], "assistant")
    assert unmarked == "a color<|end|><|endoftext|>" and text_of(encoded, template) == "a color<|end|>"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == PHI3_TEMPLATE


def test_a_training_template_that_renders_other_text_is_refused_with_the_first_difference(tmp_path):
    build_tokenizer(tmp_path)
    write_served_template(tmp_path, MARKED.replace("<|system|>\n", "<|system|>"), no_thinking=False)
    template = ChatTemplate(tmp_path)
    assert len(template.encode([ONE], "assistant")) == 1
    chats = [ONE, [{"role": "system", "content": "be brief"}, *ONE]]
    with pytest.raises(BadModel, match="renders another text than the model's own template") as caught:
        template.encode(chats, "assistant")
    assert caught.value.details["chat"] == 1
    assert "<|system|>\\nbe brief" in caught.value.expected and "<|system|>be brief" in caught.value.got


@needs_trl
def test_a_template_is_named_by_file_or_by_trls_name(tmp_path):
    (tmp_path / "mine.jinja").write_text(DATED)
    assert read_named_template(str(tmp_path / "mine.jinja")) == DATED
    assert read_named_template("qwen3") == TEMPLATES["qwen3"]
    with pytest.raises(BadConfig, match=r"no such chat template(.|\n)*qwen3_training"):
        read_named_template("qwen33")
    (tmp_path / "empty.jinja").touch()
    with pytest.raises(BadConfig, match="not a chat template"):
        read_named_template(str(tmp_path / "empty.jinja"))


def test_reasoning_is_removed_from_answers_only():
    chat = [{"role": "user", "content": "<think>x</think>y"}, *THOUGHT[1:]]
    assert [m["content"] for m in without_reasoning(chat)] == ["<think>x</think>y", "a color"]
    for content in (
        "cat\n</think>\n\ntwo",
        "[THINK]cat[/THINK]two",
        "<think></think>two",
        " <think>a</think><think>b</think>\n two",
    ):
        assert without_reasoning([{"role": "assistant", "content": content}])[0]["content"] == "two"
    assert without_reasoning(ONE) == ONE
