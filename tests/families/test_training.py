"""The train stage on tiny models of families: the engine and layout that it chooses, and what it refuses."""

import json
import shutil

import pytest
import torch

from loraflow.failures import BadConfig, BadModel
from tests.families.tiny import OPTIONS, tiny_model
from tests.unit.training.test_training import build_phi3, run, tokenize

PACKED = {"training_config__packing": True}
TARGETS = {"training_config__max_steps": 2}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return build_phi3(tmp_path_factory.mktemp("b") / "phi3", dtype="float32")


def base_of(family, phi3, folder, monkeypatch):
    """Return a tiny model of a family, with the tokenizer of the tiny Phi-3."""
    size = json.loads((phi3 / "config.json").read_text())["vocab_size"]
    monkeypatch.setitem(OPTIONS, family, {**OPTIONS.get(family, {}), "vocab_size": size})
    shutil.copytree(phi3, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    tiny_model(family, "eager").save_pretrained(folder)
    return folder


def settings(*targets, **more):
    return {**TARGETS, "peft_config__target_modules": list(targets), **more}


@pytest.mark.parametrize(
    ("family", "failure", "words"),
    [
        ("lfm2", BadConfig, "layers of type conv carry a state"),
        ("opt", BadModel, "architecture opt: logits change by"),
    ],
)
def test_packed_rows_are_refused_before_the_first_step(family, failure, words, phi3, tmp_path, monkeypatch):
    base = base_of(family, phi3, tmp_path / "base", monkeypatch)
    options = settings("q_proj", "v_proj", **PACKED)
    shards = tokenize(base, tmp_path, **options)
    with pytest.raises(failure) as caught:
        run(base, shards, tmp_path / "run", **options)
    assert words in caught.value.got and "training_config.packing to false" in caught.value.next_step
    assert not (tmp_path / "run" / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("family", "engine"), [("lfm2", "stock"), ("mixtral", "stock"), ("granite", "fast"), ("llama", "fast")]
)
def test_the_engine_follows_from_the_config(family, engine, phi3, tmp_path, monkeypatch):
    base = base_of(family, phi3, tmp_path / "base", monkeypatch)
    options = settings("q_proj", "v_proj")
    shards = tokenize(base, tmp_path, **options)
    adapter, _ = run(base, shards, tmp_path / "run", **options)
    chosen = json.loads((tmp_path / "run" / "out" / "telemetry" / "engine.json").read_text())
    assert (chosen["engine"], chosen["attention"]) == (engine, "sdpa") and adapter


@pytest.mark.parametrize("family", ["granite", "cohere2"])
def test_scaled_logits_give_the_same_adapter_with_both_engines(family, phi3, tmp_path, monkeypatch):
    base = base_of(family, phi3, tmp_path / "base", monkeypatch)
    options = settings("q_proj", "v_proj", training_config__learning_rate=1e-2)
    shards = tokenize(base, tmp_path, **options)
    fast, _ = run(base, shards, tmp_path / "fast", **options)
    stock, _ = run(base, shards, tmp_path / "stock", **options, runtime__engine="stock")
    assert fast.keys() == stock.keys()
    for name, tensor in fast.items():
        torch.testing.assert_close(tensor, stock[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [("lfm2", "nf4", "kernels that read"), ("lfm2", "fp8", "kernels that read"), ("mixtral", "fp8", "fast engine")],
)
def test_quantized_weights_are_refused_from_the_config_whatever_the_device(
    family, kind, words, phi3, tmp_path, monkeypatch
):
    """On a machine without a GPU too: the family's own reason comes before what the machine lacks."""
    base = base_of(family, phi3, tmp_path / "base", monkeypatch)
    options = settings("q_proj", "v_proj")
    shards = tokenize(base, tmp_path, **options)
    mixed = {"base__dtype": "bfloat16", "training_config__bf16": True, "base__quantization": kind}
    with pytest.raises(BadConfig, match=f"does not allow base.quantization: {kind}") as caught:
        run(base, shards, tmp_path / "run", **options, **mixed)
    assert words in caught.value.got


def test_adapters_that_no_gradient_reaches_are_named(phi3, tmp_path, monkeypatch, caplog):
    """Mamba multiplies by dt_proj's weight itself, so an adapter on it does nothing."""
    base = base_of("mamba", phi3, tmp_path / "base", monkeypatch)
    options = settings("in_proj", "dt_proj")
    adapter, _ = run(base, tokenize(base, tmp_path, **options), tmp_path / "run", **options)
    assert all(("dt_proj" in name) != bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
    assert "2 of 4 adapted modules were not trained, such as backbone.layers.0.mixer.dt_proj" in caplog.text
