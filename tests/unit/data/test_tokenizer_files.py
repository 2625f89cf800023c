"""Special tokens are read as transformers reads them, whichever of a tokenizer's files names them."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from loraflow.base.template_check import check_template, conversations
from loraflow.data.templates.tokenizer_config import RECORD, special_tokens
from loraflow.data.tokens import loss_mask
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.failures import BadModel
from tests.conftest import build_tokenizer
from tests.in_process_template import InProcessTemplate

TEMPLATE = (
    "{{ bos_token }}{{ sep_token }}{{ image_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + "
    "(eos_token if m['role'] == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NAMES = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<unk>"}
TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
DECODER = {"0": {"content": "<unk>", **TOKEN, "special": True}}
# The keys of tokenizer_config.json (None removes one), and of special_tokens_map.json
FILES = {
    "the config alone": ({}, None),
    "the map alone": (dict.fromkeys(NAMES), NAMES),
    "both, with different values": ({"bos_token": "<|user|>"}, NAMES),
    "null in the config": (dict.fromkeys(NAMES, "null"), NAMES),
    "null in the map": ({}, {**NAMES, "bos_token": None}),
    "a map that is not read": ({"added_tokens_decoder": DECODER}, {**NAMES, "bos_token": "<|user|>"}),
    "objects": (dict.fromkeys(NAMES), {name: {"content": token, **TOKEN} for name, token in NAMES.items()}),
    "objects in the config": (
        {"bos_token": {"__type": "AddedToken", "content": "<s>", **TOKEN, "special": True}},
        None,
    ),
    "another named token": ({"sep_token": "<|system|>"}, None),
    "another named token in the map": ({}, {**NAMES, "sep_token": "<|system|>"}),
    "a token of the model": ({"image_token": "<|system|>"}, None),
    "extra tokens with names": ({"extra_special_tokens": {"image_token": "<|system|>"}}, None),
    "extra tokens with names in the map": ({}, {"extra_special_tokens": {"image_token": "<|system|>"}}),
    "extra tokens": ({"extra_special_tokens": ["<|system|>"]}, None),
    "additional tokens": ({"additional_special_tokens": ["<|system|>"]}, None),
    "switches": ({"add_bos_token": True, "add_eos_token": True}, None),
}
CLASSES = {
    "GPT-2's defaults": ({"tokenizer_class": "GPT2TokenizerFast", **dict.fromkeys(NAMES)}, None),
    "GPT-2's defaults and a map": (
        {"tokenizer_class": "GPT2Tokenizer", **dict.fromkeys(NAMES)},
        {"pad_token": "<unk>"},
    ),
    "Llama's class": ({"tokenizer_class": "LlamaTokenizerFast"}, None),
    "Qwen2's class": ({"tokenizer_class": "Qwen2TokenizerFast"}, NAMES),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder, TEMPLATE)
    return folder


@pytest.fixture
def folder_with(built, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_mask, "template_process", InProcessTemplate)

    def write(config, special_map):
        folder = shutil.copytree(built, tmp_path / "base")
        values = json.loads((folder / "tokenizer_config.json").read_text())
        for key, value in config.items():
            values.pop(key, None)
            if value is not None:
                values[key] = None if value == "null" else value
        (folder / "tokenizer_config.json").write_text(json.dumps(values))
        if special_map is not None:
            (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
        return folder

    return write


def require_transformers_ids(folder):
    tokenizer, template = AutoTokenizer.from_pretrained(folder), ChatTemplate(folder)
    for chat in conversations():
        if any(message.keys() & {"tools", "reasoning_content"} for message in chat):
            continue  # these templates have neither
        (encoded,) = template.encode([chat], "assistant")
        assert encoded.ids.tolist() == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        served = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert template.prompt_ids([chat]) == [served] == [encoded.ids[: encoded.prompt].tolist()]


@pytest.mark.parametrize(("config", "special_map"), FILES.values(), ids=FILES)
def test_special_tokens_equal_those_of_transformers(folder_with, config, special_map):
    folder = folder_with(config, special_map)
    assert special_tokens(folder) == AutoTokenizer.from_pretrained(folder).special_tokens_map
    require_transformers_ids(folder)
    check_template(folder)
    assert not (folder / RECORD).exists(), "the files say everything"


@pytest.mark.parametrize(("config", "special_map"), CLASSES.values(), ids=CLASSES)
def test_a_tokenizer_class_is_asked_once(folder_with, config, special_map):
    folder = folder_with(config, special_map)
    check_template(folder)
    assert special_tokens(folder) == AutoTokenizer.from_pretrained(folder).special_tokens_map
    require_transformers_ids(folder)


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}])
def test_the_post_processor_adds_no_second_bos(folder_with, config):
    folder = folder_with(config, None)
    parts = json.loads((folder / "tokenizer.json").read_text())
    bos = next(token["id"] for token in parts["added_tokens"] if token["content"] == "<s>")
    parts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    check_template(folder)
    require_transformers_ids(folder)
    (encoded,) = ChatTemplate(folder).encode([conversations()[0]], "all")
    assert (encoded.ids == bos).sum() == 1


@pytest.mark.parametrize("content", ["[]", "{", '"a"', "{" * 100_000])
def test_a_damaged_map_is_named(folder_with, content):
    folder = folder_with({}, {})
    (folder / "special_tokens_map.json").write_text(content)
    with pytest.raises(BadModel, match="special tokens cannot be read"):
        special_tokens(folder)


def test_a_template_that_renders_differently_for_transformers_is_refused(folder_with):
    folder = folder_with({}, None)
    # transformers gives a template no variable of this name; a record from elsewhere may
    (folder / RECORD).write_text(json.dumps({**NAMES, "image_token": "<|system|>"}))
    check_template(folder)
    assert json.loads((folder / RECORD).read_text()) == NAMES, "the record is corrected"
    (folder / "chat_template.jinja").write_text("{{ chat_template_kwargs is defined }}" + TEMPLATE)
    check_template(folder)


@pytest.mark.parametrize("special_map", [None, {"bos_token": "<|system|>", "eos_token": "<|end|>"}])
def test_a_tokenizer_whose_class_has_another_normalizer_is_saved_as_transformers_uses_it(folder_with, special_map):
    folder = folder_with({"tokenizer_class": "Qwen2Tokenizer"}, None)
    check_template(folder)  # the class has a pre-tokenizer of its own, too
    parts = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**parts, "normalizer": {"type": "NFKC"}}))
    if special_map is not None:  # hidden by added_tokens_decoder
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "added_tokens_decoder": DECODER}))
        (folder / "special_tokens_map.json").write_text(json.dumps(special_map))
    before = AutoTokenizer.from_pretrained(folder)
    check_template(folder)
    after = AutoTokenizer.from_pretrained(folder)
    assert after.special_tokens_map == before.special_tokens_map == special_tokens(folder)
    assert after("ﬁ ½")["input_ids"] == before("ﬁ ½")["input_ids"]
    assert ChatTemplate(folder).tokenizer.encode("ﬁ ½").ids == after("ﬁ ½")["input_ids"]
    require_transformers_ids(folder)


@pytest.mark.parametrize("where", ["eos_token", "added_tokens_decoder"])
def test_a_stop_token_that_tokenizer_json_does_not_call_special_is_special_where_it_is_for_transformers(
    folder_with, where
):
    """Several published models have `special: false` for the token that their tokenizer_config.json names as eos_token."""
    folder = folder_with({}, None)
    parts = json.loads((folder / "tokenizer.json").read_text())
    (token,) = (token for token in parts["added_tokens"] if token["content"] == "<|end|>")
    token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("eos_token", "'<|end|>'"))
    assert ChatTemplate(folder).special.count("<|end|>") == 0
    with pytest.raises(BadModel, match="does not end an answer with a control token") as caught:
        check_template(folder)
    assert "eos_token" in caught.value.next_step
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {where: "<|end|>" if where == "eos_token" else {str(token["id"]): {**token, "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **named}))
    assert ChatTemplate(folder).stop_ids() == {token["id"]}  # also in a folder that was not resolved
    check_template(folder)
    assert ChatTemplate(folder).stop_ids() == {token["id"]}
    plain = AutoTokenizer.from_pretrained(folder)
    assert plain.decode([token["id"]], skip_special_tokens=True) == ""
    assert ChatTemplate(folder).tokenizer.decode([token["id"]], skip_special_tokens=True) == ""
    require_transformers_ids(folder)


def test_a_tokenizer_that_splits_special_tokens_is_refused_with_the_key(folder_with):
    with pytest.raises(BadModel, match="splits special tokens") as caught:
        check_template(folder_with({"split_special_tokens": True}, None))
    assert caught.value.next_step == "remove split_special_tokens from tokenizer_config.json"


def test_a_tokenizer_that_transformers_cannot_open_is_refused(folder_with):
    folder = folder_with({"tokenizer_class": "T5TokenizerFast"}, None)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BadModel, match="cannot open the base's tokenizer"):
        check_template(folder)


def test_a_tokenizer_whose_class_cannot_encode_is_refused(folder_with):
    with pytest.raises(BadModel, match="cannot open the base's tokenizer") as caught:
        check_template(folder_with({"tokenizer_class": "GemmaTokenizer", "unk_token": "<none>"}, None))
    assert "not found in the vocabulary" in caught.value.got
