import json
from pathlib import Path

import pytest
import torch

from loraflow.adapters.merge import merge
from loraflow.failures import BadModel
from tests.conftest import build_phi3

TARGETS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def make_adapter(base: Path, folder: Path, seed: int = 1, **options) -> Path:
    """An adapter of peft's, with B away from zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "bias" in name or "magnitude" in name):
                parameter.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(folder)
    return folder


def by_peft(base: Path, adapter: Path, dtype: str | None = None) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), str(adapter))
    merged = model.merge_and_unload()
    return (merged.to(getattr(torch, dtype)) if dtype else merged).state_dict()


def read(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert torch.equal(ours[name], theirs[name]), f"{name}: {(ours[name] != theirs[name]).sum()} elements differ"


PLAIN = {
    "plain": {},
    "odd-scale": {"lora_alpha": 7, "r": 3},
    "rslora": {"use_rslora": True, "r": 6},
    "patterns": {"rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"qkv_proj": 5, "layers.1.mlp.down_proj": 3}},
    "some": {"target_modules": ["o_proj"], "layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
}
MORE = {
    "dora": {"use_dora": True},
    "modules-to-save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["qkv_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("options", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_streamed_merge_is_pefts_bit_for_bit(tmp_path, options, dtype):
    base = build_phi3(tmp_path / "base", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    (tmp_path / "out").mkdir()
    assert merge(base, adapter, tmp_path / "out")["route"] == "streamed"
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))


@pytest.mark.parametrize("options", MORE.values(), ids=MORE)
def test_what_is_more_than_a_sum_goes_through_peft(tmp_path, options):
    base = build_phi3(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    (tmp_path / "out").mkdir()
    assert merge(base, adapter, tmp_path / "out")["route"] == "peft"
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))


def test_wide_matrices_are_pefts_too(tmp_path):
    """Wider and taller than a block of rows, so that the cut matters."""
    base = build_phi3(tmp_path / "base", hidden_size=768, intermediate_size=1536, num_attention_heads=12,
                      num_key_value_heads=12, layers=1)  # fmt: skip
    adapter = make_adapter(base, tmp_path / "adapter", r=16, lora_alpha=32)
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out")
    assert_same(read(tmp_path / "out"), by_peft(base, adapter))


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_and_shards_and_a_cast(tmp_path, tie):
    base = build_phi3(tmp_path / "base", tie_word_embeddings=tie)
    adapter = make_adapter(base, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    merge(base, adapter, tmp_path / "out", dtype="float32", max_shard_bytes=100_000)
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert_same(read(tmp_path / "out"), by_peft(base, adapter, "float32"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    # from a sharded base as well
    (tmp_path / "again").mkdir()
    merge(tmp_path / "out", adapter, tmp_path / "again")
    assert_same(read(tmp_path / "again"), by_peft(tmp_path / "out", adapter))


def test_what_a_model_needs_to_stop_is_carried_over(tmp_path, phi3):
    (tmp_path / "out").mkdir()
    merge(phi3, make_adapter(phi3, tmp_path / "adapter"), tmp_path / "out")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (phi3 / name).read_bytes()


def test_an_adapter_for_another_base_is_refused(tmp_path, phi3):
    other = build_phi3(tmp_path / "other", layers=3)
    adapter = make_adapter(other, tmp_path / "adapter")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadModel, match="does not have") as caught:
        merge(phi3, adapter, tmp_path / "out")
    assert "layers.2" in str(caught.value)
    wide = make_adapter(build_phi3(tmp_path / "wide", hidden_size=128), tmp_path / "adapter2")
    with pytest.raises(BadModel, match="does not fit"):
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
