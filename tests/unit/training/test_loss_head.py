"""The loss head, which computes logits in chunks, against torch's cross entropy."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from loraflow.training import loss_head
from loraflow.training.loss_head import CHUNK, head_loss


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("n", [1, 7, CHUNK, 2 * CHUNK + 3])
def test_head_loss_equals_torchs_cross_entropy(n, trained):
    head = torch.nn.Linear(12, 50, bias=False).requires_grad_(trained)
    hidden, targets = torch.randn(n, 12), torch.randint(0, 50, (n,))
    one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    wanted = cross_entropy(head(one), targets, reduction="sum")
    (wanted / 3).backward()
    expected = head.weight.grad.clone() if trained else None
    head.zero_grad()
    got = head_loss(head, two, targets)
    (got / 3).backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(two.grad, one.grad)
    if trained:
        torch.testing.assert_close(head.weight.grad, expected)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden, targets), wanted)


@pytest.mark.parametrize("trained", [False, True])
def test_a_factor_of_the_logits_is_in_loss_and_gradient(trained):
    head = torch.nn.Linear(12, 50, bias=False).requires_grad_(trained)
    hidden, targets = torch.randn(CHUNK + 3, 12), torch.randint(0, 50, (CHUNK + 3,))
    one, two = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    expected = cross_entropy(head(one) * 0.25, targets, reduction="sum")
    expected.backward()
    found = head_loss(head, two, targets, 0.25)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(two.grad, one.grad)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(head, hidden, targets, 0.25), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel runs here")
def test_a_kernel_that_does_not_run_is_replaced_by_torchs_operations_with_a_warning(caplog):
    loss_head.gpu_kernel.cache_clear()
    assert loss_head.gpu_kernel() is None and loss_head.gpu_kernel() is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    loss_head.gpu_kernel.cache_clear()
