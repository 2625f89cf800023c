"""The Triton kernel of the loss, against torch's cross entropy in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from loraflow.training.loss_head import CHUNK, head_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [7, 4096, 32064, 128256, 151936])
def test_loss_and_slope_are_those_of_cross_entropy(dtype, vocabulary):
    from loraflow.training.triton_kernels import nll_and_slope_in_place

    torch.manual_seed(vocabulary)
    logits = (torch.randn(50, vocabulary, device="cuda") * 4).to(dtype)
    logits[0] = 0
    logits[1, 0] = 60  # one token has all of the probability
    targets = torch.randint(0, vocabulary, (50,), device="cuda")
    weights = torch.rand(50, device="cuda") * 2
    for factors in (None, weights):
        exact = logits.double().requires_grad_()
        expected = cross_entropy(exact, targets, reduction="none") * (1 if factors is None else factors.double())
        expected.sum().backward()
        losses, slope = nll_and_slope_in_place(logits.clone(), targets, factors)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        error = (slope.double() - exact.grad).norm() / exact.grad.norm()
        assert error < TOLERANCE[dtype], error


def test_forbidden_tokens_have_no_slope_and_a_forbidden_target_an_infinite_loss():
    from loraflow.training.triton_kernels import nll_and_slope_in_place

    logits = torch.randn(3, 5000, device="cuda")
    logits[:, 100:] = float("-inf")
    targets = torch.tensor([3, 7, 4000], device="cuda")
    losses, slope = nll_and_slope_in_place(logits[:2].clone(), targets[:2], None)
    torch.testing.assert_close(losses, cross_entropy(logits[:2], targets[:2], reduction="none"))
    assert torch.isfinite(slope).all() and not slope[:, 100:].any()
    assert nll_and_slope_in_place(logits[2:].clone(), targets[2:], None)[0] == float("inf")


def test_a_logit_that_is_no_number_makes_the_loss_no_number():
    from loraflow.training.triton_kernels import nll_and_slope_in_place

    logits = torch.zeros(2, 9000, device="cuda")
    logits[1, 8999] = float("nan")
    losses, _ = nll_and_slope_in_place(logits, torch.tensor([0, 1], device="cuda"), None)
    assert torch.isnan(losses).tolist() == [False, True]


@pytest.mark.parametrize("n", [1, CHUNK, 2 * CHUNK + 3])
def test_the_head_on_a_gpu_has_the_gradient_of_cross_entropy(n):
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 32064, bias=False, device="cuda").requires_grad_(False)
    hidden = torch.randn(n, 64, device="cuda")
    targets = torch.randint(0, 32064, (n,), device="cuda")
    kernel, plain = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    (head_loss(head, kernel, targets, 0.5) / 3).backward()
    (cross_entropy(head(plain) * 0.5, targets, reduction="sum") / 3).backward()
    torch.testing.assert_close(kernel.grad, plain.grad, rtol=1e-4, atol=1e-5)
