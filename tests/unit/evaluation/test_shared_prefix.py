"""The common prefix of prompts is computed once, where answers and losses stay the same."""

import pytest
import torch

from loraflow.data.tokens.loss_mask import ChatTemplate
from loraflow.data.tokens.packing import common_prefix_length
from loraflow.evaluation.generation import generate_answers
from loraflow.evaluation.likelihood import answer_losses
from loraflow.evaluation.prefix_cache import shared_prefix
from tests.conftest import chat


@pytest.fixture(scope="module")
def model(phi3):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32).eval()


def spoken(numbers, system="please answer what is the house of the red bird and one green cat likes the tree"):
    return [[{"role": "system", "content": system}, *chat(i)["messages"]] for i in numbers]


def without_prefix(monkeypatch):
    for module in ("generation", "likelihood"):
        monkeypatch.setattr(f"loraflow.evaluation.{module}.shared_prefix", lambda *_: None)


def test_a_shared_system_prompt_is_computed_once_and_does_not_change_answers(phi3, model, monkeypatch):
    from loraflow.base.load import load_tokenizer, stop_ids

    template, tokenizer = ChatTemplate(phi3), load_tokenizer(phi3)
    prompts = template.prompt_ids(spoken((1, 22, 333, 4444, 55555, 666666)))
    found = shared_prefix(model, prompts, 1000, 1000)
    assert found is not None and len(found.ids) > 16
    assert {tuple(p[: len(found.ids)]) for p in prompts} == {tuple(found.ids)}
    options = {"stop_ids": stop_ids(phi3), "max_new_tokens": 24, "batch_size": 4}
    read: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: read.append(args[0].numel()))
    try:
        shared = generate_answers(model, tokenizer, prompts, **options)
        with_prefix, read[:] = sum(read), []
        without_prefix(monkeypatch)
        assert shared == generate_answers(model, tokenizer, prompts, **options)
    finally:
        hook.remove()
    assert with_prefix == sum(read) - len(found.ids) * (len(prompts) - 1)


def test_a_shared_system_prompt_does_not_change_losses(phi3, model, monkeypatch):
    rows = ChatTemplate(phi3).encode(spoken((1, 22, 333, 4444, 55555)), "last_assistant")
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _, args, out: seen.append(args[0].shape[1]))
    shared = answer_losses(model, rows, 0, batch_size=2)
    hook.remove()
    assert max(seen[1:]) < min(len(row.ids) for row in rows), "the batches hold only what is not shared"
    without_prefix(monkeypatch)
    for loss, expected in zip(shared, answer_losses(model, rows, 0, batch_size=2), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


def test_the_first_learned_token_is_predicted_from_the_batch_itself(phi3, model, monkeypatch):
    """All rows are equal up to the middle of their answers: the shared prefix must end before the first label."""
    same = [[{"role": "user", "content": "what is the cat of the house of the bird"}, {"role": "assistant", "content": text}]
            for text in ("yes one", "yes two", "yes three", "yes")]  # fmt: skip
    rows = ChatTemplate(phi3).encode(same, "last_assistant")
    shared = answer_losses(model, rows, 0, batch_size=3)
    without_prefix(monkeypatch)
    for loss, expected in zip(shared, answer_losses(model, rows, 0, batch_size=3), strict=True):
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 8},
        {"sliding_window": 59},
        {"attention_chunk_size": 32},
        {"_attn_implementation": "flash_attention_2"},
        {"rope_parameters": {"rope_type": "longrope"}},
        {"layer_types": ["full_attention", "linear_attention"]},
    ],
    ids=str,
)
def test_no_prefix_is_shared_if_it_may_not_be_exact(model, monkeypatch, change):
    rows = [[5] * 40 + [i] for i in range(6)]
    assert shared_prefix(model, rows, 40, 60) is not None
    for key, value in change.items():
        monkeypatch.setattr(model.config, key, value, raising=False)
    assert shared_prefix(model, rows, 40, 60) is None


@pytest.mark.parametrize("change", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_no_prefix_is_shared_if_the_model_has_another_cache(model, monkeypatch, change):
    for key, value in change.items():
        monkeypatch.setattr(model.generation_config, key, value)
    assert shared_prefix(model, [[5] * 40 + [i] for i in range(6)], 40, 60) is None


@pytest.mark.parametrize(("window", "shares"), [(200, True), (24, False)])
def test_a_sliding_window_does_not_change_answers(phi3, model, monkeypatch, window, shares):
    from loraflow.base.load import load_tokenizer

    monkeypatch.setattr(model.config, "sliding_window", window)
    tokenizer = load_tokenizer(phi3)
    prompts = ChatTemplate(phi3).prompt_ids(spoken((1, 22, 333, 4444, 55555, 666666)))
    options = {"stop_ids": [], "max_new_tokens": 12}
    places = max(map(len, prompts)) + 12
    assert (shared_prefix(model, prompts, min(map(len, prompts)) - 1, places) is not None) == shares
    together = generate_answers(model, tokenizer, prompts, batch_size=3, **options)
    without_prefix(monkeypatch)
    assert together == generate_answers(model, tokenizer, prompts, batch_size=3, **options)


def test_no_prefix_is_shared_if_it_saves_too_little(model):
    assert shared_prefix(model, [[5] * 40, [5] * 41], 40, 60) is None
    assert shared_prefix(model, [[5] * 4 + [i] * 40 for i in range(6)], 44, 60) is None
    assert common_prefix_length([[1, 2, 3], [1, 2, 4], [1, 2]], 9) == 2
    assert common_prefix_length([[1, 2], [1, 2]], 1) == 1
    assert common_prefix_length([], 5) == 0
