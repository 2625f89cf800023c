"""Each layer computes what loralib's layer of the same kind computes."""

import loralib
import pytest
import torch
from torch import nn

from loraflow.adapters.loralib import layers
from loraflow.adapters.loralib.model import prepare
from loraflow.adapters.loralib.swap import Settings
from tests.unit.adapters.test_loralib import IDS, QV, perturb, pretrained

# layers


def pair(kind: str, bias: bool):
    """A pretrained module, our layer around it, loralib's with the same tensors, and an input."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    common = dict(r=3, lora_alpha=7, lora_dropout=0.0, merge_weights=True)
    blocks = {}
    if kind == "embedding":
        module, x = nn.Embedding(11, 6), torch.tensor([[1, 4, 10], [0, 0, 2]])
        other = loralib.Embedding(11, 6, r=3, lora_alpha=7)
    elif kind == "gpt2":
        module, x = Conv1D(12, 5), torch.randn(2, 3, 5)
        other = loralib.Linear(5, 12, r=3, lora_alpha=7, fan_in_fan_out=True)
    elif kind == "merged-gpt2":
        module, x = Conv1D(12, 5), torch.randn(2, 3, 5)
        blocks = {"sizes": [4, 4, 4], "enable_lora": [True, False, True]}
        other = loralib.MergedLinear(5, 12, 3, 7, enable_lora=[True, False, True], fan_in_fan_out=True)
    else:
        module, x = nn.Linear(5, 12, bias=bias), torch.randn(2, 3, 5)
        if kind == "linear":
            other = loralib.Linear(5, 12, r=3, lora_alpha=7, bias=bias)
        else:
            flags = [letter == "1" for letter in kind]
            blocks = {"sizes": [12 // len(flags)] * len(flags), "enable_lora": flags}
            other = loralib.MergedLinear(5, 12, 3, 7, enable_lora=flags, bias=bias)
    weight = module.weight.detach().clone()
    layer = layers.wrap_module(module, **common, **blocks)
    assert torch.equal(layer.weight, weight), "the pretrained weight is unchanged"
    perturb(layer, 0.5)
    other.load_state_dict(layer.state_dict())
    return layer, other, x


KINDS = ["linear", "gpt2", "embedding", "111", "101", "010", "11", "01", "merged-gpt2"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_equals_loralibs(kind, bias):
    layer, other, x = pair(kind, bias)
    for mode in (True, False, True):
        layer.train(mode)
        other.train(mode)
        assert layer.merged == (not mode)
        assert torch.allclose(layer(x), other(x), atol=1e-5)
    layer(x).square().sum().backward()
    other(x).square().sum().backward()
    assert torch.allclose(layer.lora_A.grad, other.lora_A.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.lora_B.grad, other.lora_B.grad, rtol=1e-4, atol=1e-4)


def test_each_unequal_block_equals_a_loralib_layer():
    torch.manual_seed(0)
    module, x, sizes = nn.Linear(8, 16), torch.randn(3, 8), [8, 4, 4]
    layer = perturb(layers.wrap_module(module, r=2, lora_alpha=3, lora_dropout=0.0, merge_weights=False, sizes=sizes,
                               enable_lora=[True, False, True]), 0.5)  # fmt: skip
    parts = []
    for i, (at, size) in enumerate(((0, 8), (8, 4), (12, 4))):
        own = loralib.Linear(8, size, r=0 if i == 1 else 2, lora_alpha=3)
        own.weight.data, own.bias.data = module.weight.data[at : at + size], module.bias.data[at : at + size]
        if i != 1:
            a, b = (0, slice(0, 8)) if i == 0 else (2, slice(8, 12))
            own.lora_A.data, own.lora_B.data = layer.lora_A.data[a : a + 2], layer.lora_B.data[b]
        parts.append(own(x))
    assert torch.allclose(layer(x), torch.cat(parts, -1), atol=1e-6)
    layer.merge()
    assert torch.allclose(layer(x), torch.cat(parts, -1), atol=1e-6)


def test_the_forward_pass_never_computes_the_full_update_matrix():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] in ((90, 30), (30, 90)) and "t." not in str(func):
                Sizes.largest += 1
            return out

    layer = layers.wrap_module(nn.Linear(30, 90), r=2, lora_alpha=3, lora_dropout=0.1, merge_weights=False,
                          sizes=[30, 30, 30], enable_lora=[True, False, True])  # fmt: skip
    with Sizes():
        layer(torch.randn(4, 30)).sum().backward()
    assert Sizes.largest == 0
    with Sizes():
        layer.merge()
    assert Sizes.largest > 0, "merging does compute it, so the count would notice"


@pytest.mark.parametrize("kind", KINDS)
def test_unmerging_restores_bf16_weights_bit_for_bit(kind):
    layer, _, _ = pair(kind, True)
    layer.weight.data = layer.weight.data.bfloat16()
    before = layer.weight.detach().clone()
    for _ in range(20):
        layer.eval()
        assert not torch.equal(layer.weight, before)
        assert torch.equal(layer.state_dict()["weight"], before), "a merged weight is never saved as the base's"
        layer.train()
    assert torch.equal(layer.weight, before)


def test_a_and_b_are_fp32_with_16_bit_weights(phi3):
    model = prepare(pretrained(phi3, torch.bfloat16), Settings(targets=["qkv_proj"], enable_lora=QV), 0)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(IDS).logits.dtype == torch.bfloat16
