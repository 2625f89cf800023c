"""Every chat template that trl ships: equal to transformers' rendering, or one clear refusal. trl is not imported."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from loraflow.data.tokens import loss_mask
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadModel
from tests.conftest import build_tokenizer
from tests.in_process_template import InProcessTemplate

_SPEC = find_spec("trl")
pytestmark = pytest.mark.skipif(_SPEC is None, reason="trl is not installed")
TEMPLATES = (
    {
        file.stem: file.read_text(encoding="utf-8")
        for file in sorted((Path(_SPEC.submodule_search_locations[0]) / "chat_templates").glob("*.jinja"))
    }
    if _SPEC and _SPEC.submodule_search_locations
    else {}
)
CONTROL = re.compile(
    r"</s>|<\|[^|<>\s]+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>|<\|?(?:turn|channel)\|?>|<end_of_utterance>"
)
# They read messages as lists of parts, and render nothing of a plain text: servers give them parts.
PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
# Their served prompt opens the reasoning, but an answer without reasoning is rendered without it.
REASONING_ONLY = {"deepseek_r1_distill", "deepseekv3"} | {
    n for n in TEMPLATES if n.startswith("nemotron") if "_t" not in n
}
# They cut the reasoning out of every answer.
CUT_ALL = {"deepseek_r1_distill", "deepseekv3"}
ENDS = {"cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "gemma": "<end_of_turn>", "glm": "<|user|>",
        "diffusion": "<turn|>", "gemma4": "<turn|>", "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "llava": "</s>", "smolvlm": "<end_of_utterance>", "lfm2": "<|im_end|>", "llama3": "<|eot_id|>",
        "muse": "<|eot|>", "nemotron": "<|im_end|>", "phi3": "<|end|>", "qwen": "<|im_end|>"}  # fmt: skip


def family(name: str) -> str:
    return name.removesuffix("_training")


def stop_of(name: str) -> str:
    return next(ENDS[key] for key in sorted(ENDS, key=len, reverse=True) if name.startswith(key))


def question(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str) -> dict:
    return {"role": "assistant", "content": text}


def in_parts(message: dict) -> dict:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


ONE = [question("what is red"), answer("a color")]
TWO = [*ONE, question("and two"), answer("the house")]
THOUGHT = [question("what is red"), answer("<think>\none and two\n</think>\n\na color")]
THOUGHT_TWICE = [*THOUGHT, question("and two"), answer("<think>\ncat, dog\n</think>\n\nthe house")]


@pytest.fixture(scope="module")
def tokenizer_with_control_tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = dict.fromkeys(token for source in TEMPLATES.values() for token in CONTROL.findall(source))
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in found if token not in tokenizer.get_vocab()],
        special_tokens=True,
    )
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in ("<think>", "</think>")], True)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture
def template_of(tokenizer_with_control_tokens, monkeypatch):
    folder, tokenizer = tokenizer_with_control_tokens
    monkeypatch.setattr(loss_mask, "template_process", InProcessTemplate)

    def build(name: str) -> tuple[ChatTemplate, object]:
        source = TEMPLATES[name].replace('strftime_now("%Y-%m-%d")', '"2024-07-26"')
        source = source.replace("strftime_now('%Y-%m-%d')", '"2024-07-26"')
        source = source.replace('strftime_now("%d %b %Y")', '"26 Jul 2024"')
        (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
        # GLM's model says that a user's message ends the answer before it.
        eos = [tokenizer.convert_tokens_to_ids("<|user|>")] if name.startswith("glm") else 2
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        tokenizer.chat_template = source
        return ChatTemplate(folder), tokenizer

    return build


def require_right(template, tokenizer, name, chat, loss_on="assistant"):
    """Compare an encoded chat with transformers: its ids, the prompt that a server sends, and what is learned."""
    (encoded,) = template.encode([chat], loss_on)
    served_chat = [in_parts(message) for message in chat] if family(name) in PARTS_ONLY else chat
    ids, learned = encoded.ids.tolist(), encoded.ids[encoded.labels != IGNORED].tolist()
    added = [tokenizer.convert_tokens_to_ids("<|user|>")] if name == "glm4moe" else []
    assert ids == [*tokenizer.apply_chat_template(served_chat, return_dict=True)["input_ids"], *added]
    served = tokenizer.apply_chat_template(served_chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids[: encoded.prompt] == served and template.prompt_ids([chat]) == [served]
    last = [i for i, label in zip(ids, encoded.labels.tolist(), strict=True) if label != IGNORED]
    assert (
        tokenizer.decode(ids[encoded.prompt :]).rstrip()
        == tokenizer.decode(last[-(encoded.labels[encoded.prompt :] != IGNORED).sum() :]).rstrip()
    )
    text = tokenizer.decode(learned)
    for message in chat[-1:] if loss_on == "last_assistant" else chat:
        if message["role"] == "assistant":
            thought, _, answer = message["content"].rpartition("</think>")
            assert answer.strip() in text and thought.removeprefix("<think>").strip() in text
    assert stop_of(name) in text.removesuffix("<|endoftext|>").rstrip()[-len(stop_of(name)) :]


@pytest.mark.parametrize(
    ("message", "end"),
    [
        (answer("a color"), "<|user|>"),
        (answer("<think>\none and two\n</think>\n\na color"), "<|user|>"),
        ({**answer(""), "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "red"}}}]}, "<|observation|>"),
    ],
    ids=["answer", "reasoning", "call"],
)  # fmt: skip
def test_an_open_end_is_closed_by_the_token_that_opens_the_next_message(template_of, message, end):
    """GLM generates the token of the message that follows, and stops there."""
    template, tokenizer = template_of("glm4moe")
    template._eos = {tokenizer.convert_tokens_to_ids(token) for token in ("<|user|>", "<|observation|>")}
    (encoded,) = template.encode([[question("what is red"), message]], "assistant")
    served = tokenizer.apply_chat_template([question("what is red"), message], return_dict=True)["input_ids"]
    assert encoded.ids.tolist() == [*served, tokenizer.convert_tokens_to_ids(end)]
    assert encoded.labels[-1] == encoded.ids[-1]


def refused(template, chat, loss_on="assistant") -> BadModel:
    with pytest.raises(BadModel) as caught:
        template.encode([chat], loss_on)
    assert caught.value.details["chat"] == 0 and caught.value.what.endswith(".")
    return caught.value


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_encoded_as_transformers_serves_it_or_refused(template_of, name):
    template, tokenizer = template_of(name)
    if family(name) in REASONING_ONLY:
        assert re.search("leaves out|differently in|raises an error", refused(template, ONE).what)
    else:
        require_right(template, tokenizer, name, ONE)
        require_right(template, tokenizer, name, TWO, "last_assistant")


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_token_that_closes_an_answer_is_a_stop_token(template_of, name):
    template, tokenizer = template_of(name)
    if name in CUT_ALL | {"deepseekv3_training"}:
        with pytest.raises(BadModel):
            template.stop_ids()
        return
    stops = {tokenizer.convert_ids_to_tokens(i) for i in template.stop_ids()}
    also = {"phi3": {"<|endoftext|>"}, "cohere2": {"<|END_RESPONSE|>"}}
    assert stops == {stop_of(name)} | next((v for k, v in also.items() if name.startswith(k)), set())


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_is_learned_completely_or_refused(template_of, name):
    template, tokenizer = template_of(name)
    for chat, loss_on in ((THOUGHT, "assistant"), (THOUGHT_TWICE, "assistant"), (THOUGHT_TWICE, "last_assistant")):
        try:
            require_right(template, tokenizer, name, chat, loss_on)
        except BadModel:
            failure = refused(template, chat, loss_on)
            if "leaves out" in failure.what and failure.got:
                assert "data.thinking: strip" in failure.next_step
                assert ("last_assistant" in failure.next_step) == (len(chat) == 4 and loss_on == "assistant")
        else:
            assert name not in CUT_ALL


def test_an_answer_without_its_earlier_reasoning_can_be_context_only(template_of):
    template, _ = template_of("qwen3")
    (encoded,) = template.encode([THOUGHT_TWICE], "assistant", "context")
    assert encoded.not_learned == 1
    (last,) = template.encode([THOUGHT_TWICE], "last_assistant")
    assert encoded.labels.tolist() == last.labels.tolist() and encoded.ids.tolist() == last.ids.tolist()
    assert encoded.prompt == last.prompt
    cut = refused(template, THOUGHT_TWICE)
    assert cut.got.startswith("answer 1 of 2: 'a color") and "one and two" in cut.expected


@pytest.mark.parametrize("name", ["gptoss", "gptoss_training"])
def test_an_end_at_which_generation_does_not_stop_is_refused(template_of, name):
    template, tokenizer = template_of(name)
    failure = refused(template, TWO)
    assert failure.got == "<|end|>" and "<|return|>" in failure.expected and "last_assistant" in failure.next_step
    require_right(template, tokenizer, name, TWO, "last_assistant")


def test_the_last_answer_of_a_marked_template_is_learned_whole(template_of):
    """trl marks the second stop token of Phi-3 in a block of its own."""
    template, tokenizer = template_of("phi3_training")
    (encoded,) = template.encode([TWO], "last_assistant")
    assert tokenizer.decode(encoded.ids[encoded.labels != IGNORED]) == "the house<|end|><|endoftext|>"


def test_what_a_template_writes_before_an_answer_is_known(template_of):
    before = {"qwen3": "<think>\n\n</think>\n\n", "gptoss": "<|channel|>final<|message|>", "llama3": "",
              "muse_glimmer": " to=user<|message|>", "qwen3_5_think": "\n</think>\n\n"}  # fmt: skip
    assert {name: template_of(name)[0].inserted() for name in before} == before
