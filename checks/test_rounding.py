"""What the rounding of tensor cores does to the check at the start and to the statistics."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from adadagrad import gradients
from benchmarks.cases import SmallResNet, small_resnet_batch_norm
from checks import oracle
from checks.rounding import Rounding, rounded
from checks.test_gradients import assert_matches


def test_numbers_are_rounded_as_by_hardware():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(rounded(x, "bf16"), x.bfloat16().float()) and torch.equal(rounded(x, "fp16"), x.half().float())
    one, step = 1.0, 2.0**-10
    ties = torch.tensor([one + step / 2, one + 3 * step / 2, one + step, one + step / 2 + 1e-6, -one - 3 * step / 2])
    assert rounded(ties, "tf32").tolist() == [one, one + 2 * step, one + step, one + step, -one - 2 * step]


def test_products_are_rounded_forwards_and_backwards():
    torch.manual_seed(0)
    x, layer = torch.randn(5, 7), torch.nn.Linear(7, 3, bias=False)
    with Rounding("bf16"):
        y = layer(x)
        y.backward(torch.ones_like(y) / 3)
    assert torch.allclose(y, x.bfloat16().float() @ layer.weight.bfloat16().float().T)
    expected = (torch.ones(5, 3) / 3).bfloat16().float().T @ x.bfloat16().float()
    assert torch.allclose(layer.weight.grad, expected) and not torch.equal(expected, (torch.ones(5, 3) / 3).T @ x)
    with Rounding("bf16"):
        assert torch.equal(x.double() @ x.double().T, torch.mm(x.double(), x.double().T))


def test_the_check_at_the_start_does_not_mistake_rounding_for_an_error():
    """TF32 puts single samples' gradients off by far more than the check allows; `auto` takes `ghost` all the same."""
    torch.manual_seed(0)
    model = small_resnet_batch_norm((3, 8, 8), 10)
    inputs, targets = torch.randn(7, 3, 8, 8), torch.arange(7) % 10
    exact = gradients.moments(model, cross_entropy, inputs[:2], targets[:2], test_gradients="loop").sum_norm_sq
    with Rounding("tf32"):
        off = gradients.moments(model, cross_entropy, inputs[:2], targets[:2], test_gradients="loop").sum_norm_sq
        estimator, told = gradients.build("auto", model, cross_entropy, True, 7, (inputs, targets))
    assert abs(off / exact - 1) > 1e-3
    assert type(estimator) is gradients.GhostNorms and [line for line in told if "BatchNorm" not in line] == []


@pytest.mark.parametrize("form", ["tf32", "fp16", "bf16"])
@pytest.mark.parametrize("test_gradients", ["ghost", "vmap"])
def test_statistics(form, test_gradients):
    """Half precision moves what is decided on by a few thousandths."""
    torch.manual_seed(0)
    model = SmallResNet(3, 10, lambda channels: nn.GroupNorm(4, channels))
    inputs, targets = torch.randn(24, 3, 16, 16), torch.arange(24) % 10
    with Rounding(form):
        found = gradients.moments(model, cross_entropy, inputs, targets, test_gradients=test_gradients)
    vectors = oracle.gradient_vectors(model.double(), cross_entropy, inputs.double(), targets)
    expected = oracle.statistics(vectors)
    assert_matches(found, expected, rel=5e-3)
