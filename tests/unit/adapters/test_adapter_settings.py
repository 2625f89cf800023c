"""Settings of an adapter's configuration that peft cannot use are refused by name."""

import json

import pytest

from loraflow.adapters.adapter_config import AdapterConfig
from loraflow.adapters.validation import check_config, check_initialisation, check_tensors
from loraflow.config.lora import PeftConfig
from loraflow.failures import BadModel


def written(folder, **settings):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}))
    return folder


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["q_proj(", "[q", "*proj"])
def test_a_pattern_that_is_no_regular_expression_is_refused_by_name(tmp_path, setting, pattern):
    folder = written(tmp_path, **{setting: {"v_proj": 4, pattern: 4}})
    with pytest.raises(BadModel, match="not a regular expression") as caught:
        AdapterConfig.read(folder)
    assert setting in caught.value.where and pattern in caught.value.got


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_null_is_refused_with_what_to_write(tmp_path, setting):
    """peft fails on it while it builds the layers."""
    with pytest.raises(BadModel, match="is null") as caught:
        AdapterConfig.read(written(tmp_path, **{setting: None}))
    assert setting in caught.value.where and "{}" in caught.value.next_step


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", [{"q_proj(": 4}, {"q_proj": float("nan")}, {"q_proj": float("inf")}])
def test_a_recipe_s_pattern_that_peft_cannot_use_is_refused(setting, pattern):
    with pytest.raises(ValueError, match=setting):
        PeftConfig.model_validate({setting: pattern})


def test_a_recipe_s_rank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rank_pattern"):
        PeftConfig.model_validate({"rank_pattern": {"q_proj": 0}})


@pytest.mark.parametrize("tokens", [[-1, 5], [True], [3.0], ["a"], {"embed_tokens": [3, -5]}, {"embed_tokens": 3.5}])
def test_trained_tokens_that_are_no_ids_are_refused(tmp_path, tokens):
    with pytest.raises(BadModel, match="damaged") as caught:
        AdapterConfig.read(written(tmp_path, trainable_token_indices=tokens))
    assert "trainable_token_indices" in caught.value.where


@pytest.mark.parametrize("tokens", [None, [], [0, 7], {"embed_tokens": [3], "lm_head": [4]}])
def test_trained_tokens_as_peft_writes_them_are_read(tmp_path, tokens):
    AdapterConfig.read(written(tmp_path, trainable_token_indices=tokens))


@pytest.mark.parametrize("value", ["True", "true", "False", "None"])
def test_a_quoted_value_that_peft_refuses_is_refused_with_the_value_to_write(tmp_path, value):
    folder = written(tmp_path, init_lora_weights=value)
    with pytest.raises(BadModel, match="initialisation is unknown") as caught:
        check_initialisation(AdapterConfig.read(folder), folder)
    assert caught.value.got == f'"{value}"' and "without quotation marks" in caught.value.next_step


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "pissa"])
def test_peft_s_initialisations_are_accepted(tmp_path, value):
    folder = written(tmp_path, init_lora_weights=value)
    check_initialisation(AdapterConfig.read(folder), folder)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "IA3", "VERA", "OFT", "ADALORA"])
def test_another_kind_of_adapter_is_refused_with_what_to_do(tmp_path, kind):
    folder = written(tmp_path, peft_type=kind)
    with pytest.raises(BadModel, match="not a LoRA adapter") as caught:
        check_config(AdapterConfig.read(folder), folder)
    assert "merge_and_unload" in caught.value.next_step


def test_an_adapter_of_mlx_is_refused_by_its_name(tmp_path):
    (tmp_path / "adapters.safetensors").write_bytes(b"")
    with pytest.raises(BadModel, match="mlx-lm") as caught:
        check_tensors(tmp_path)
    assert "mlx_lm.fuse" in caught.value.next_step
