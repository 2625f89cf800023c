"""A model whose files lack weights is refused when it is loaded; transformers would fill them with random numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from loraflow.base.load import load_model
from loraflow.config import Runtime
from loraflow.failures import BadModel


def saved(folder, *, tied):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=tied)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: None if "q_proj" in name else name,
        lambda name: name.replace("model.layers", "text_model.model.layers"),  # Emu3's full checkpoints
    ],
)
def test_weights_that_the_files_lack_or_name_otherwise_are_refused(tmp_path, rename):
    file = saved(tmp_path / "base", tied=False) / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file({name: tensor for name, tensor in tensors.items() if name}, file, metadata={"format": "pt"})
    with pytest.raises(BadModel, match="files lack weights") as caught:
        load_model(file.parent, "float32", Runtime(device="cpu"))
    assert "model.layers.0." in caught.value.got


def test_a_head_that_is_not_stored_is_refused_unless_it_is_the_embeddings(tmp_path):
    folder = saved(tmp_path / "base", tied=True)
    load_model(folder, "float32", Runtime(device="cpu"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(BadModel, match="files lack weights") as caught:
        load_model(folder, "float32", Runtime(device="cpu"))
    assert "tie_word_embeddings" in caught.value.next_step
