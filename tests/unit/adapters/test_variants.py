"""PEFT's variants through the train stage, and their conversions against PEFT's own."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraflow.adapters import tokenizer_files, variants
from loraflow.adapters.lora_config import lora_config
from loraflow.config.lora import PeftConfig
from loraflow.failures import BadConfig
from tests.conftest import build_phi3
from tests.unit.adapters.test_loralib import IDS, perturb, pretrained
from tests.unit.training.test_training import recipe, tokenize
from tests.variants import ALL, VARIANTS, exercise

QUICK = {"PiSSA", "EVA"}  # the rest takes minutes; docs/adapters.md has the figures of all


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    base = build_phi3(folder / "phi3")
    return base, tokenize(base, folder)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS])
def test_a_variant_is_trained_killed_resumed_and_merged(parts, tmp_path, name):
    base, shards = parts
    seen = exercise(VARIANTS[name], base, shards, tmp_path)
    assert seen["last_loss"] < seen["first_loss"] - 0.1
    assert seen["resumed"] == 0.0, "bit for bit"
    assert seen["exported"] < 1e-5
    assert seen["evaluated"] < seen["first_loss"]
    assert seen["merge_ulps"] <= 1
    assert seen["kl"] < seen["moved"] / 1000
    assert seen["adapter"]["base_model_name_or_path"] is None
    recorded = json.loads((seen["folder"] / tokenizer_files.ORIGIN).read_text())
    assert recorded["chat_template_sha256"] == tokenizer_files.template_hash(base)


def test_the_documentation_lists_exactly_the_tested_variants():
    page = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "adapters.py"))
    rows = page["rows_of"](page["PAGE"].read_text(encoding="utf-8"))
    assert [*rows] == [*VARIANTS, "LoftQ"]
    for name, settings in VARIANTS.items():
        assert rows[name].split("|")[2].strip() == page["recipe_of"](settings), (
            f"python benchmarks/adapters.py '{name}'"
        )
    assert rows["LoftQ"] == f"| {' | '.join(page['refused_row']())} |"


@pytest.mark.parametrize("options", [
    {}, {"use_rslora": True}, {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"o_proj": 3}},
], ids=["plain", "rslora", "patterns"])  # fmt: skip
@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_an_adapter_of_a_residual_base_becomes_lora_on_the_original_base(tmp_path, how, options):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = build_phi3(tmp_path / "base", dtype="float32")
    config = {"init_lora_weights": how}
    model = get_peft_model(
        pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="CAUSAL_LM", **config, **options)
    )
    initial = variants.initialize(model, PeftConfig(init_lora_weights=how), base, tmp_path, [])
    model.peft_config["default"].init_lora_weights = True  # what peft asks for in the first of its two savings
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = how
    perturb(model, 0.05)
    with torch.no_grad():
        expected = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "ours")
    variants.convert_to_plain_lora(tmp_path / "ours", initial)
    loaded = PeftModel.from_pretrained(pretrained(base), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, expected, atol=1e-4)
        assert not torch.allclose(pretrained(base).eval()(IDS).logits, expected, atol=1e-2)
    if not (options.get("use_rslora") and options.get("rank_pattern")):
        model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
        actual, by_peft = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
        assert actual.keys() == by_peft.keys()
        assert all(torch.equal(actual[name], by_peft[name]) for name in actual)
        actual_config, config = (
            json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
        )
        assert actual_config["r"] == config["r"]
        assert actual_config["lora_alpha"] == pytest.approx(config["lora_alpha"])


def test_lora_plus_learning_rates_equal_pefts_optimizer(phi3):
    from peft import get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    values = recipe(peft_config__target_modules=[*ALL, "embed_tokens"]).peft_config
    model = get_peft_model(pretrained(phi3), lora_config(values))
    parameters = [p for p in model.parameters() if p.requires_grad]
    actual = torch.optim.AdamW([{"params": parameters[:9], "weight_decay": 0.1}, {"params": parameters[9:]}], lr=1e-3)
    variants.loraplus(actual, model, 16.0, 1e-6)
    by_peft = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = [{id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]} for optimizer in (actual, by_peft)]
    assert rates[0] == rates[1]
    assert sorted(set(rates[0].values())) == [1e-6, 1e-3, 16e-3]
    assert {g["weight_decay"] for g in actual.param_groups} == {0.1, 0.01}


def test_unmergeable_settings_are_refused_before_training(tmp_path, phi3):
    tied = pretrained(build_phi3(tmp_path / "tied", tie_word_embeddings=True))
    plain = pretrained(phi3)
    for model, options, says in (
        (tied, {"peft_config__modules_to_save": ["lm_head"]}, "embedding and head are tied"),
        (tied, {"peft_config__modules_to_save": ["embed_tokens"]}, "embedding and head are tied"),
        (
            plain,
            {"peft_config__init_lora_weights": "pissa", "peft_config__target_modules": ["embed_tokens"]},
            "embeddings",
        ),
        (plain, {"peft_config__trainable_token_indices": [10**6]}, "no such token"),
    ):
        with pytest.raises(BadConfig) as caught:
            variants.check(model, recipe(**options).peft_config)
        assert says in str(caught.value)
    variants.check(plain, recipe(peft_config__modules_to_save=["lm_head"]).peft_config)
