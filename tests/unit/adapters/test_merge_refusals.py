"""What a merge refuses: adapters and bases that do not fit, are damaged, or are not finite."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from loraflow.adapters import merge_folders, tokenizer_files
from loraflow.adapters.merge_folders import merge
from loraflow.base import stored_weights
from loraflow.failures import BadModel
from tests.conftest import build_phi3
from tests.tiny_adapters import change_tensors, configured, make_adapter


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "merge it where it was trained"),
        ({"alora_invocation_tokens": [5, 6]}, "serve base and adapter together"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "adds layers to the base"),
        ({"lora_bias": True}, "peft cannot merge"),
        ({"init_lora_weights": "milora"}, "may have changed the base's weights"),
        ({"peft_type": "XLORA"}, "not a LoRA adapter"),
        ({"megatron_config": {"a": 1}}, "its layers are Megatron's"),
        ({"arrow_config": {"top_k": 1}}, "chooses among several adapters"),
        ({"lora_alpha": float("nan")}, "a finite number at lora_alpha"),
        ({"lora_alpha": float("inf")}, "a finite number at lora_alpha"),
        ({"lora_alpha": None}, "a finite number at lora_alpha"),
        ({"alpha_pattern": {"o_proj": "8"}}, "a finite number at alpha_pattern.o_proj"),
        ({"r": 8}, "rank 8, by adapter_config.json"),
        ({"rank_pattern": {r"layers\.1\..*": 2}}, "rank 2, by adapter_config.json"),
    ],
)
def test_an_unmergeable_configuration_is_refused(tmp_path, quick_phi3, values, says):
    options = {"lora_bias": True} if "lora_bias" in values else {}
    adapter = configured(make_adapter(quick_phi3, tmp_path / "adapter", **options), **values)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel) as caught:
        merge(quick_phi3, adapter, tmp_path / "out")
    assert says in str(caught.value)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unsupported_dtypes_are_refused(tmp_path, quick_phi3, dtype):
    from safetensors.torch import load_file, save_file

    file = make_adapter(quick_phi3, tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="of a type that cannot be merged"):
        merge(quick_phi3, file.parent, tmp_path / "out")


def test_a_base_without_a_head_is_not_merged_with_a_random_one(tmp_path):
    """tie_word_embeddings is this class's default no more, so transformers would make up a head."""
    base = build_phi3(tmp_path / "base", dtype="float32", tie_word_embeddings=True)
    adapter = make_adapter(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="lack weights") as caught:
        merge(base, adapter, tmp_path / "out")
    assert caught.value.got == "lm_head.weight" and not list((tmp_path / "out").iterdir())


def test_a_refused_adapter_is_reported_with_the_command_that_accepts_it(tmp_path, quick_phi3):
    """Split projections for a fused base, and the folder around several adapters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaConfig(
        vocab_size=json.loads((quick_phi3 / "config.json").read_text())["vocab_size"], hidden_size=64,
        intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    adapter = make_adapter(tmp_path / "llama", tmp_path / "several" / "second", target_modules=["q_proj", "v_proj"])
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel) as caught:
        merge(quick_phi3, adapter, tmp_path / "out")
    assert "expected: model.layers.0.self_attn.qkv_proj, which the base has" in str(caught.value)
    assert "loraflow adapters convert" in caught.value.next_step
    with pytest.raises(BadModel) as caught:
        merge(quick_phi3, tmp_path / "several", tmp_path / "out")
    assert str(adapter) in caught.value.next_step


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "gone.safetensors"]
)
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, phi3, name):
    base = tmp_path / "base"
    shutil.copytree(phi3, base)
    index = {"weight_map": dict.fromkeys((e.name for e in stored_weights.model_entries(base)), name)}
    (base / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (base / "other.safetensors").write_bytes(b"")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="outside of its folder|is missing"):
        merge(base, make_adapter(phi3, tmp_path / "adapter"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_index_that_contradicts_its_files_is_refused(tmp_path, phi3):
    (tmp_path / "base").mkdir()
    adapter = make_adapter(phi3, tmp_path / "adapter")
    merge(phi3, adapter, tmp_path / "base", max_shard_bytes=60_000)
    file = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"].pop("model.norm.weight")
    file.write_text(json.dumps(index))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="index does not match"):
        merge(tmp_path / "base", adapter, tmp_path / "out")


def test_a_non_finite_adapter_is_refused(tmp_path, phi3):
    from safetensors.torch import load_file, save_file

    adapter = make_adapter(phi3, tmp_path / "adapter")
    state = load_file(adapter / "adapter_model.safetensors")
    state[sorted(state)[2]][0, 0] = float("inf")
    save_file(state, adapter / "adapter_model.safetensors")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="not finite"):
        merge(phi3, adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_an_adapter_of_another_base_or_template_is_refused(tmp_path, phi3):
    adapter = make_adapter(phi3, tmp_path / "adapter")
    tokenizer_files.write_origin(adapter, phi3, "digest-a")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="another base"):
        merge(phi3, adapter, tmp_path / "out", base_digest="digest-b")
    other = tmp_path / "other"
    shutil.copytree(phi3, other)
    (other / "chat_template.jinja").write_text((phi3 / "chat_template.jinja").read_text() + " ")
    with pytest.raises(BadModel, match="another chat template"):
        merge(other, adapter, tmp_path / "out", base_digest="digest-a")
    assert not list((tmp_path / "out").iterdir())
    merge(phi3, adapter, tmp_path / "out", base_digest="digest-a")
    recorded = json.loads((tmp_path / "out" / tokenizer_files.ORIGIN).read_text())
    assert recorded == {"base": "digest-a", "chat_template_sha256": tokenizer_files.template_hash(phi3)}


def test_an_adapter_for_another_base_is_refused(tmp_path, phi3):
    other = build_phi3(tmp_path / "other", layers=3)
    adapter = make_adapter(other, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="does not fit the base") as caught:
        merge(phi3, adapter, tmp_path / "out")
    assert "8 unexpected" in caught.value.got and "layers.2" in caught.value.got
    wide = make_adapter(build_phi3(tmp_path / "wide", hidden_size=128), tmp_path / "adapter2")
    with pytest.raises(BadModel, match="of another shape"):
        merge(phi3, wide, tmp_path / "out")


def test_a_pickle_is_refused_and_never_opened(tmp_path, phi3):
    import pickle

    class Canary:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "opened",))

    adapter = make_adapter(phi3, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Canary()))
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="pickle"):
        merge(phi3, adapter, tmp_path / "out")
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "raw", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
)
def test_a_damaged_header_is_refused(tmp_path, phi3, raw):
    adapter = make_adapter(phi3, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").write_bytes(raw)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="damaged"):
        merge(phi3, adapter, tmp_path / "out")


def test_insufficient_memory_is_not_reported_as_a_bad_adapter(tmp_path, monkeypatch):
    base = build_phi3(tmp_path / "base", dtype="float32")
    adapter = make_adapter(base, tmp_path / "adapter", init_lora_weights="olora")

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("peft.tuners.tuners_utils.BaseTuner.merge_and_unload", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("by_peft", [False, True])
def test_merged_weights_that_are_not_finite_are_refused(tmp_path, quick_phi3, monkeypatch, by_peft):
    adapter = make_adapter(quick_phi3, tmp_path / "adapter")
    change_tensors(adapter, lambda name, tensor: tensor * 1e25 if "lora_" in name else tensor)
    if by_peft:
        monkeypatch.setattr(merge_folders, "_plan", lambda *a, **k: None)
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="not finite"):
        merge(quick_phi3, adapter, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"])
def test_a_base_with_a_weight_that_is_not_finite_is_refused_also_where_the_adapter_changes_nothing(
    tmp_path, value, tensor, monkeypatch
):
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("loraflow.adapters.streaming_merge.CHECKED_BYTES", 1000)
    base = build_phi3(tmp_path / "base", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    weights = load_file(base / "model.safetensors")
    weights[tensor].view(-1)[-1] = value
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="not finite, and the adapter does not change it") as caught:
        merge(base, adapter, tmp_path / "out")
    assert tensor in caught.value.where


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["o_proj", "lm_head"]}])
def test_two_kinds_of_updates_of_one_tied_head_are_refused_in_one_sentence(tmp_path, options):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=True)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "base",
        tmp_path / "adapter",
        **{"trainable_token_indices": [3, 5], "target_modules": ["o_proj"], **options},
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="lm_head has two kinds of updates"):
        merge(tmp_path / "base", adapter, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("change", ["missing", "two values"])
def test_a_foreign_base_whose_files_do_not_fit_its_config_is_refused(tmp_path, change):
    """Its merged model would be loaded with random numbers, or answer with another head than a server's."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    base, out = tmp_path / "base", tmp_path / "out"
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=False)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    if change == "missing":
        weights = load_file(base / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    else:
        values = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**values, "tie_word_embeddings": True}))
    out.mkdir()
    with pytest.raises(BadModel, match="lack weights" if change == "missing" else "ties two weights"):
        merge(base, adapter, out)
    assert not list(out.iterdir())
