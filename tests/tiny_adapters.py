"""Adapters of peft's for tiny bases, and peft's own merge of them."""

import json
from pathlib import Path

import torch

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


def change_tensors(adapter: Path, change) -> None:
    """Replace each tensor of an adapter by what `change` returns; None removes it."""
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    changed = {name: change(name, tensor) for name, tensor in load_file(file).items()}
    save_file({name: tensor.clone() for name, tensor in changed.items() if tensor is not None}, file)


def by_peft(base: Path, adapter: Path, dtype: str | None = None, *, untied: bool = False) -> dict[str, torch.Tensor]:
    """Return peft's merge; `untied`: into a base whose head is a weight of its own, as peft recommends."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if untied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model = PeftModel.from_pretrained(model, str(adapter))
    merged = model.merge_and_unload()
    return (merged.to(getattr(torch, dtype)) if dtype else merged).state_dict()


def read(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), (
            f"{name}: {(found[name] != expected[name]).sum()} elements differ"
        )


def configured(adapter: Path, **values) -> Path:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return adapter
