"""The choice of the attention kernel, for training and for loading, on simulated GPUs."""

import pytest
import torch
from transformers import Gemma2Config, GPT2Config, Phi3Config

from loraflow.config import Runtime
from loraflow.failures import BadConfig, MissingExtra
from loraflow.hardware import attention
from loraflow.hardware.attention import DOCUMENTS, KernelPackage, choose_for_loading, choose_for_training

CONFIG = Phi3Config(hidden_size=384, num_attention_heads=4, pad_token_id=0)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that simulates a GPU's compute capability and the installed packages."""

    def make_up(capability, *installed):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: f"sm{capability[0]}{capability[1]}")
        monkeypatch.setattr(KernelPackage, "is_installed", property(lambda package: package.module in installed))

    return make_up


def choose(requested="auto", device="cuda", dtype="bfloat16", config=CONFIG, load=lambda name: name):
    return choose_for_training(Runtime(attn_implementation=requested), device, dtype, config, load)


FA4, FA3, FA2 = "flash_attn.cute", "flash_attn_interface", "flash_attn"


@pytest.mark.parametrize(
    ("capability", "installed", "expected"),
    [
        ((9, 0), (FA4, FA3), "fa4"), ((10, 0), (FA4, FA3), "fa4"), ((9, 0), (FA3,), "fa3"), ((9, 0), (), "varlen"),
        ((8, 0), (FA4, FA3), "varlen"), ((10, 0), (FA3,), "varlen"), ((9, 0), (FA2,), "varlen"),
    ],
)  # fmt: skip
def test_training_uses_the_fastest_kernel_that_the_gpu_supports(gpu, capability, installed, expected):
    gpu(capability, *installed)
    chosen, kernel = choose()
    assert kernel == expected
    assert (chosen.implementation, chosen.concatenated) == (DOCUMENTS, True)
    assert chosen.why == (
        "no newer flash attention is installed"
        if expected == "varlen"
        else "installed, and agrees with torch's own kernel on this GPU"
    )


def test_a_failing_kernel_is_skipped_unless_it_is_requested(gpu, caplog):
    gpu((9, 0), FA4, FA3)

    def load(name):
        if name != "varlen":
            raise ImportError(f"{name} is of another version")
        return name

    chosen, kernel = choose(load=load)
    assert kernel == "varlen"
    assert chosen.why == f"{FA3} is installed, but does not work here: ImportError: fa3 is of another version"
    assert f"{FA4} is installed, but does not work here" in caplog.text
    with pytest.raises(BadConfig, match="FA4 does not work here") as caught:
        choose("fa4", load=load)
    assert caught.value.got == "ImportError: fa4 is of another version"


def test_a_requested_kernel_that_is_not_available_is_an_error(gpu):
    gpu((9, 0))
    for requested, package in (("fa4", "flash-attn-4"), ("fa3", FA3), ("flash_attention_2", "flash-attn")):
        with pytest.raises(MissingExtra, match=f"{requested} needs a CUDA device and the package {package}"):
            choose(requested)
    gpu((8, 0), FA4)
    with pytest.raises(BadConfig, match="FA4 does not run on this GPU") as caught:
        choose("fa4")
    assert caught.value.got == "sm80"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"device": "cpu"}, "no GPU"),
        ({"config": Phi3Config(hidden_size=2048, num_attention_heads=4, pad_token_id=0)}, "heads are 512 wide"),
        ({"config": Phi3Config(attention_dropout=0.1, pad_token_id=0)}, "the model uses attention dropout"),
        ({"config": GPT2Config(attn_pdrop=0.1)}, "the model uses attention dropout"),
        ({"config": Gemma2Config(attn_logit_softcapping=50.0)}, "the model soft-caps its attention logits"),
    ],
    ids=["device", "width", "dropout", "gpt2's name of dropout", "soft cap"],
)
def test_cases_that_flash_attention_cannot_compute_use_sdpa_or_are_refused(gpu, settings, reason):
    gpu((9, 0), FA4)
    chosen, kernel = choose(**settings)
    with_mask = attention.attention_with_mask(settings.get("config", CONFIG))
    assert (chosen.implementation, chosen.concatenated, kernel) == (with_mask, False, None)
    assert chosen.why.startswith(reason)
    for requested in ("varlen", "fa3", "fa4"):
        with pytest.raises(BadConfig, match="is not available here") as caught:
            choose(requested, **settings)
        assert caught.value.got.startswith(reason)


def test_float32_takes_memory_efficient_attention_or_sdpa(gpu):
    gpu((9, 0), FA4)
    chosen, kernel = choose(dtype="float32")
    assert (chosen.implementation, chosen.concatenated, kernel) == (DOCUMENTS, True, "efficient")

    def load(name):
        raise RuntimeError("_efficient_attention_forward() expected at most 9 arguments")

    chosen, kernel = choose(dtype="float32", load=load)
    assert (chosen.implementation, chosen.concatenated, kernel) == ("sdpa", False, None)
    assert chosen.why == (
        "flash attention has no float32, and torch's memory-efficient attention does not work here: "
        "RuntimeError: _efficient_attention_forward() expected at most 9 arguments"
    )
    for requested in ("varlen", "fa3", "fa4"):
        with pytest.raises(BadConfig, match="is not available here") as caught:
            choose(requested, dtype="float32")
        assert caught.value.got == "flash attention has no float32"


def test_older_gpus_use_sdpa(gpu):
    gpu((7, 5))
    assert choose()[0].why == "sm75 is older than Ampere"


def test_a_requested_kernel_is_used(gpu):
    gpu((9, 0), FA4, FA2)
    for requested in ("sdpa", "eager", "flash_attention_2"):
        chosen, kernel = choose(requested)
        assert (chosen.implementation, chosen.why, kernel) == (requested, "asked for", None)
        assert chosen.concatenated == (requested == "flash_attention_2")
    assert choose("varlen")[1] == "varlen"


@pytest.mark.parametrize("requested", ["auto", "varlen", "fa3", "fa4"])
def test_a_loaded_model_uses_flash_attention_2_if_it_is_installed(gpu, requested):
    runtime = Runtime(attn_implementation=requested)
    gpu((9, 0), FA2)
    assert choose_for_loading(runtime, "cuda") == "flash_attention_2"
    assert choose_for_loading(runtime, "cuda", "float32") == "sdpa"
    assert choose_for_loading(runtime, "cpu") == "sdpa"
    gpu((9, 0))
    assert choose_for_loading(runtime, "cuda") == "sdpa"


def test_a_loaded_model_uses_the_requested_kernel(gpu):
    gpu((9, 0), FA2)
    assert choose_for_loading(Runtime(attn_implementation="eager"), "cuda", "float32") == "eager"
    flash = Runtime(attn_implementation="flash_attention_2")
    assert choose_for_loading(flash, "cuda") == "flash_attention_2"
    assert choose_for_loading(flash, "cuda", "float32") == "sdpa"
    with pytest.raises(MissingExtra, match="flash_attention_2 needs a CUDA device and the package flash-attn"):
        choose_for_loading(flash, "cpu")


def test_a_package_whose_parent_is_missing_is_not_installed():
    assert not KernelPackage("x", "no_such_parent.child", "x").is_installed
    assert KernelPackage("x", "torch.nn", "x").is_installed
    assert list(attention.DOCUMENT_KERNEL_PACKAGES) == ["fa4", "fa3"], "the fastest is tried first"
