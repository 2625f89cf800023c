"""A base with added tokens: they are trained, saved with the adapter, merged, and written by the merged model."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraflow.adapters.merge_folders import merge
from loraflow.adapters.validation import check_adapter
from loraflow.failures import BadConfig
from tests.conftest import build_phi3
from tests.tiny_adapters import by_peft, read
from tests.unit.training import test_training
from tests.unit.training.test_training import run, tokenize

ADDED = ["ZZZ", "QQQ"]
QUICK = {"training_config__max_steps": 12, "training_config__save_steps": 12, "training_config__learning_rate": 3e-2}


@pytest.fixture
def grown(tmp_path, monkeypatch):
    """Build a base with two more tokens, and rows whose answers have them."""
    question, answer = {"role": "user", "content": "what is red"}, {"role": "assistant", "content": "ZZZ a color QQQ"}
    monkeypatch.setattr(test_training, "chat", lambda number: {"messages": [question, answer]})

    def build(*, tied):
        base = build_phi3(tmp_path / "base", dtype="float32", tie_word_embeddings=tied)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(ADDED)
        tokenizer.save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(base)
        return base, tokenizer.convert_tokens_to_ids(ADDED)

    return build


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens_are_trained_and_merged(grown, tmp_path, tied):
    base, ids = grown(tied=tied)
    options = {**QUICK, "peft_config__trainable_token_indices": ids if tied else {"embed_tokens": ids, "lm_head": ids}}
    trained, losses = run(base, tokenize(base, tmp_path / "rows", chats=8, **options), tmp_path / "run", **options)
    assert losses[12] < losses[1] and any("trainable_tokens_delta" in name for name in trained)

    adapter, out = tmp_path / "run" / "out" / "adapter", tmp_path / "merged"
    check_adapter(adapter, base)
    out.mkdir()
    merge(base, adapter, out)
    before, merged, from_peft = read(base), read(out), by_peft(base, adapter)
    assert merged.keys() == from_peft.keys() and all(torch.equal(merged[name], from_peft[name]) for name in merged)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed = (merged[name] != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert changed == ids, "only the added tokens' rows"
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids(ADDED) == ids

    row = torch.tensor([[5, 6, *ids, 7]])
    with torch.no_grad():
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(row).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(row).logits, expected)


def test_tokens_that_only_the_embeddings_learn_are_named(grown, tmp_path, caplog):
    base, ids = grown(tied=False)
    options = {**QUICK, "training_config__max_steps": 1, "peft_config__trainable_token_indices": ids}
    run(base, tokenize(base, tmp_path / "rows", chats=8, **options), tmp_path / "run", **options)
    assert f"{{embed_tokens: {ids}, lm_head: {ids}}}" in caplog.text


def test_an_adapter_on_tied_embeddings_is_refused_with_what_can_be_trained(grown, tmp_path):
    base, _ = grown(tied=True)
    options = {**QUICK, "peft_config__target_modules": ["qkv_proj", "embed_tokens"]}
    with pytest.raises(BadConfig, match="the head has the same weight") as caught:
        run(base, tokenize(base, tmp_path / "rows", chats=8, **options), tmp_path / "run", **options)
    assert "trainable_token_indices" in caught.value.next_step
