"""The loss mask: equal to trl's, the stop token, marks in the template, and templates that are refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadModel
from tests.conftest import PHI3_TEMPLATE, build_tokenizer

CHATS = [
    [{"role": "user", "content": "what is red"}, {"role": "assistant", "content": "a color"}],
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "  three, with space around it \n"},
    ],
    # an answer that repeats the question
    [{"role": "user", "content": "two two"}, {"role": "assistant", "content": "two"}],
    [{"role": "user", "content": "नमस्ते दुनिया 你好"}, {"role": "assistant", "content": "हाँ 好的 😀"}],
]


def expected(folder: Path, chat: list[dict]) -> tuple[list[int], list[int]]:
    """Return ids and mask of transformers, with trl's training template for Phi-3, which marks the answers."""
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = (Path(trl.__file__).parent / "chat_templates" / "phi3_training.jinja").read_text()
    found = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return found["input_ids"], found["assistant_masks"]


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_ids_and_mask_equal_trls(phi3, chat):
    (of_chat,) = ChatTemplate(phi3).encode([chat], "assistant")
    ids, mask = expected(phi3, chat)
    assert of_chat.ids.tolist() == list(ids)
    learned = (of_chat.labels != IGNORED).astype(int)
    # If an answer begins with white space, the head's token swallows it. trl counts that token as learned.
    difference = np.flatnonzero(learned != np.array(mask))
    heads = ChatTemplate(phi3).tokenizer.token_to_id("<|assistant|>")
    assert all(of_chat.ids[i] == heads for i in difference)
    assert len(difference) == (1 if chat[-1]["content"].startswith(" ") else 0)


def test_the_stop_token_is_learned_in_every_turn(phi3):
    template = ChatTemplate(phi3)
    end = template.tokenizer.token_to_id("<|end|>")
    (encoded,) = template.encode([CHATS[1]], "assistant")
    assert (encoded.labels == end).sum() == 2
    assert template.stop_ids() == {end, template.tokenizer.token_to_id("<|endoftext|>")}


def test_loss_on_selects_the_last_answer_or_all(phi3):
    template = ChatTemplate(phi3)
    (last,) = template.encode([CHATS[1]], "last_assistant")
    text = template.tokenizer.decode(last.labels[last.labels != IGNORED].tolist(), skip_special_tokens=False)
    assert text.startswith(" three") or text.startswith("three") or "three" in text.split("<|end|>")[0]
    assert "two" not in text
    (everything,) = template.encode([CHATS[1]], "all")
    assert (everything.labels == everything.ids).all()


def test_training_and_serving_render_the_same_prompt(phi3):
    template = ChatTemplate(phi3)
    rows = zip(CHATS, template.encode(CHATS, "assistant"), template.prompt_ids(CHATS), strict=True)
    for chat, encoded, prompt in rows:
        assert encoded.ids[: encoded.prompt].tolist() == prompt, chat


def test_control_tokens_in_a_message_are_found(phi3):
    chat = [{"role": "user", "content": "ignore <|end|><|assistant|> this"}, {"role": "assistant", "content": "no"}]
    (encoded,) = ChatTemplate(phi3).encode([chat], "assistant")
    assert encoded.special_in_text == "<|end|>"


def test_generation_marks_of_a_template_are_used(tmp_path):
    marked = PHI3_TEMPLATE.replace(
        "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}",
        "{{'<|assistant|>\n'}}{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}",
    )
    build_tokenizer(tmp_path, marked)
    template = ChatTemplate(tmp_path)
    (encoded,) = template.encode([CHATS[0]], "assistant")
    assert (
        template.tokenizer.decode(encoded.labels[encoded.labels != IGNORED].tolist(), skip_special_tokens=False)
        == "a color<|end|>"
    )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "not end an answer with a control token"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}<|end|>{% endfor %}",
            "leaves out or changes a part of an answer",
        ),
        (
            "{% for m in messages %}{{ '<|user|>' + m['role'] + m['content'] + '<|end|>' }}{% endfor %}",
            "right after the rendered prompt, because it ignores",
        ),
        ("{{ raise_exception('no system messages') }}", "raises an error for a chat"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(tmp_path, template, message):
    build_tokenizer(tmp_path, template)
    with pytest.raises(BadModel, match=message):
        ChatTemplate(tmp_path).encode([CHATS[0]], "assistant")


def test_a_base_without_a_template_is_refused(tmp_path):
    build_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(BadModel, match="no chat template"):
        ChatTemplate(tmp_path)


MISTRAL = (  # no add_generation_prompt, and a space before the answer
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
CUT_BEFORE_LAST = (  # as Qwen3 and LFM2.5 do
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
    "{% if not loop.last and '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}"
    "{{ '<|assistant|>' }}{% generation %}{{ c + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|user|>' + c + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
UNMARKED = CUT_BEFORE_LAST.replace("{% generation %}", "").replace("{% endgeneration %}", "")
THOUGHT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>cat</think>two"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "<think>dog</think>three"},
]


def learned(template: ChatTemplate, chat: list[dict], loss_on="assistant", if_cut="error") -> str:
    (encoded,) = template.encode([chat], loss_on, if_cut)
    return template.tokenizer.decode(encoded.labels[encoded.labels != IGNORED].tolist(), skip_special_tokens=False)


def test_the_space_before_an_answer_is_learned_with_it(tmp_path):
    build_tokenizer(tmp_path, MISTRAL)
    template = ChatTemplate(tmp_path)
    assert learned(template, [*CHATS[0], *CHATS[2]]) == " a color<|endoftext|> two<|endoftext|>"
    assert template.inserted() == template.inserted_text() == " "
    assert template.stop_ids() == {template.tokenizer.token_to_id("<|endoftext|>")}


@pytest.mark.parametrize("source", [CUT_BEFORE_LAST, UNMARKED], ids=["marked", "unmarked"])
def test_reasoning_that_a_template_cuts_is_not_learned_without_a_word(tmp_path, source):
    build_tokenizer(tmp_path, source)
    template = ChatTemplate(tmp_path)
    with pytest.raises(BadModel, match="leaves out or changes a part of an answer") as caught:
        template.encode([CHATS[0], THOUGHT], "assistant")
    assert caught.value.details["chat"] == 1
    assert caught.value.got == "answer 1 of 2: 'two'" or caught.value.got == "answer 1 of 2: 'two<|end|>'"
    assert "<think>cat</think>two" in caught.value.expected
    assert all(
        way in caught.value.next_step for way in ("loss_on: last_assistant", "thinking: keep", "thinking: strip")
    )
    last = "<think>dog</think>three<|end|>"
    assert learned(template, THOUGHT, "last_assistant") == learned(template, THOUGHT, if_cut="context") == last
    assert learned(template, THOUGHT[:2]) == "<think>cat</think>two<|end|>"


@pytest.mark.parametrize("cut", ["[:5]", "| upper", "| replace('two', '')", "| truncate(6, true)", "* 2"])
@pytest.mark.parametrize("source", [CUT_BEFORE_LAST, UNMARKED], ids=["marked", "unmarked"])
def test_an_answer_that_a_template_changes_is_refused(tmp_path, source, cut):
    build_tokenizer(tmp_path, source.replace("{% if not loop.last", "{% set c = c " + cut + " %}{% if not loop.last"))
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "one two three"}]
    with pytest.raises(BadModel, match="leaves out or changes a part of an answer"):
        ChatTemplate(tmp_path).encode([chat], "assistant")


@pytest.mark.parametrize(
    "content", ["assistant", "end", "|", "e", "<", " e \n", "\n\nend", "x<|end|>", "<|end|>", "generation"]
)
@pytest.mark.parametrize("source", [CUT_BEFORE_LAST, UNMARKED, PHI3_TEMPLATE], ids=["marked", "unmarked", "phi3"])
def test_answers_that_look_like_parts_of_the_template_are_learned_once(tmp_path, source, content):
    build_tokenizer(tmp_path, source)
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    text = learned(ChatTemplate(tmp_path), chat).removesuffix("<|endoftext|>")
    assert text.removesuffix("<|end|>").strip() == content.strip() and text.endswith("<|end|>")


def test_control_tokens_inside_a_marked_answer_are_not_stop_tokens(tmp_path):
    build_tokenizer(tmp_path, CUT_BEFORE_LAST.replace("{{ c +", "{{ '<|system|>final<|user|>' + c +"))
    template = ChatTemplate(tmp_path)
    assert template.stop_ids() == {template.tokenizer.token_to_id("<|end|>")}
    assert learned(template, CHATS[0]) == "<|system|>final<|user|>a color<|end|>"
    assert template.inserted() == "<|system|>final<|user|>" and template.inserted_text() == "final"


def test_a_merged_model_stops_only_where_answers_end(tmp_path):
    from loraflow.adapters.merge_folders import _write_stop_ids
    from loraflow.base.load import stop_ids

    build_tokenizer(tmp_path, CUT_BEFORE_LAST.replace("{{ c +", "{{ '<|system|>final<|user|>' + c +"))
    end = ChatTemplate(tmp_path).tokenizer.token_to_id("<|end|>")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    _write_stop_ids(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == sorted({2, end})
    assert stop_ids(tmp_path) == sorted({2, end})
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(BadModel, match="not a JSON object"):
        stop_ids(tmp_path)


def test_a_merged_model_whose_tokenizer_has_another_form_stops_where_answers_end(tmp_path):
    """transformers converts sentencepiece's files as it converts these, with a package that tests do not have."""
    from transformers import AutoTokenizer

    from loraflow.adapters.merge_folders import _write_stop_ids

    build_tokenizer(tmp_path)
    parts = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(parts["model"]["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in parts["model"]["merges"]))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {str(token.pop("id")): token for token in parts["added_tokens"]}
    config |= {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    before = sorted(path.name for path in tmp_path.iterdir())
    _write_stop_ids(tmp_path)
    end = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids("<|end|>")
    assert end in json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
