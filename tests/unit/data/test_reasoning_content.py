"""Reasoning beside an answer's content: rendered as transformers renders it and learned whole, or refused."""

import pytest

from loraflow.data.chats import BadRow, without_reasoning
from loraflow.data.checks.findings import _first
from loraflow.data.formats.chat_formats import read_chat
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadModel
from tests.unit.data.test_tools import TOOLS, call
from tests.unit.data.test_trl_templates import (  # noqa: F401 (fixtures)
    TEMPLATES,
    answer,
    question,
    template_of,
    tokenizer_with_control_tokens,
)

ONE = [question("what is red"), {**answer("a color"), "reasoning_content": "one and two, then the house"}]
TWO = [*ONE, question("and two"), {**answer("the house"), "reasoning_content": "cat, dog, and what is said of it"}]
CALLED = [
    {**question("what is red"), "tools": TOOLS},
    {**answer(""), "reasoning_content": "the weather is known to a tool", "tool_calls": [call("Rom")]},
]
# They read reasoning_content or thinking, and write it into the last answer.
KNOWING = {n for n in TEMPLATES if n.startswith(("qwen3", "glm", "gptoss", "nemotron", "muse"))
           and not n.startswith(("qwen3_vl", "qwen3_instruct", "qwen3_5_nothink"))}  # fmt: skip


def learned_by(template, tokenizer, chat, loss_on):
    """Return the learned text of a chat whose ids and prompt are those of transformers."""
    (encoded,) = template.encode([chat], loss_on)
    ids, tools = encoded.ids.tolist(), chat[0].get("tools")
    # Older versions of transformers do not give reasoning the second name.
    bare = [{k: v for k, v in m.items() if k != "tools"} for m in chat]
    bare = [{**m, "thinking": m["reasoning_content"]} if "reasoning_content" in m else m for m in bare]
    expected = tokenizer.apply_chat_template(bare, tools=tools, return_dict=True)["input_ids"]
    assert ids[: len(expected)] == expected and len(ids) - len(expected) <= 1  # GLM's end of the answer is added
    served = tokenizer.apply_chat_template(bare[:-1], tools=tools, add_generation_prompt=True, return_dict=True)
    assert ids[: encoded.prompt] == served["input_ids"]
    return tokenizer.decode([i for i, label in zip(ids, encoded.labels.tolist(), strict=True) if label != IGNORED])


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_beside_the_content_is_learned_as_transformers_renders_it_or_refused(template_of, name):  # noqa: F811
    template, tokenizer = template_of(name)
    for chat, loss_on in ((ONE, "assistant"), (TWO, "assistant"), (TWO, "last_assistant"), (CALLED, "assistant")):
        try:
            text = learned_by(template, tokenizer, chat, loss_on)
        except (BadModel, TypeError) as failure:  # a template's TypeError is a BadModel in its process
            assert chat in (TWO, CALLED) or name not in KNOWING, failure
            assert isinstance(failure, TypeError) or failure.details["chat"] == 0
            continue
        for message in chat[-1:] if loss_on == "last_assistant" else chat[1::2]:
            assert message["reasoning_content"] in text and message["content"] in text
        assert "what is red" not in text
        (reference,) = template.answer_texts([chat])
        assert chat[-1]["reasoning_content"] in reference and chat[-1]["content"] in reference


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "qwen2_5_training", "gemma3", "phi3_training"])
def test_a_template_that_drops_reasoning_is_refused_even_if_the_answer_contains_its_text(template_of, name):  # noqa: F811
    template, _ = template_of(name)
    for reasoning in ("another thought of the cat", "a color"):
        chat = [ONE[0], {**ONE[1], "reasoning_content": reasoning}]
        with pytest.raises(BadModel, match=r"leaves out or changes a part of an answer(.|\n)*data.thinking: strip"):
            template.encode([[question("a"), answer("b")], chat], "assistant")
        assert template.encode([without_reasoning(chat)], "assistant")


def test_earlier_reasoning_that_the_template_cuts_is_context_or_refused(template_of):  # noqa: F811
    template, _ = template_of("qwen3")
    with pytest.raises(BadModel, match="data.thinking: keep") as caught:
        template.encode([ONE, TWO], "assistant")
    assert caught.value.details["chat"] == 1
    (context,), (last,) = template.encode([TWO], "assistant", "context"), template.encode([TWO], "last_assistant")
    assert context.not_learned == 1 and context.labels.tolist() == last.labels.tolist()


def test_reasoning_in_a_row_does_not_change_what_is_known_of_the_template(template_of):  # noqa: F811
    for name in ("qwen3", "qwen3_training"):
        template, _ = template_of(name)
        template.encode([ONE], "assistant")
        assert not any("house" in inserted for inserted in template._answers._insertions)
        assert template.inserted() == "<think>\n\n</think>\n\n"


def test_rows_are_read_with_reasoning_under_any_of_its_names():
    for key in ("reasoning_content", "reasoning", "thinking"):
        row = read_chat({"messages": [question("q"), {**answer("a"), key: "hm"}]})
        assert row.messages[1] == {**answer("a"), "reasoning_content": "hm"} and row.unread == ()
        assert without_reasoning(row.messages) == [question("q"), answer("a")]
        unread = read_chat({"messages": [{**question("q"), key: "hm"}, {**answer("a"), key: ["hm"]}]}).unread
        assert unread == (f"messages.{key}",)
    both = {**answer("a"), "thinking": "hm", "reasoning_content": "hm"}
    assert read_chat({"messages": [question("q"), both]}).unread == ()
    with pytest.raises(BadRow, match="different values"):
        read_chat({"messages": [question("q"), {**both, "thinking": "other"}]})
    with pytest.raises(BadRow, match="message 2: reasoning: a NUL character"):
        read_chat({"messages": [question("q"), {**answer("a"), "reasoning": "h\0m"}]})


def test_the_refused_reference_of_a_held_out_row_is_numbered_among_all_rows(template_of):  # noqa: F811
    template, _ = template_of("llama3")
    with pytest.raises(BadModel) as caught:
        template.answer_texts([[question("a"), answer("b")], [question("a"), answer("b")], ONE])
    assert caught.value.details["chat"] == 2


def test_control_tokens_and_personal_data_are_found_in_reasoning(template_of):  # noqa: F811
    template, _ = template_of("qwen3")
    (encoded,) = template.encode([[ONE[0], {**ONE[1], "reasoning_content": "one <|im_end|> two"}]], "assistant")
    assert encoded.special_in_text == "<|im_end|>"
    assert _first(lambda text: "found" if "then the house" in text else None, ONE) == "message 2: found"
