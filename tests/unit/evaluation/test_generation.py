"""Answers and likelihoods in batches: equal to those of single prompts, with any cache and any decoding."""

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.evaluation import greedy_decoding
from loraflow.evaluation.generation import generate_answers
from loraflow.evaluation.greedy_decoding import preallocated_cache
from loraflow.evaluation.likelihood import answer_losses
from tests.conftest import chat
from tests.unit.evaluation.test_shared_prefix import spoken, without_prefix


@pytest.fixture(scope="module")
def model(phi3):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32).eval()


def test_batched_answers_equal_answers_to_single_prompts(phi3, model):
    from loraflow.base.load import load_tokenizer, stop_ids

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    prompts = template.prompt_ids(
        [chat(i)["messages"] for i in (1, 22, 333, 4444)] + [[{"role": "user", "content": "a " * 40}]]
    )
    options = {"stop_ids": stop_ids(phi3), "max_new_tokens": 12}
    alone = [generate_answers(model, tokenizer, [p], batch_size=1, **options)[0] for p in prompts]
    assert generate_answers(model, tokenizer, prompts, batch_size=3, **options) == alone
    assert {a["finish"] for a in alone} <= {"stop", "length"}


@pytest.mark.parametrize(
    "settings",
    [{"repetition_penalty": 5.0}, {"encoder_repetition_penalty": 5.0}, {"no_repeat_ngram_size": 1}, {"min_length": 40},
     {"max_time": 1e-9}],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_look_at_earlier_tokens_or_the_clock_do_not_see_the_batch(phi3, model, settings):
    """Padding is no token of a row, but transformers counts it."""
    from loraflow.base.load import load_tokenizer, stop_ids

    tokenizer, stops = load_tokenizer(phi3), stop_ids(phi3)
    prompts = ChatTemplate(phi3).prompt_ids([[{"role": "user", "content": text}] for text in ("red", "one cat " * 9)])
    changed = copy.deepcopy(model)
    likely = tokenizer.pad_token_id if "penalty" in next(iter(settings)) else stops[0]
    with torch.no_grad():
        first = changed(torch.tensor([prompts[0]])).logits[0, -1].argmax()
        changed.lm_head.weight[likely] = changed.lm_head.weight[first] * 1.05
    for name, value in settings.items():
        setattr(changed.generation_config, name, value)
    options = {"stop_ids": stops, "max_new_tokens": 8}
    alone = [generate_answers(changed, tokenizer, [prompt], batch_size=1, **options)[0] for prompt in prompts]
    assert generate_answers(changed, tokenizer, prompts, batch_size=2, **options) == alone
    if "max_time" not in settings:
        ids = torch.tensor([prompts[0]])
        found = changed.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=stops
        )
        expected = [token for token in found[0, ids.shape[1] :].tolist() if token not in stops]
        assert alone[0]["text"] == tokenizer.decode(
            expected, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    else:
        assert alone[1]["tokens"] > 1


TRIPLES = [list(ids) for ids in itertools.product(range(4, 12), range(4, 12), range(4, 8))]
SETTINGS = {  # name and value, and whether batches are kept
    "encoder_no_repeat_ngram_size": (2, False),
    "bad_words_ids": (TRIPLES, False),
    "sequence_bias": ([[ids, -9.0] for ids in TRIPLES], False),
    "min_length of the shortest prompt": (31, True),
    "bad_words_ids of two": ([ids[1:] for ids in TRIPLES[:8]], True),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_look_at_earlier_tokens_do_not_see_padding_behind_a_shared_prefix(name):
    """The oracle: transformers' answer to each prompt alone. Few tokens and large weights repeat much."""
    value, keeps_batches = SETTINGS[name]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=12, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(**{name.split()[0]: value})
    tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: " ".join(map(str, ids)))
    shared = torch.randint(4, 12, (30,))
    prompts = [torch.cat([shared, torch.randint(4, 12, (more,))]).tolist() for more in (1, 2, 3, 5, 9, 7, 4, 6)]
    batches: list[int] = []
    found = generate_answers(model, tokenizer, prompts, stop_ids=[1, 2, 3], max_new_tokens=12, batch_size=4,
                             on_batch=batches.append)  # fmt: skip
    assert len(batches) == (2 if keeps_batches else 8)
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
                               eos_token_id=[1, 2, 3], pad_token_id=0)[0, len(prompt) :].tolist()  # fmt: skip
        assert answer["text"] == tokenizer.decode([token for token in alone if token not in (1, 2, 3)])


def test_what_the_template_writes_before_an_answer_is_removed_from_it(phi3, model):
    from loraflow.base.load import load_tokenizer

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    (prompt,), options = (
        template.prompt_ids([chat(1)["messages"]]),
        {"stop_ids": [], "max_new_tokens": 6, "batch_size": 1},
    )
    (whole,) = generate_answers(model, tokenizer, [prompt], **options)
    start = whole["text"][:2]
    (rest,) = generate_answers(model, tokenizer, [prompt], inserted=start, **options)
    assert start and rest == {**whole, "text": whole["text"][2:]}


def test_every_stop_id_ends_an_answer(phi3, model):
    from loraflow.base.load import load_tokenizer, stop_ids

    assert len(stop_ids(phi3)) == 2
    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    (prompt,) = template.prompt_ids([chat(1)["messages"]])
    (free,) = generate_answers(model, tokenizer, [prompt], stop_ids=[], max_new_tokens=6, batch_size=1)
    with torch.inference_mode():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    (stopped,) = generate_answers(model, tokenizer, [prompt], stop_ids=[first], max_new_tokens=6, batch_size=1)
    assert free["finish"] == "length" and stopped == {"text": "", "tokens": 0, "finish": "stop"}


def test_finished_batches_are_not_recomputed(phi3, model, tmp_path):
    from loraflow.base.load import load_tokenizer

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    prompts, file = template.prompt_ids([chat(i)["messages"] for i in range(6)]), tmp_path / "done.jsonl"
    options = {"stop_ids": [], "max_new_tokens": 4, "batch_size": 2, "done_file": file}
    uninterrupted = generate_answers(model, tokenizer, prompts, **options)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:3]) + "\n" + lines[3][:10])  # killed while it wrote
    batches: list[int] = []
    assert generate_answers(model, tokenizer, prompts, on_batch=batches.append, **options) == uninterrupted
    assert len(batches) == 2, "the first batch was read from the file"


def test_losses_equal_those_from_all_logits(phi3, model):
    template = ChatTemplate(phi3)
    rows = template.encode([chat(i)["messages"] for i in range(5)], "last_assistant")
    found = answer_losses(model, rows, 0, batch_size=3)
    for row, (total, count) in zip(rows, found, strict=True):
        ids, labels = torch.tensor(row.ids[None].astype("int64")), torch.tensor(row.labels.astype("int64"))
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
        assert total == pytest.approx(expected.item(), rel=1e-4)
        assert count == int((labels[1:] != -100).sum())


def test_the_order_of_batches_does_not_change_answers(phi3, model):
    from loraflow.base.load import load_tokenizer

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    chats = [chat(i)["messages"] for i in range(7)]
    forwards = generate_answers(
        model, tokenizer, template.prompt_ids(chats), stop_ids=[], max_new_tokens=4, batch_size=2
    )
    backwards = generate_answers(
        model, tokenizer, template.prompt_ids(chats[::-1]), stop_ids=[], max_new_tokens=4, batch_size=5
    )
    assert forwards == backwards[::-1]
    assert json.dumps(forwards)


def test_a_preallocated_cache_equals_transformers_cache_without_copies():
    from transformers import DynamicCache

    draw = torch.Generator().manual_seed(0)
    cache, expected, addresses = preallocated_cache(2, 9), DynamicCache(), set()
    for tokens in (4, 1, 3):
        for layer in range(2):
            new = [torch.randn(3, 2, tokens, 5, generator=draw) for _ in range(2)]
            for tensor, other in zip(cache.update(*new, layer), expected.update(*new, layer), strict=True):
                assert torch.equal(tensor, other)
            addresses.add(cache.layers[layer].keys.data_ptr())
        assert cache.get_seq_length() == expected.get_seq_length()
        assert cache.get_mask_sizes(2, 0) == expected.get_mask_sizes(2, 0)
    assert len(addresses) == 2, "written in place"
    with pytest.raises(ValueError, match="10 tokens in a cache for 9"):
        cache.update(*(torch.zeros(3, 2, 2, 5),) * 2, 0)


@pytest.mark.parametrize(
    "system", [None, "please answer what is the house of the red bird and one green cat likes the tree"]
)
def test_answers_equal_those_with_the_cache_of_transformers(phi3, model, monkeypatch, system):
    from loraflow.base.load import load_tokenizer
    from loraflow.evaluation import generation

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    chats = spoken(range(6), system) if system else [chat(i)["messages"] for i in range(6)]
    prompts, options = template.prompt_ids(chats), {"stop_ids": [], "max_new_tokens": 12, "batch_size": 3}
    caches = []
    real = greedy_decoding.preallocated_cache
    monkeypatch.setattr(greedy_decoding, "preallocated_cache", lambda *a: caches.append(a) or real(*a))
    answers = generate_answers(model, tokenizer, prompts, **options)
    assert len(caches) == 2
    monkeypatch.setattr(generation, "has_plain_cache", lambda *_: False)
    without_prefix(monkeypatch)
    assert answers == generate_answers(model, tokenizer, prompts, **options)
    assert len(caches) == 2


@pytest.mark.parametrize(
    "system", [None, "please answer what is the house of the red bird and one green cat likes the tree"]
)
@pytest.mark.parametrize("stops", ["none", "early"])
def test_decoding_step_by_step_gives_the_answers_of_generate(phi3, model, monkeypatch, system, stops):
    """The step that a GPU records and replays, on a CPU, for rows of several lengths that end at several steps."""
    from loraflow.base.load import load_tokenizer
    from loraflow.evaluation import greedy_decoding

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    chats = spoken(range(7), system) if system else [chat(10**i)["messages"] for i in range(7)]
    prompts = template.prompt_ids(chats)
    options = {"stop_ids": [], "max_new_tokens": 40, "batch_size": 3}
    if stops == "early":  # an id that this random model gives in the middle of its answers
        free = [answer_ids(model, prompt, 40) for prompt in prompts]
        ends = {token: len({ids.index(token) if token in ids else 40 for ids in free}) for token in set().union(*free)}
        options["stop_ids"] = [max(ends, key=ends.__getitem__)]
    expected = generate_answers(model, tokenizer, prompts, **options)
    calls = []
    monkeypatch.setattr(greedy_decoding, "is_supported", lambda _: True)
    real = greedy_decoding.decode
    monkeypatch.setattr(greedy_decoding, "decode", lambda *a, **k: calls.append(a) or real(*a, **k))
    assert generate_answers(model, tokenizer, prompts, **options) == expected
    assert len(calls) == 3
    if stops == "early":
        assert len({answer["tokens"] for answer in expected}) > 1


def answer_ids(model, prompt, tokens):
    out = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


def test_a_model_with_a_repetition_penalty_uses_generate(model, monkeypatch):
    from loraflow.evaluation import greedy_decoding

    class OnGpu:
        device, config, forward = torch.device("cuda"), model.config, model.forward
        generation_config = copy.deepcopy(model.generation_config)

    assert greedy_decoding.is_supported(OnGpu)
    OnGpu.generation_config.repetition_penalty = 1.3
    assert not greedy_decoding.is_supported(OnGpu)
