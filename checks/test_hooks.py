"""Hooks on parameters that change gradients: the statistics are of what the step has, or it is said."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from adadagrad import gradients
from checks import oracle
from checks.kinds import CLASSES, STATISTICS, relative
from checks.test_kinds import batch, exact
from checks.test_later_steps import step, step_in_pieces


def hooked(hook) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    model[0].weight.register_hook(hook)
    return model


MASK = (torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.3).double()
HOOKS = {
    "mask": lambda g: g * MASK,
    "factor": lambda g: 0.1 * g,
    "in place": lambda g: g.mul_(MASK),
    "by a loop": lambda g: torch.stack([row * (0 if float(MASK[i, 0]) else 2) for i, row in enumerate(g)]),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("test_gradients", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize("pieces", [(7,), (4, 3)])
def test_hooks_that_change_gradients(hook, test_gradients, pieces):
    model, (inputs, targets) = hooked(hook), batch()
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    arguments = (test_gradients, model, cross_entropy, True, pieces[0], (inputs, targets))
    for in_training_pass in (False, True):
        estimator, told = gradients.build(*arguments, in_training_pass=in_training_pass)
        assert isinstance(estimator, gradients.GhostNorms) == (test_gradients in ("auto", "ghost"))
        moments = step_in_pieces(estimator, model, inputs, targets, pieces)
        for name in STATISTICS:
            assert relative(getattr(moments, name), expected[name]) < 1e-9, name


def masked_late() -> nn.Module:
    """What has been accumulated is masked: of the hook nobody is told what it does."""

    def mask(parameter: nn.Parameter) -> None:
        parameter.grad.mul_(MASK)

    model = hooked(lambda g: g)
    model[0].weight.register_post_accumulate_grad_hook(mask)
    return model


@pytest.mark.parametrize("make", [lambda: hooked(lambda g: g.clamp(-0.01, 0.01)), masked_late], ids=["clamp", "late"])
def test_statistics_are_of_the_gradients_before_hooks_that_are_not_linear_or_late(make):
    model, (inputs, targets) = make(), batch()
    probe = (inputs, targets)
    estimator, told = gradients.build("auto", model, cross_entropy, True, 8, probe, in_training_pass=True)
    assert any("hooks change the gradients of 0.weight" in line for line in told)
    moments = step(estimator, model, inputs, targets)
    model[0].weight._backward_hooks.clear()
    (model[0].weight._post_accumulate_grad_hooks or {}).clear()
    assert exact(model, cross_entropy, inputs, targets, moments)


def test_micro_batches_are_refused_behind_late_hooks():
    probe = batch()
    with pytest.raises(ValueError, match=r"0.weight.*test_gradients=auto"):
        gradients.build("micro_batch", masked_late(), cross_entropy, False, 8, probe)
