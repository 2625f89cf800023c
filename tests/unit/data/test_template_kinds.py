"""Templates of kinds that people bring: each is encoded as transformers serves it, or refused in one sentence."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from loraflow.base import template_check
from loraflow.base.template_check import check_template
from loraflow.data.templates.rendered_calls import missing_part
from loraflow.data.templates.served_template import pinned
from loraflow.data.tokens import loss_mask
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadModel
from tests.conftest import build_tokenizer
from tests.in_process_template import InProcessTemplate

ONE = [{"role": "user", "content": "what is red"}, {"role": "assistant", "content": "a color"}]
TWO = [*ONE, {"role": "user", "content": "and two"}, {"role": "assistant", "content": "the house"}]
START = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"


@pytest.fixture(autouse=True)
def _in_process(monkeypatch):
    monkeypatch.setattr(loss_mask, "template_process", InProcessTemplate)


def turns(answer: str, user: str = "{{ '<|user|>' + m['content'] + '<|end|>' }}") -> str:
    """Return a template with the source of an answer, behind its start, and of a question."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
        f"{answer}{{% else %}}{user}{{% endif %}}{{% endfor %}}{START}"
    )


def learned(template: ChatTemplate, chat) -> list[str]:
    (encoded,) = template.encode([chat], "assistant")
    texts, inside = [], False
    for i, label in zip(encoded.ids.tolist(), encoded.labels.tolist(), strict=True):
        if label != IGNORED:
            texts = [*texts[:-1], [*texts[-1], i]] if inside else [*texts, [i]]
        inside = label != IGNORED
    return [template.tokenizer.decode(ids, skip_special_tokens=False) for ids in texts]


@pytest.mark.parametrize(
    ("answer", "before"),
    [
        ("{{ 'final: ' }}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}", "final: "),
        ("{% generation %}{{ 'final' }}{% endgeneration %}{{ ': ' }}{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}", "final: "),
        ("{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}", ""),
    ],
    ids=["in front of the marks", "between marks", "nothing"],
)  # fmt: skip
def test_what_a_template_leaves_unmarked_in_an_answer_is_learned_because_no_server_sends_it(tmp_path, answer, before):
    build_tokenizer(tmp_path, turns(answer))
    template, served = ChatTemplate(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert learned(template, TWO) == [f"{before}a color<|end|>", f"{before}the house<|end|>"]
    (encoded,) = template.encode([TWO], "assistant")
    prompt = served.apply_chat_template(TWO[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encoded.ids[: encoded.prompt].tolist() == prompt
    assert template.inserted() == before


OPEN = "{{ '<|assistant|>' }}"
FOOTER = "{% if messages[-1]['role'] == 'assistant' %}{{ 'The end.<|endoftext|>' }}{% endif %}" + START


@pytest.mark.parametrize(
    ("answer", "end", "eos", "learned_as", "stops"),
    [
        ("{{ m['content'] + '<|user|>x<|user|><|end|>' }}", START, "<|endoftext|>", "{}<|user|>x<|user|><|end|>", ["<|end|>"]),
        ("{{ '<|system|>' + m['content'] + '<|system|><|end|>' }}", START, "<|endoftext|>", "<|system|>{}<|system|><|end|>", ["<|end|>"]),
        ("{{ '<|user|>' + m['content'] + '<|system|><|end|>' }}", OPEN + START.replace("assistant", "user"), "<|end|>", "{}<|system|><|end|>", ["<|system|>", "<|end|>"]),
        ("{{ m['content'] + '<|end|>' }}", OPEN, "<|endoftext|>", "{}<|end|>", ["<|end|>"]),
        ("{{ '<|system|>' + m['content'] + '<|end|>' }}", OPEN, "<|endoftext|>", "<|system|>{}<|end|>", ["<|end|>"]),
        ("{{ m['content'] + '<|end|>' }}", FOOTER, ["<|end|>", "<|endoftext|>"], "{}<|end|>", ["<|end|>"]),
        ("{{ m['content'] + '<|end|>' }}", FOOTER, "<|endoftext|>", "{}<|end|>", ["<|end|>"]),
        ("{{ m['content'] + '<|end|>' }}", FOOTER, "<s>", "{}<|end|>", ["<|end|>"]),
    ],
    ids=["a text between tokens", "a token before the answer too", "prompts with more than the start that is always written",
         "the start is always written", "and not all of it", "a footer of the chat", "whose token is known", "with neither known"],
)  # fmt: skip
def test_only_what_ends_an_answer_is_learned_behind_it(tmp_path, answer, end, eos, learned_as, stops):
    """As Kimi K3, Command A and Command R write their templates."""
    build_tokenizer(tmp_path, turns(answer).replace(START, end))
    served = AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": served.convert_tokens_to_ids(eos)}))
    template = ChatTemplate(tmp_path)
    assert {served.convert_ids_to_tokens(i) for i in template.stop_ids()} == set(stops)
    for first in ("a color", ""):
        chat = [ONE[0], {**ONE[1], "content": first}, *TWO[2:]]
        assert learned(template, chat) == [learned_as.format(first), learned_as.format("the house")]
    (encoded,) = template.encode([TWO], "assistant")
    assert encoded.ids.tolist() == served.apply_chat_template(TWO, return_dict=True)["input_ids"]
    check_template(tmp_path)


@pytest.mark.parametrize("end", ["<|end|>", "<|end|><|endoftext|>"])
def test_phi3s_second_token_is_learned_unless_only_its_first_one_is_known_to_stop(tmp_path, end):
    build_tokenizer(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<|end|>", "<|endoftext|>"][: end.count("|>")])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert learned(ChatTemplate(tmp_path), TWO) == ["a color<|end|>", f"the house{end}"]


def test_a_token_that_ends_an_answer_and_begins_it_is_refused(tmp_path):
    build_tokenizer(tmp_path, turns("{{ '<|system|>' + m['content'] + '<|system|>' }}"))
    template = ChatTemplate(tmp_path)
    empty = [ONE[0], {**ONE[1], "content": ""}, *TWO[2:]]
    assert learned(template, empty) == ["<|system|><|system|>", "<|system|>the house<|system|>"]
    with pytest.raises(BadModel, match="also begins it") as caught:
        template.stop_ids()
    assert "<|system|>" in caught.value.got and "generation %" not in str(caught.value)
    build_tokenizer(tmp_path, turns("{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|end|>' }}"))
    with pytest.raises(BadModel, match="block contains no stop token"):
        ChatTemplate(tmp_path).stop_ids()
    # As GLM-Edge, which writes the start of an answer behind every chat, and nothing behind an answer.
    build_tokenizer(tmp_path, turns("{{ m['content'] }}").replace("<|end|>", "").replace(START, OPEN))
    ids = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<|user|>", "<|end|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    for use in (ChatTemplate(tmp_path).stop_ids, lambda: ChatTemplate(tmp_path).encode([TWO], "assistant")):
        with pytest.raises(BadModel, match="does not end an answer with a control token"):
            use()


def test_whether_the_next_message_ends_an_answer_is_asked_once_and_not_for_each_row(tmp_path, monkeypatch):
    """As a GLM, whose rows that end with a call are ended by the token of the call's result."""
    source = turns("{{ m['content'] ~ (m['tool_calls'] | tojson if m['tool_calls'] else '') }}").replace("<|end|>", "")
    build_tokenizer(tmp_path, source.replace("'<|user|>'", "('<|system|>' if m['role'] == 'tool' else '<|user|>')"))
    ids = AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<|user|>", "<|system|>"])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    template, rendered = ChatTemplate(tmp_path), []
    real = template.render
    monkeypatch.setattr(template, "render", lambda chats: rendered.append(chats) or real(chats))
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    row = [ONE[0], {"role": "assistant", "content": "", "tool_calls": calls}]
    assert [text[-10:] for text in template._closed([row] * 3, real([row] * 3))] == ["<|system|>"] * 3
    assert len(rendered) == 2


def test_the_end_of_answers_is_compared_with_transformers_own_mask(tmp_path, monkeypatch):
    marked = "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '<|user|>' }}"
    build_tokenizer(tmp_path, turns(marked))
    check_template(tmp_path)
    monkeypatch.setattr(template_check, "_ends", lambda marked: [at + 1 for at in np.flatnonzero(marked)[-1:]])
    with pytest.raises(BadModel, match="ends at another token"):
        check_template(tmp_path)


@pytest.mark.parametrize(
    "user",
    ["{{ '<|user|>' + m['content'][:6] + '<|end|>' }}", "{{ '<|user|>' + m['content'] | replace('red', 'blue') + '<|end|>' }}"],
    ids=["cut", "changed"],
)  # fmt: skip
def test_a_question_that_the_template_changes_is_refused_with_its_row(tmp_path, user):
    build_tokenizer(tmp_path, turns("{{ m['content'] + '<|end|>' }}", user))
    template = ChatTemplate(tmp_path)
    short = [{"role": "user", "content": "hello"}, ONE[1]]
    with pytest.raises(BadModel, match="leaves out or changes a part of a question") as caught:
        template.encode([short, ONE], "assistant")
    assert caught.value.details["chat"] == 1 and caught.value.got == "what is red"


SPACED = " def f():\n\n    return  1\n"


def joined(role: str) -> str:
    """Return a template that replaces all white space inside the messages of a role by single spaces."""
    plain, words = "m['content']", "(m['content'].split() | join(' '))"
    return turns(
        f"{{{{ {words if role == 'assistant' else plain} + '<|end|>' }}}}",
        f"{{{{ '<|' + m['role'] + '|>' + ({words} if m['role'] == '{role}' else {plain}) + '<|end|>' }}}}",
    )


@pytest.mark.parametrize(
    ("role", "says"),
    [
        ("assistant", "changes a part of an answer"),
        ("user", "changes a part of a question"),
        ("system", "leaves out or changes a part of system messages"),
        ("tool", "leaves out or changes a part of tool messages"),
    ],
)
def test_a_text_whose_inner_white_space_the_template_changes_is_refused_with_its_row(tmp_path, role, says):
    """The model would learn code without its lines, or not see them in a question."""
    build_tokenizer(tmp_path, joined(role))
    template = ChatTemplate(tmp_path)
    chat = [{"role": "system", "content": "be kind"}, *TWO]
    if role == "tool":
        chat.insert(3, {"role": "tool", "content": "found"})
    template.encode([chat], "assistant")
    spaced = [{**message, "content": SPACED} if message["role"] == role else message for message in chat]
    with pytest.raises(BadModel, match=says) as caught:
        template.encode([chat, spaced], "assistant")
    assert caught.value.details["chat"] == 1


@pytest.mark.parametrize("space", [" {}", "{}\n", "\n\n {}  "])
def test_white_space_around_texts_may_be_trimmed(tmp_path, space):
    trimmed = "m['content'] | trim + '<|end|>'"
    build_tokenizer(tmp_path, turns(f"{{{{ {trimmed} }}}}", f"{{{{ '<|user|>' + {trimmed} }}}}"))
    chat = [{**message, "content": space.format(message["content"])} for message in ONE]
    assert learned(ChatTemplate(tmp_path), chat) == ["a color<|end|>"]


@pytest.mark.parametrize(
    ("content", "code", "missing"),
    [
        ("I\n look", "a\n  b", None),
        ("I\n look", '"a\\n  b"', None),
        ("I\n look", "a b", "run: a\n  b"),
        ("I\n look", '"a\\n b"', "run: a\n  b"),
        ("I look", "a\n  b", " I\n look "),
    ],
    ids=["plain", "json", "joined", "joined in json", "joined text"],
)
def test_a_call_whose_inner_white_space_the_template_changes_is_refused(content, code, missing):
    call = {"type": "function", "function": {"name": "run", "arguments": {"code": "a\n  b"}}}
    message = {"role": "assistant", "content": " I\n look ", "tool_calls": [call]}
    assert missing_part(f"<|assistant|>{content} run(code={code})<|end|>", message) == missing


@pytest.mark.parametrize(
    "date",
    ["{% set f = '%d %b' %}{{ strftime_now(f) }}", "{{ strftime_now('%d' + '%b') }}", "{% set now = strftime_now %}{{ now('%d') }}"],
)  # fmt: skip
def test_a_date_that_cannot_be_fixed_is_refused(date):
    with pytest.raises(BadModel, match="prints today's date in a way that cannot be fixed"):
        pinned(date + START)


def test_a_template_that_asks_whether_there_is_a_date_is_fixed():
    source = "{# strftime_now #}{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert '{{ "26 Jul 2024" }}' in pinned(source)


def bpe(folder, template, *, is_sentencepiece, split=False):
    """Write a tokenizer in which spaces and line ends join with what stands behind them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=is_sentencepiece, unk_token="<unk>" if is_sentencepiece else None))
    alphabet = [] if is_sentencepiece else pre_tokenizers.ByteLevel.alphabet()
    if not is_sentencepiece:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", *(f"<0x{n:02X}>" for n in range(256))] if is_sentencepiece else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=specials, show_progress=False
    )
    tokenizer.train_from_iterator(["a: the house\n\na color é 😀\n\n\n\n\n\n"] * 20, trainer)
    if is_sentencepiece:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = []
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    names = ("<s>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize("before", ["<|assistant|> ", "a: ", "<|assistant|>\n\n", "<|assistant|>a:"])
@pytest.mark.parametrize(
    ("is_sentencepiece", "split"), [(False, True), (False, False), (True, False)], ids=["GPT-2", "merges", "pieces"]
)
def test_a_learned_answer_begins_where_the_tokens_of_the_served_prompt_end(tmp_path, before, is_sentencepiece, split):
    """The prompts of Jamba and ERNIE 4.5 end with a space, which one token joins to the first word of an answer."""
    source = turns(f"{{{{ {before!r} + m['content'] + '<|end|>' }}}}").replace("{{ '<|assistant|>' }}", "", 1)
    source = source.replace(START, f"{{% if add_generation_prompt %}}{{{{ {before!r} }}}}{{% endif %}}")
    served = bpe(tmp_path, source, is_sentencepiece=is_sentencepiece, split=split)
    template = ChatTemplate(tmp_path)
    for first, second in (("the house", "a color"), ("\n\nthe", "é"), (" a", "😀"), ("  the", "\na"), ("a", "a")):
        chat = [{"role": "user", "content": "the"}, {"role": "assistant", "content": first}]
        longer = [*chat, {"role": "user", "content": "a"}, {"role": "assistant", "content": second}]
        for row in (chat, longer):
            (encoded,), (last,) = template.encode([row], "assistant"), template.encode([row], "last_assistant")
            prompt = served.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
            assert last.ids[: last.prompt].tolist() == prompt == template.prompt_ids([row])[0]
            whole = served.decode(served.apply_chat_template(row, return_dict=True)["input_ids"])
            assert served.decode(encoded.ids) == served.decode(last.ids) == whole
            answers = learned(template, row)
            assert len(answers) == len(row) // 2 and all(text.endswith("<|end|>") for text in answers)
            start = int(np.flatnonzero(encoded.labels != IGNORED)[0])
            assert encoded.ids[:start].tolist() == served.apply_chat_template(
                row[:1], add_generation_prompt=True, return_dict=True
            )["input_ids"]  # fmt: skip
            assert served.decode(encoded.ids[: encoded.prompt]) == served.decode(prompt)


def test_a_marked_line_end_may_be_several_tokens_of_which_transformers_marks_the_first(tmp_path):
    """Llama 2's tokenizer puts a space in front of the line end behind a control token."""
    bpe(tmp_path, turns("{% generation %}{{ m['content'] + '<|end|>\n' }}{% endgeneration %}"), is_sentencepiece=True)
    check_template(tmp_path)
    assert learned(ChatTemplate(tmp_path), ONE) == ["a color<|end|> \n"]


@pytest.mark.parametrize("flag", ["normalized", "single_word"])
def test_a_stop_token_that_the_tokenizer_does_not_recognize_behind_a_word_is_refused(tmp_path, flag):
    """Old conversions of Llama have `normalized: true`: "word</s>" is text, and only "word </s>" has the token."""
    bpe(tmp_path, turns("{{ m['content'] + '<|end|>' }}"), is_sentencepiece=True)
    check_template(tmp_path)
    file = tmp_path / "tokenizer.json"
    parts = json.loads(file.read_text())
    for token in parts["added_tokens"]:
        token[flag] = token["content"] == "<|end|>"
    file.write_text(json.dumps(parts))
    with pytest.raises(BadModel, match="does not recognize the token that ends an answer") as caught:
        check_template(tmp_path)
    assert flag in caught.value.next_step


@pytest.mark.parametrize("before", ["<|assistant|> ", "<|assistant|>\n\n", "<|assistant|>"])
def test_marked_ends_are_compared_also_where_an_answer_has_other_tokens_than_its_text(tmp_path, monkeypatch, before):
    source = turns("{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}{{ '<|user|>' }}").replace(
        "<|assistant|>", before
    )
    served = bpe(tmp_path, source.replace("\n", "\\n"), is_sentencepiece=False, split=True)
    template, compared = ChatTemplate(tmp_path), 0
    for chat in template_check.conversations()[:6]:
        (encoded,) = template.encode([chat], "assistant")
        marks = template_check._marked(served, template.template, chat, encoded.ids.tolist())
        ends = template_check._ends(encoded.labels != IGNORED)
        assert template_check._ends(marks) == ends and len(ends) == len(chat) // 2
        compared += 1
    assert compared == 6
    check_template(tmp_path)
    monkeypatch.setattr(template_check, "_ends", lambda marked: [at + 1 for at in np.flatnonzero(marked)[-1:]])
    with pytest.raises(BadModel, match="ends at another token"):
        check_template(tmp_path)


@pytest.mark.parametrize("is_sentencepiece", [False, True])
def test_any_white_space_may_be_marked_behind_the_stop_token(tmp_path, is_sentencepiece):
    source = turns("{% generation %}{{ m['content'] + '<|end|>\\n \\n \\n \\n' }}{% endgeneration %}")
    bpe(tmp_path, source, is_sentencepiece=is_sentencepiece)
    check_template(tmp_path)
    (text,) = learned(ChatTemplate(tmp_path), ONE)
    assert text.replace(" ", "") == "acolor<|end|>\n\n\n\n"


def test_only_learned_answers_have_other_tokens_than_the_text(tmp_path):
    """With `loss_on: all`, and in answers that are context, there is no served prompt: ids are those of the text."""
    source = turns("{{ m['content'] + '<|end|>' }}").replace("<|assistant|>", "<|assistant|> ")
    served = bpe(tmp_path, source, is_sentencepiece=False, split=True)
    template = ChatTemplate(tmp_path)
    chat = [*TWO[:1], {"role": "assistant", "content": "the house"}, *TWO[2:]]
    plain = served.apply_chat_template(chat, return_dict=True)["input_ids"]
    prompt = served.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert plain[: len(prompt)] != prompt
    for chosen in (None, [[3]]):
        (whole,) = template.encode([chat], "all", learned=chosen)
        assert whole.ids.tolist() == plain
    (last,) = template.encode([chat], "assistant", learned=[[3]])
    assert last.ids[: last.prompt].tolist() == prompt
    (first,) = template.encode([chat], "assistant", learned=[[1]])
    assert first.ids[-8:].tolist() == plain[-8:] and first.ids.tolist() != plain


def test_a_turn_of_a_long_chat_is_not_tokenized_with_all_turns_before_it(tmp_path, monkeypatch):
    bpe(
        tmp_path,
        turns("{{ m['content'] + '<|end|>' }}").replace("<|assistant|>", "<|assistant|> "),
        is_sentencepiece=False,
        split=True,
    )
    template, real, texts = ChatTemplate(tmp_path), loss_mask.ChatTemplate(tmp_path)._ids, []
    monkeypatch.setattr(template, "_ids", lambda text: texts.append(text) or real(text))
    (encoded,) = template.encode([[*TWO[:1], {"role": "assistant", "content": "the house"}] * 20], "assistant")
    assert len(texts) == 20 and set(texts) == {"<|assistant|> "}
    monkeypatch.setattr(template, "_separators", {})
    (slow,) = template.encode([[*TWO[:1], {"role": "assistant", "content": "the house"}] * 20], "assistant")
    assert len(texts[-1]) < len(texts[20]) and slow.ids.tolist() == encoded.ids.tolist()
