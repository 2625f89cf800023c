"""The Triton kernel of a LoRA layer's backward pass, against the products in float64."""

import pytest
import torch

from loraflow.training.lora_kernels import slope_products

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 8, 16])
@pytest.mark.parametrize("tokens, out", [(16384, 9216), (16384, 4096), (5000, 16384), (4096, 8200)])
def test_both_products_are_those_of_torch(dtype, rank, tokens, out):
    from loraflow.training.triton_kernels import tokens_of_a_program

    torch.manual_seed(out)
    dy = (torch.randn(tokens, out, device="cuda") / 8).to(dtype)
    up = torch.randn(out, rank, device="cuda").to(dtype)
    h = torch.randn(tokens, rank, device="cuda").to(dtype)
    assert tokens_of_a_program(dy, rank)
    dh, d_up = slope_products(dy, up, h)
    again = slope_products(dy, up, h)
    assert torch.equal(dh, again[0]) and torch.equal(d_up, again[1])
    for found, exact in ((dh, dy.double() @ up.double()), (d_up, dy.double().t() @ h.double())):
        assert found.dtype == dtype
        error = float((found.double() - exact).norm() / exact.norm())
        assert error < (3e-3 if dtype == torch.bfloat16 else 4e-4), error


@pytest.mark.parametrize("layout", ["transposed", "part of a wider tensor", "expanded"])
def test_a_gradient_may_have_any_layout(layout):
    torch.manual_seed(0)
    tokens, out = 8192, 8192
    wide = torch.randn(tokens, 2 * out, device="cuda", dtype=torch.bfloat16)
    dy = {
        "transposed": wide[:, :out].contiguous().t(),
        "part of a wider tensor": wide[:, 100 : 100 + out],
        "expanded": wide[:1, :out].expand(tokens, out),
    }[layout]
    up, h = (torch.randn(out, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    dh, d_up = slope_products(dy, up, h)
    for found, exact in ((dh, dy.double() @ up.double()), (d_up, dy.double().t() @ h.double())):
        assert float((found.double() - exact).norm() / exact.norm()) < 3e-3


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_has_the_gradients_of_torchs_products(compiled, monkeypatch):
    from loraflow.training import lora_kernels

    torch.manual_seed(0)
    weight = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16) / 16
    x = torch.randn(8192, 256, device="cuda", dtype=torch.bfloat16)
    tensors = [x, torch.randn(16, 256, device="cuda").bfloat16() / 16, torch.randn(8192, 16, device="cuda").bfloat16()]

    def gradients():
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]

        def layer(*leaves):
            return lora_kernels.LoraProduct.apply(*leaves, None, None, 0, "dense", weight)

        (torch.compile(layer, fullgraph=True) if compiled else layer)(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    found = gradients()
    monkeypatch.setattr(lora_kernels, "slope_kernel_or_none", lambda: None)
    for gradient, other in zip(found, gradients(), strict=True):
        assert float((gradient.float() - other.float()).norm() / other.float().norm()) < 1e-2


@pytest.mark.parametrize("tokens, out, rank", [(100, 9216, 16), (16384, 1024, 16), (16384, 9216, 64)])
def test_few_tokens_narrow_layers_and_large_ranks_use_torch(tokens, out, rank):
    from loraflow.training.triton_kernels import tokens_of_a_program

    dy = torch.randn(tokens, out, device="cuda", dtype=torch.bfloat16)
    up, h = torch.randn_like(dy[:1]).expand(rank, out).t().contiguous(), torch.randn_like(dy[:, :rank])
    assert not tokens_of_a_program(dy, rank)
    dh, d_up = slope_products(dy, up, h)
    assert torch.equal(dh, dy @ up) and torch.equal(d_up, dy.t() @ h)
