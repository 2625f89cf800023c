"""What a recipe adapts: all-linear stays in the language model, names and expressions mean what they mean in PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from loraflow.adapters.lora_config import check_targets, check_trainable, lora_config
from loraflow.adapters.targets import find_targets
from loraflow.base.stored_weights import model_without_weights
from loraflow.config.lora import PeftConfig
from loraflow.failures import BadConfig
from loraflow.training.preview import describe, without_gradient
from tests.families.tiny import COMMON, tiny_config

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def gemma3_with_vision():
    text = {**COMMON, "sliding_window": 8}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)


def adapted(model, peft_config):
    """The modules and parameters that PEFT adapts, by the names that they have in the base."""
    with torch.device("meta"):
        wrapped = get_peft_model(model, lora_config(peft_config, model), low_cpu_mem_usage=True)
    return {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, _ in wrapped.named_parameters()
        if ".lora_A" in name
    }


@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "phimoe", "llama4_text", "olmoe", "hunyuan_v1_moe", "qwen3_next"],
)
def test_all_linear_never_reaches_routers_and_experts(family):
    """PEFT's own all-linear adapts both in mixtures that it knows from transformers 4."""
    model, recipe = on_meta(tiny_config(family)), PeftConfig(lora_dropout=0)
    targets = find_targets(model, recipe)
    assert targets.experts and all(".experts." in name for name in targets.experts)
    found = adapted(model, recipe)
    assert found == set(targets.modules) and any("q_proj" in name for name in found)
    assert not [
        name for name in found if {"experts", "router", "gate", "wg", "shared_expert_gate"} & set(name.split("."))
    ]
    assert "experts without an adapter: 2 experts.down_proj, 2 experts.gate_up_proj" in targets.summary()


def test_all_linear_leaves_the_vision_tower_untouched():
    model, recipe = on_meta(gemma3_with_vision()), PeftConfig()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    tower = {name for name in linear if "vision" in name or "projector" in name}
    targets = find_targets(model, recipe)
    assert tower and tower == set(targets.left_out)
    assert adapted(model, recipe) == set(targets.modules) == linear - tower - {"lm_head"}


TOWER = {**dict.fromkeys(("hidden_size", "intermediate_size", "image_size"), 32), "num_hidden_layers": 1,
         "num_attention_heads": 2, "patch_size": 16}  # fmt: skip


def test_all_linear_leaves_out_a_tower_of_a_model_whose_config_is_that_of_its_text():
    model = on_meta(AutoConfig.for_model("git", **COMMON, vision_config=TOWER))
    targets = find_targets(model, PeftConfig())
    tower = {name for name in targets.left_out if ".image_encoder." in name}
    assert tower and tower == set(targets.left_out) and adapted(model, PeftConfig()) == set(targets.modules)


BART = {"vocab_size": 300, "d_model": 64, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "decoder_layers": 2,
        "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 2, "is_decoder": True,
        "is_encoder_decoder": False}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "options", "part"), [("mamba", {"state_size": 8}, "dt_proj"), ("bart", BART, "encoder_attn")]
)
def test_modules_that_training_does_not_reach_are_named_before_it(family, options, part, tmp_path):
    """The oracle is the gradient of real weights."""
    config = AutoConfig.for_model(family, **(COMMON if family == "mamba" else {}), **options)
    model, names = AutoModelForCausalLM.from_config(config).eval(), find_targets(on_meta(config), PeftConfig()).modules
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out}))
    model(input_ids=torch.arange(3, 19)[None], use_cache=False).logits.sum().backward()
    expected = [name for name in names if name not in outputs]
    assert expected and all(part in name for name in expected)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    assert without_gradient(model_without_weights(tmp_path), names, 16) == expected
    assert any(
        f"no gradient reaches {len(expected) if family == 'mamba' else 2} " in line for line in describe(tmp_path)
    )


def test_a_model_whose_code_needs_values_names_no_module_before_training(caplog):
    caplog.set_level("INFO")
    model = on_meta(tiny_config("lfm2"))
    assert without_gradient(model, find_targets(model, PeftConfig()).modules, 16) == []
    assert "known only after the training: Tensor.item()" in caplog.text


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "lfm2", "granitemoehybrid", "gemma2"])
def test_all_linear_of_other_models_is_pefts(family):
    model, recipe = on_meta(tiny_config(family)), PeftConfig()
    assert lora_config(recipe, model).target_modules == "all-linear"
    targets = find_targets(model, recipe)
    assert adapted(model, recipe) == set(targets.modules) and not targets.left_out and not targets.experts


@pytest.mark.parametrize(
    "target",
    [
        r".*\.self_attn\.[qv]_proj",
        r"model\.layers\.1\..*_proj",
        r".*(up|down)_proj$",
        ["q_proj"],
        ["layers.0.mlp.up_proj"],
        ["self_attn.o_proj", "up_proj"],
    ],
)
def test_names_and_expressions_select_what_they_select_in_peft(target):
    recipe = PeftConfig(target_modules=target, exclude_modules=r".*layers\.0\.self_attn\.q_proj")
    found = adapted(on_meta(tiny_config("llama")), recipe)
    model = on_meta(tiny_config("llama"))
    with torch.device("meta"):
        theirs = get_peft_model(
            model, LoraConfig(target_modules=target, exclude_modules=recipe.exclude_modules), low_cpu_mem_usage=True
        )
    names = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, _ in theirs.named_parameters()
        if ".lora_A" in name
    }
    model = on_meta(tiny_config("llama"))
    check_targets(model, recipe)
    check_trainable(model, recipe)
    assert found == names == set(find_targets(model, recipe).modules) and names


def test_experts_are_adapted_where_target_parameters_names_them():
    recipe = PeftConfig(lora_dropout=0, target_modules=["q_proj"], target_parameters=EXPERTS)
    model = on_meta(tiny_config("qwen3_moe"))
    check_targets(model, recipe)
    targets = find_targets(model, recipe)
    assert len(targets.parameters) == 4 and not targets.experts
    assert any(name.endswith("mlp.experts") for name in adapted(model, recipe))


@pytest.mark.parametrize(
    ("family", "settings", "message", "next_step"),
    [
        ("llama", {"target_modules": r".*\.query_proj"}, "regular expression", "all-linear"),
        ("llama", {"target_modules": ["q_proj", "v_porj"]}, "called v_porj", "all-linear"),
        ("llama", {"target_modules": r".*\.self_attn"}, "cannot carry an adapter", "leave it out"),
        ("llama", {"target_modules": r".*"}, "cannot carry an adapter", "leave it out"),
        ("llama", {"exclude_modules": r"nothing\..*"}, "regular expression", "all-linear"),
        ("phi3", {"target_modules": ["q_proj"]}, "called q_proj", "name qkv_proj"),
        ("qwen3_moe", {"target_modules": ["q_proj", "gate_up_proj"]}, "called gate_up_proj", "target_parameters: [mlp.experts.gate_up_proj]"),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_proj"]}, "No parameter of the base", "correct the name"),
        ("qwen3_next", {"target_modules": ["up_proj", "gate_proj"]}, "adapt all experts instead", "leave it out"),
        ("llama", {"target_parameters": EXPERTS}, "No parameter of the base", "leave it out"),
    ],
)  # fmt: skip
def test_what_selects_nothing_is_refused_on_a_model_without_weights(family, settings, message, next_step):
    recipe, model = PeftConfig(lora_dropout=0, **settings), on_meta(tiny_config(family))
    with pytest.raises(BadConfig, match=message) as caught:
        check_targets(model, recipe)
        check_trainable(model, recipe)
    assert next_step in caught.value.next_step
