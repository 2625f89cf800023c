"""NaN and infinity in a base: refused before training where the model loads them, and accepted where it does not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from loraflow.adapters.merge_folders import merge
from loraflow.base import weight_checks
from loraflow.base.resolve import describe_files
from loraflow.failures import BadModel
from tests.conftest import build_tokenizer
from tests.tiny_adapters import make_adapter
from tests.unit.base.test_base import build_llama, change_weights, resolve_base

MASKED_BIAS = "gpt_neox.layers.0.attention.masked_bias"


@pytest.fixture
def neox(tmp_path) -> Path:
    """Return a tiny GPT-NeoX whose files have the buffer of older transformers: -1e9, which is -inf in float16."""
    folder = tmp_path / "neox"
    build_tokenizer(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=2, eos_token_id=2)  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    change_weights(folder, lambda weights: {**weights, MASKED_BIAS: torch.tensor(-1e9)})
    return folder


def in_float16(weights):
    return {name: weight.half() for name, weight in weights.items()}


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_a_buffer_that_no_model_loads_may_be_infinite(tmp_path, neox, dtype):
    if dtype is None:
        change_weights(neox, in_float16)
        assert load_file(neox / "model.safetensors")[MASKED_BIAS].isinf()
    base, out = tmp_path / "base", tmp_path / "merged"
    resolve_base(neox, base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["query_key_value"])
    out.mkdir()
    assert merge(base, adapter, out, dtype=dtype)["route"] == "streamed"
    assert load_file(out / "model.safetensors")[MASKED_BIAS].item() == float("-inf")
    logits = AutoModelForCausalLM.from_pretrained(out)(input_ids=torch.arange(3, 40)[None]).logits
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", ["gpt_neox.layers.0.attention.dense.weight", "gpt_neox.final_layer_norm.bias"])
def test_a_weight_that_is_not_finite_is_refused_before_training(tmp_path, neox, monkeypatch, name, value):
    monkeypatch.setattr(weight_checks, "BLOCK_VALUES", 100)  # several blocks of a matrix
    change_weights(neox, in_float16)
    weights = load_file(neox / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, neox / "model.safetensors", {"format": "pt"})
    for check in (lambda: resolve_base(neox, tmp_path / "out"), lambda: describe_files(neox)):
        with pytest.raises(BadModel, match="weight of the base is not finite") as caught:
            check()
        assert caught.value.where.endswith(f"model.safetensors: {name}")


def test_every_weight_of_a_base_with_code_of_its_own_has_to_be_finite(tmp_path):
    """Its class is not known before the training, so no weight is known to be unused."""
    llama = build_llama(tmp_path / "llama")
    config = json.loads((llama / "config.json").read_text())
    own = {"model_type": "of_its_own", "auto_map": {"AutoModelForCausalLM": "own.Model"}}
    (llama / "config.json").write_text(json.dumps({**config, **own}))
    change_weights(llama, lambda weights: {**weights, "extra": torch.tensor([0.0, float("nan")])})
    assert weight_checks.unused_weights(llama) == set()
    with pytest.raises(BadModel, match="not finite") as caught:
        weight_checks.refuse_non_finite_weights(llama)
    assert caught.value.where.endswith(": extra")
