"""Compiled layers that recompute their elementwise operations store less, and give the same gradients."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AttentionInterface, Phi3Config, Phi3ForCausalLM

from loraflow.training import attention
from loraflow.training.layers import prepare_layers
from loraflow.training.lora_kernels import accelerate_loras, set_token_keys

TOKENS, HIDDEN, INTERMEDIATE = 32, 24, 40


@pytest.fixture
def decoder(monkeypatch):
    """A layer of a Phi-3 with LoRA in bfloat16, whose attention is a sum: a kernel cannot be traced on a CPU."""

    def fake(module, query, key, value, mask=None, **options):
        return (query + key + value).transpose(1, 2), None

    AttentionInterface.register("fake-for-this-test", fake)
    config = Phi3Config(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=16, pad_token_id=0, eos_token_id=1, attn_implementation="fake-for-this-test",
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(
        Phi3ForCausalLM(config).to(torch.bfloat16), LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = (
                torch.randn_like(parameter.data.float()) * 0.1 if "lora_B" in name else parameter.data.float()
            )
    set_token_keys(accelerate_loras(model, torch.bfloat16), torch.arange(TOKENS, dtype=torch.int32))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
    model.train()
    yield model.get_base_model().get_decoder()
    torch._dynamo.reset()


def step(decoder):
    """Return the gradients of a pass, and the bytes for each token that it stores beside the weights."""
    held: dict[int, int] = {}

    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(
        1, TOKENS, HIDDEN, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    angles = decoder.rotary_emb(x, torch.arange(TOKENS)[None])
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = decoder.layers[0](x, position_embeddings=angles)
    y.float().square().mean().backward()
    trained = [p for p in decoder.parameters() if p.requires_grad]
    gradients = [x.grad, *(p.grad for p in trained)]
    for p in trained:
        p.grad = None
    return gradients, sum(held.values()) / TOKENS


def test_norms_activations_and_dropout_are_recomputed_with_equal_gradients(decoder):
    prepare_layers(decoder, compiled=True, recomputed=0.0, elementwise=False)
    expected, stored = step(decoder)
    torch._dynamo.reset()
    prepare_layers(decoder, compiled=True, recomputed=0.0, elementwise=True)
    gradients, stored_less = step(decoder)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    # At least two norms, and the product of gate and up, in bfloat16.
    assert stored - stored_less >= 2 * (2 * HIDDEN + INTERMEDIATE)


def test_a_part_of_a_fused_projection_does_not_keep_the_whole_of_it_for_the_backward_pass(monkeypatch):
    seen = []

    def kernel(q, k, v, begins, longest, scaling, window):
        seen.append(v)
        return by_document(q, k, v, begins, longest, scaling, window)

    by_document = attention.by_document
    fused = torch.randn(1, 6, 3 * 2 * 4)
    q, k, v = (part.view(1, 6, 2, 4).transpose(1, 2) for part in fused.split(2 * 4, -1))
    borders = {"cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32), "max_length_q": 6}
    expected, _ = attention.attend(None, q, k, v, **borders)
    monkeypatch.setattr(attention, "by_document", kernel)
    out, _ = attention.attend(None, q, k, v, **borders)
    alone = v.transpose(1, 2).contiguous().transpose(1, 2)
    attention.attend(None, q, k, alone, **borders)
    assert torch.equal(out, expected)
    assert seen[0].untyped_storage().nbytes() == v.nbytes, "a copy of this part only"
    assert seen[1].data_ptr() == alone.data_ptr(), "a projection of its own is not copied"
