"""Save, load and export loralib's weights; refuse what does not fit."""

import pytest
import torch

from loraflow.adapters.loralib.layers import MergeableLayer
from loraflow.adapters.loralib.model import load, prepare, state_of, to_adapter
from loraflow.adapters.loralib.swap import Settings, swap
from loraflow.adapters.peft_folder import write_peft
from loraflow.failures import BadConfig, BadModel
from tests.conftest import build_phi3
from tests.unit.adapters.test_loralib import IDS, QV, perturb, pretrained
from tests.unit.training.test_training import recipe

# checkpoints


@pytest.fixture
def model(phi3):
    return perturb(prepare(pretrained(phi3), Settings(r=2, targets=["qkv_proj", "o_proj"], enable_lora=QV), 0))


def test_a_checkpoint_is_loaded_and_mismatches_are_reported(phi3, model):
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    other = prepare(pretrained(phi3), model.settings, 9)
    load(other, state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(other).items())
    first = next(iter(state))
    for wrong, says in (
        ({**state, "model.layers.9.self_attn.qkv_proj.lora_A": state[first]}, "1 unexpected, 0 missing"),
        ({name: t for name, t in state.items() if name != first}, "0 unexpected, 1 missing"),
        ({**state, first: state[first][:1]}, "does not fit"),
        ({**state, first: state[first] * float("nan")}, "not finite"),
    ):
        fresh = prepare(pretrained(phi3), model.settings, 9)
        before = {name: tensor.clone() for name, tensor in state_of(fresh).items()}
        with pytest.raises(BadModel) as caught:
            load(fresh, wrong)
        assert says in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(fresh).items()), "nothing was loaded"


def test_loading_into_merged_layers_is_refused(phi3):
    settings = Settings(r=2, targets=["qkv_proj"], enable_lora=QV, merge_weights=True)
    model = prepare(pretrained(phi3), settings, 0)
    state = {name: tensor.clone() for name, tensor in state_of(model).items()}
    model.eval()
    with pytest.raises(BadModel, match="merged"):
        load(model, state)
    model.train()
    load(model, state)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_biases_are_trained_saved_and_exported(tmp_path, bias):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def fresh():
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, attention_bias=True,
                             num_attention_heads=4, num_key_value_heads=2, mlp_bias=True)  # fmt: skip
        return LlamaForCausalLM(config)

    model = prepare(fresh(), Settings(r=2, targets=["q_proj", "down_proj"], bias=bias), 0)
    expected = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], bias=bias))
    trainable = {n.removeprefix("base_model.model.").replace("base_layer.", "").replace(".default.weight", "")
                 for n, p in expected.named_parameters() if p.requires_grad}  # fmt: skip
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    perturb(model)
    assert state_of(model, bias).keys() == trainable
    write_peft(to_adapter(model, bias), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(fresh(), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, loaded(IDS).logits, atol=1e-5)


@pytest.mark.parametrize("kv", [2, 4], ids=["gqa", "mha"])
def test_an_exported_adapter_has_the_same_logits_in_peft(tmp_path, kv):
    from peft import PeftModel

    base = build_phi3(tmp_path / "base", dtype="float32", num_key_value_heads=kv)
    settings = Settings(r=3, lora_alpha=7, targets=["qkv_proj", "gate_up_proj", "o_proj", "embed_tokens"],
                        enable_lora={**QV, "gate_up_proj": ["up"]})  # fmt: skip
    model = perturb(prepare(pretrained(base), settings, 0))
    write_peft(to_adapter(model), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(pretrained(base), str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.allclose(model.eval()(IDS).logits, loaded.eval()(IDS).logits, atol=1e-5)
        merged = loaded.merge_and_unload()
        for layer in model.modules():
            if isinstance(layer, MergeableLayer):
                layer.merge()
        assert torch.allclose(model(IDS).logits, merged(IDS).logits, atol=1e-5)


# names and the recipe


def test_unknown_targets_and_blocks_are_refused(phi3):
    for settings, says in (
        (Settings(targets=["q_proj"]), "No module of the base is called q_proj"),
        (Settings(targets=["o_proj"], enable_lora=QV), "not a target module"),
        (Settings(targets=["qkv_proj"], enable_lora={"qkv_proj": ["gate"]}), "no such blocks"),
        (Settings(targets=["o_proj"], enable_lora={"o_proj": ["q"]}), "no such blocks"),
        (Settings(targets=["o_proj"], enable_lora={"o_proj": [True] * 7}), "cannot be divided into these blocks"),
        (Settings(targets=["qkv_proj"], enable_lora={"qkv_proj": []}), "cannot be divided into these blocks"),
        (Settings(targets=["norm"]), "no layer for a Phi3RMSNorm"),
    ):
        model = pretrained(phi3)
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(BadConfig) as caught:
            swap(model, settings)
        assert says in str(caught.value)
        assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"loralib_config__enable_lora": QV}, "needs method: loralib"),
        ({"method": "loralib", "peft_config__use_dora": True}, "use_dora is for method: peft only"),
        ({"method": "loralib", "peft_config__rank_pattern": {"o_proj": 2}}, "rank_pattern is for method: peft only"),
        ({"method": "loralib", "base__quantization": "nf4", "base__dtype": "bfloat16"}, "plain weights"),
        ({"method": "loralib", "loralib_config__enable_lora": {"qkv_proj": ["x"]}}, "'q'"),
    ],
)
def test_contradictory_recipe_sections_are_refused(overrides, says):
    with pytest.raises(BadConfig) as caught:
        recipe(**overrides)
    assert says in str(caught.value)
