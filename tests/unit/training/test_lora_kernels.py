"""LoRA's forward and backward kernels, dropout masks and the fp8 base, against PEFT and plain torch."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear

from loraflow.training import collation
from loraflow.training.frozen_linear import fp8, rowwise
from loraflow.training.lora_kernels import LoraProduct, accelerate_loras, keep_mask, set_token_keys, to_fp8
from tests.unit.training.test_training import base, run, same, straight  # noqa: F401


def lora(rate=0.0, bias=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias, dtype=dtype))
    model = get_peft_model(
        model,
        LoraConfig(r=4, lora_alpha=8, lora_dropout=rate, target_modules=["0"], init_lora_weights=False, **options),
    )
    return model.train()


def gradients(model, x, dy):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, named


@pytest.mark.parametrize("bias", [False, True])
def test_lora_forward_and_backward_equal_peft(bias):
    model, x, dy = lora(bias=bias), torch.randn(3, 7, 24), torch.randn(3, 7, 40)
    expected = gradients(model, x, dy)
    assert len(accelerate_loras(model, torch.float32)) == 1
    got = gradients(model, x, dy)
    for a, b in zip(expected[:2], got[:2], strict=True):
        torch.testing.assert_close(a, b)
    assert expected[2].keys() == got[2].keys()
    for name in expected[2]:
        torch.testing.assert_close(expected[2][name], got[2][name])


def test_in_16_bits_the_error_is_not_larger_than_pefts():
    x, dy = torch.randn(64, 24), torch.randn(64, 40)
    exact = gradients(lora(), x, dy)
    peft_model, accelerated = lora(dtype=torch.bfloat16), lora(dtype=torch.bfloat16)
    for model in (peft_model, accelerated):
        for name, p in model.named_parameters():
            p.data = dict(lora().named_parameters())[name].data.to(p.dtype)
    accelerate_loras(accelerated, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        of_peft = gradients(peft_model, x.bfloat16(), dy.bfloat16())
    found = gradients(accelerated, x.bfloat16(), dy.bfloat16())

    def error(found):
        return sum(((found[2][n].float() - exact[2][n]) ** 2).sum() for n in exact[2]).sqrt().item()

    assert error(found) <= error(of_peft) * 1.1
    assert all(grad.dtype == torch.float32 for grad in found[2].values()), "masters stay fp32"


def test_only_plain_lora_is_replaced():
    assert accelerate_loras(lora(use_dora=True), torch.float32) == []
    assert accelerate_loras(lora(), torch.bfloat16) == [], "another dtype is autocast's matter"
    model = lora()
    accelerate_loras(model, torch.float32)
    x = torch.randn(5, 24)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), linear(x, model.base_model.model[0].base_layer.weight))
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_dropout_equals_the_mask_in_forward_and_backward():
    model, x, dy = lora(rate=0.25), torch.randn(50, 24), torch.randn(50, 40)
    (module,) = accelerate_loras(model, torch.float32)
    keys = torch.randint(-(2**31), 2**31 - 1, (50,), dtype=torch.int32)
    set_token_keys([module], keys)
    y, dx, grads = gradients(model, x, dy)
    keep = keep_mask(keys, module.module_key, 24, module.keep_from)
    down = module.lora_A["default"].weight.detach().requires_grad_()
    up = module.lora_B["default"].weight.detach().requires_grad_()
    leaf = x.clone().requires_grad_()
    expected = linear(leaf, module.base_layer.weight) + linear(linear(leaf * keep / 0.75, down), up) * 2
    expected.backward(dy)
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(dx, leaf.grad)
    torch.testing.assert_close(grads["base_model.model.0.lora_A.default.weight"], down.grad)
    torch.testing.assert_close(grads["base_model.model.0.lora_B.default.weight"], up.grad)
    model.eval()
    torch.testing.assert_close(model(x), linear(x, module.base_layer.weight) + linear(linear(x, down), up) * 2)


def test_dropout_masks_are_unbiased_and_independent():
    keys = torch.from_numpy(collation.mix(np.arange(4000, dtype=np.uint64)).astype(np.int32))
    mask = keep_mask(keys, torch.tensor(1, dtype=torch.int32), 256, round(0.05 * 65536)).float()
    other_mask = keep_mask(keys, torch.tensor(2, dtype=torch.int32), 256, round(0.05 * 65536)).float()
    deviation = math.sqrt(0.05 * 0.95 / mask.numel())
    assert abs(mask.mean() - 0.95) < 5 * deviation
    assert (mask.mean(0) - 0.95).abs().max() < 6 * math.sqrt(0.05 * 0.95 / 4000)
    for left, right in ((mask, other_mask), (mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
        product = ((left - left.mean()) * (right - right.mean())).mean() / (0.05 * 0.95)
        assert abs(product) < 5 / math.sqrt(left.numel()), "masks of neighbours have nothing in common"


def test_the_lora_product_passes_gradcheck():
    x, w, down, up = (torch.randn(*s, dtype=torch.float64) for s in ((6, 5), (7, 5), (2, 5), (7, 2)))
    leaves = [t.requires_grad_() for t in (x, down, up)]
    assert torch.autograd.gradcheck(lambda a, b, c: LoraProduct.apply(a, b, c, None, None, 0, "dense", w), leaves)
    keys = torch.arange(6, dtype=torch.int32), torch.tensor(9, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda a, b, c: LoraProduct.apply(a, b, c, *keys, 20000, "dense", w), leaves)


def test_fp8_weights_are_accurate_in_both_orientations():
    module = torch.nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)
    codes, scales, codes_t, scales_t = fp8(module).tensors
    w = module.weight.detach().float()
    assert torch.equal((codes.float() * scales.t()).amax(1), (codes.float() * scales.t()).amax(1))
    for back in (codes.float() * scales.t(), (codes_t.float() * scales_t.t()).t()):
        assert ((back - w).norm() / w.norm()) < 0.03, "e4m3 has three bits of mantissa"
    zeros, scale = rowwise(torch.zeros(2, 16))
    assert zeros.float().abs().max() == 0 and scale.isfinite().all()


def test_an_fp8_base_gives_nearly_the_same_gradients():
    x, dy = torch.randn(128, 24).bfloat16(), torch.randn(128, 40).bfloat16()
    exact = gradients(lora(), x.float(), dy.float())
    model = lora(dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        p.data = dict(lora().named_parameters())[name].data.to(p.dtype)
    loras = accelerate_loras(model, torch.bfloat16)
    to_fp8(loras)
    assert model.base_model.model[0].base_layer.weight.is_meta, "the original is let go"
    y, dx, _ = gradients(model, x, dy)
    assert ((y - exact[0]).norm() / exact[0].norm()) < 0.06
    assert ((dx - exact[1]).norm() / exact[1].norm()) < 0.06


def test_dropout_does_not_depend_on_the_micro_batch(base, straight, tmp_path):  # noqa: F811
    results = [
        run(base, straight[0], tmp_path / str(rows), peft_config__lora_dropout=0.3, runtime__micro_batch=rows)
        for rows in (1, 4)
    ]
    assert same(results[0][0], results[1][0], 5e-5)
    assert not same(results[0][0], straight[1], 1e-3), "it does drop"


def test_the_kernel_of_the_backward_products_is_used_on_hopper_only_and_where_it_runs(monkeypatch, caplog):
    from loraflow.training import lora_kernels

    def fail(*_, **__):
        raise RuntimeError("no C compiler")

    kernel = lora_kernels.slope_kernel_or_none
    monkeypatch.setattr(torch, "ones", fail)  # the first step of the trial
    for capability, warned in (((7, 5), False), ((9, 0), True)):
        kernel.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert kernel() is None
        assert ("without a Triton kernel" in caplog.text) is warned
    kernel.cache_clear()


def test_attention_is_chosen_on_a_cpu_for_every_type_of_model():
    """Heads are looked at for the kernels of a GPU only: some types have no such attributes."""
    from transformers import CONFIG_MAPPING

    from loraflow.config import Runtime
    from loraflow.training.attention import choose

    for name in ("mamba", "mamba2", "rwkv", "gemma4_text", "llama", "gemma3_text"):
        config = CONFIG_MAPPING[name]()
        assert choose(Runtime(attn_implementation="sdpa"), "cpu", "float32", config).implementation == "sdpa"
