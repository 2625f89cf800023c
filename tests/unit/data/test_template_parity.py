"""One template from training to serving: the same ids, the same stops, and a hash that goes along."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from loraflow.adapters import tokenizer_files
from loraflow.adapters.merge import run as run_merge
from loraflow.base.load import stop_ids
from loraflow.data.tokens import tokenization as tokens
from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.token_files import TokenRows
from loraflow.data.tokens.token_labels import IGNORED
from loraflow.failures import BadModel
from loraflow.job import Inputs, Progress
from loraflow.serving.chat import Chat, Sampling
from loraflow.serving.models import Model, load
from tests.conftest import PHI3_TEMPLATE, build_phi3, build_tokenizer
from tests.job_factory import make_job
from tests.tiny_adapters import make_adapter
from tests.unit.training.test_training import REF, recipe

CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
TRIMMED = (  # as Llama 3: what is said is trimmed, and everything begins with one token
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>' + m['role'] + '<|system|>\n\n' + (m['content'] | trim) + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>assistant<|system|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}{{ m['content'] + '<|end|>' }}"
    "{% endgeneration %}{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {"phi3": PHI3_TEMPLATE, "chatml": CHATML, "trimmed": TRIMMED, "marked": MARKED}
CHATS = [
    [{"role": "user", "content": "what is red"}, {"role": "assistant", "content": "a color"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": " one "}, {"role": "assistant", "content": "two"},
     {"role": "user", "content": "two\n"}, {"role": "assistant", "content": "three, and four"}],
    [{"role": "user", "content": "नमस्ते 你好"}, {"role": "assistant", "content": '{"a": "हाँ 😀"}'}],
]  # fmt: skip


def tokenized(base, folder, chats):
    """Run the tokenize stage; return its rows."""
    (folder / "rows").mkdir(parents=True)
    (folder / "tokens").mkdir()
    lines = [
        json.dumps({"id": str(i), "set": "train", "place": f"x:{i}", "messages": messages})
        for i, messages in enumerate(chats)
    ]
    (folder / "rows" / "train.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "rows" / "validation.jsonl").touch()
    job = make_job("tokenize", recipe(), {"rows": REF, "base": REF})
    tokens.run(job, Inputs({"rows": folder / "rows", "base": base}), folder / "tokens", Progress())
    return TokenRows(folder / "tokens" / "train")


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_training_and_generation_use_the_same_prompt_and_stop_token(tmp_path, template):
    base, out = build_phi3(tmp_path / "base", dtype="float32", layers=1), tmp_path / "out"
    build_tokenizer(base, template)
    rows = tokenized(base, tmp_path, CHATS)
    adapter = make_adapter(base, tmp_path / "artifact" / "adapter")
    tokenizer_files.write_origin(adapter, base, REF.digest)
    (base / "generation_config.json").unlink()
    out.mkdir()
    job = make_job("merge", recipe(), {"base": REF, "adapter": REF.model_copy(update={"facets": {"adapter": "d"}})})
    run_merge(job, Inputs({"base": base, "adapter": adapter.parent}), out, Progress())

    served, loaded = AutoTokenizer.from_pretrained(out), load(Model("tiny", out), "float32")
    control = {index for index, token in served.added_tokens_decoder.items() if token.special}
    for number, messages in enumerate(CHATS):
        ids, labels = (part.tolist() for part in rows.document(number))
        last = len(labels) - next(i for i, label in enumerate(reversed(labels)) if label == IGNORED)
        asked = served.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids[:last] == asked
        chat = Chat(loaded, sampling=Sampling(max_new_tokens=1))
        chat.messages = messages[:-1]
        assert chat._fit()[0] == asked
        learned = {i for i, label in zip(ids, labels, strict=True) if label != IGNORED} & control
        eos = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        assert learned and learned <= ChatTemplate(out).stop_ids() <= set(eos) <= set(stop_ids(out))
    recorded = [
        json.loads((folder / tokenizer_files.ORIGIN).read_text())["chat_template_sha256"] for folder in (adapter, out)
    ]
    assert recorded == [tokenizer_files.template_hash(base)] * 2


def test_the_merge_stage_refuses_another_template(tmp_path):
    base = build_phi3(tmp_path / "base", dtype="float32", layers=1)
    adapter = make_adapter(base, tmp_path / "artifact" / "adapter")
    tokenizer_files.write_origin(adapter, base, REF.digest)
    other = shutil.copytree(base, tmp_path / "other")
    build_tokenizer(other, CHATML)
    (tmp_path / "out").mkdir()
    job = make_job("merge", recipe(), {"base": REF, "adapter": REF.model_copy(update={"facets": {"adapter": "d"}})})
    with pytest.raises(BadModel, match="another chat template"):
        run_merge(job, Inputs({"base": other, "adapter": adapter.parent}), tmp_path / "out", Progress())
    assert not list((tmp_path / "out").iterdir())


def test_a_template_with_different_training_and_generation_prompts_is_refused(tmp_path, phi3):
    base = shutil.copytree(phi3, tmp_path / "base")
    build_tokenizer(
        base, MARKED.replace("{{ '<|assistant|>' }}{% endif %}", "{{ '<|assistant|><|system|>' }}{% endif %}")
    )
    with pytest.raises(BadModel, match="renders prompts differently in training and in generation"):
        tokenized(base, tmp_path, CHATS)


def test_earlier_answers_with_other_tokens_than_in_a_later_prompt_are_reported(tmp_path, caplog):
    build_tokenizer(tmp_path / "base", CHATML.replace("\n", " "))  # a space at the end: " the" is one token
    answer = {"role": "assistant", "content": "the house"}
    chat = [{"role": "user", "content": "x"}, answer]
    tokenized(tmp_path / "base", tmp_path / "one", [chat])
    assert "other tokens" not in caplog.text
    tokenized(tmp_path / "base", tmp_path / "two", [chat, chat * 2])
    assert "1 of the first 2 rows have other tokens in earlier answers" in caplog.text and "such as x:1" in caplog.text


def test_tokens_without_an_embedding_are_refused_before_training(tmp_path, phi3):
    base = shutil.copytree(phi3, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(base)
    assert len(tokenized(base, tmp_path / "without", CHATS)) == 3, "no chat has it"
    with pytest.raises(BadModel, match=r"contain tokens that have no embedding(.|\n)*<\|new\|>, id 507"):
        tokenized(base, tmp_path / "with", [*CHATS, [{"role": "user", "content": "<|new|>"}, CHATS[0][1]]])
