"""Rows that a model has no positions for are refused before training, which follow from the base's config."""

import json

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    Phi3Config,
)

from loraflow.data.tokens.positions import Positions
from loraflow.failures import BadData
from tests.unit.data.test_template_parity import CHATS, tokenized


def positions_of(config) -> Positions:
    return Positions.of(json.loads(config.to_json_string(use_diff=False)))


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


def longrope(vocab_size: int = 64) -> Phi3Config:
    return Phi3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        sliding_window=None, rope_parameters={**LONG, "rope_theta": 10000.0},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 9}, 512),
        ({"max_position_embeddings": 2048, "rope_scaling": None}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 2048),
        ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2}, "sliding_attention": {"rope_type": "default"}}}, 8192),
    ],
)  # fmt: skip
def test_the_limit_follows_from_the_config(config, limit):
    assert Positions.of(config) == Positions(limit)


def test_real_configs_are_read():
    assert positions_of(GPT2Config(n_positions=128)).limit == 128
    assert positions_of(LlamaConfig(max_position_embeddings=256)) == Positions(256)
    assert positions_of(longrope()) == Positions(64, 16)


def test_a_row_beyond_the_positions_is_what_fails_in_gpt2():
    config = GPT2Config(n_positions=8, n_embd=16, n_layer=1, n_head=2, vocab_size=32)
    model = GPT2LMHeadModel(config)
    model(torch.zeros(1, 8, dtype=torch.long))
    positions_of(config).check([8], "rows")
    with pytest.raises(IndexError):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(BadData, match="more tokens than the model has positions"):
        positions_of(config).check([3, 9], "rows")


def test_a_scored_row_beyond_the_positions_is_named_without_advice_that_does_not_apply_to_it():
    with pytest.raises(BadData) as caught:
        Positions(8).check([3, 9, 11], "held-out rows", ["a.jsonl:1", "a.jsonl:2", "a.jsonl:7"])
    assert (
        caught.value.where == "held-out rows: a.jsonl:7, and 1 more" and "max_length to" not in caught.value.next_step
    )


def test_tokenize_refuses_rows_beyond_the_positions(tmp_path, phi3):
    import shutil

    base = shutil.copytree(phi3, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20}))
    with pytest.raises(BadData, match=r"more tokens than the model has positions(.|\n)*train rows(.|\n)*at most 20"):
        tokenized(base, tmp_path, CHATS)


@pytest.mark.parametrize(("max_length", "says"), [(512, ""), (513, "rows of more than 512 tokens are refused")])
def test_plan_says_it_from_the_config_alone(tmp_path, phi3, max_length, says):
    from loraflow.config import parse_recipe
    from loraflow.execution.plan import too_few_positions
    from loraflow.execution.workspace import Workspace

    recipe = parse_recipe(
        f"name: tiny\nbase: {{model: {phi3}}}\ntraining_config: {{max_length: {max_length}}}\n"
        f"runtime: {{store: {tmp_path / 'store'}}}\n"
    )
    note = too_few_positions(Workspace(recipe))
    assert says in note and bool(says) == bool(note)
