"""The Triton kernel of LoRA's dropout, against torch's operations: equal bits."""

import pytest
import torch

from loraflow.training import lora_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def inputs(tokens, features, dtype, adapters=None):
    generator = torch.Generator("cuda").manual_seed(tokens)
    x = torch.randn(tokens, features, device="cuda", generator=generator).to(dtype)
    if tokens > 1:
        x[1, :3] = torch.tensor([float("inf"), float("nan"), -0.0])
    keys = torch.randint(-(2**31), 2**31, (tokens,), device="cuda", generator=generator).to(torch.int32)
    module = torch.tensor(-77, dtype=torch.int32, device="cuda")
    if adapters is None:
        return x, keys, module
    return x.view(adapters, tokens // adapters, features), keys, module


def assert_equal_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens, features", [(1, 1), (700, 576), (64, 8192), (513, 1025)])
@pytest.mark.parametrize("below", [1, 16, 3277, 65535])
def test_one_adapter(tokens, features, dtype, below):
    arguments = inputs(tokens, features, dtype)
    assert lora_kernels.dropout_kernel_or_none() is not None
    scale = 65536 / (65536 - below)
    (expected,) = lora_kernels.drop_by_torch([arguments[0]], *arguments[1:], below, scale)
    (found,) = lora_kernels.drop([arguments[0]], *arguments[1:], below, scale)
    assert_equal_bits(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_several_adapters_have_their_own_dropout(dtype):
    x, keys, module = inputs(900, 576, dtype, adapters=3)
    below = torch.tensor([0, 3277, 40_000], dtype=torch.int32, device="cuda").view(-1, 1, 1)
    scale = 65536 / (65536 - below.float())
    (found,) = lora_kernels.drop([x], keys, module, below, scale)
    (expected,) = lora_kernels.drop_by_torch([x], keys, module, below, scale)
    assert_equal_bits(found, expected)
    assert torch.equal(found[0, 2:], x[0, 2:])


def test_rows_may_be_parts_of_a_wider_tensor():
    x, keys, module = inputs(100, 640, torch.bfloat16)
    for part in (x[:, 64:], x.t().contiguous().t()):
        (found,) = lora_kernels.drop([part], keys, module, 3277, 1.1)
        (expected,) = lora_kernels.drop_by_torch([part], keys, module, 3277, 1.1)
        assert_equal_bits(found, expected)
