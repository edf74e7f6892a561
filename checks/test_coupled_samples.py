"""`BatchScaler` where one sample's outputs depend on the others of its batch: variance between micro-batches."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from adadagrad import AugmentedInnerProductTest, BatchScaler, Controller, NormTest, steady
from adadagrad.gradients import GhostNorms, MicroBatchGradients

B = 48


class Centred(torch.nn.Module):
    """Couples samples without a layer that is known for it."""

    def forward(self, x):
        return x - x.mean(0)


def network(coupling: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 12), coupling, torch.nn.ReLU(), torch.nn.Linear(12, 3)).double()


def batch(size: int = B) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(size, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 1).long()


def scaler_of(model: torch.nn.Module, **arguments) -> BatchScaler:
    return BatchScaler(model, cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1), **arguments)


def observed(scaler: BatchScaler, micro_batches: int = 1) -> None:
    """One step's forward and backward passes, and the statistics."""
    for x, y in zip(*(part.chunk(micro_batches) for part in batch(scaler.batch_size))):
        with scaler.observe(x, y):
            scaler.scale(cross_entropy(scaler.module(x), y)).backward()
    scaler.measure()


def flat_gradient(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the mean loss of these samples, by a copy of the model."""
    own = copy.deepcopy(model)
    cross_entropy(own(x), y).backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in own.parameters()])


def by_pieces(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, size: int) -> torch.Tensor:
    """Their gradients, (K, parameters)."""
    return torch.stack([flat_gradient(model, *piece) for piece in zip(x.split(size), y.split(size))])


@pytest.mark.parametrize("coupling", [torch.nn.BatchNorm1d(12), Centred()])
def test_a_batch_in_one_piece_is_cut(coupling):
    """By default, and nothing of it stays in the model: buffers, gradients and random states are the step's own."""
    model = network(coupling)
    x, y = batch()
    gradients, plain = by_pieces(model, x, y, B // 8), copy.deepcopy(model)
    cross_entropy(plain(x), y).backward()
    scaler, state = scaler_of(model, batch_size=B), torch.get_rng_state()
    with pytest.warns(UserWarning, match="couples the samples"):
        observed(scaler)
    assert isinstance(scaler.estimator, MicroBatchGradients)
    assert (scaler.moments.batch_size, scaler.moments.num_groups) == (B, 8)
    assert scaler.moments.sum_norm_sq == pytest.approx((B / 8 * gradients.square().sum()).item(), rel=1e-9)
    assert scaler.moments.grad_norm_sq == pytest.approx(gradients.mean(0).square().sum().item(), rel=1e-9)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, own in zip([*model.parameters(), *model.buffers()], [*plain.parameters(), *plain.buffers()]):
        assert torch.equal(ours, own)
    assert all(torch.equal(ours.grad, own.grad) for ours, own in zip(model.parameters(), plain.parameters()))


def test_micro_batches_are_compared_as_they_are():
    model = network(torch.nn.BatchNorm1d(12))
    gradients = by_pieces(model, *batch(), 12)
    scaler = scaler_of(model, batch_size=B)
    with pytest.warns(UserWarning, match="couples the samples"):
        observed(scaler, micro_batches=4)
    assert scaler.moments.num_groups == 4
    assert scaler.moments.sum_norm_sq == pytest.approx((12 * gradients.square().sum()).item(), rel=1e-9)


def test_inner_products_of_pieces():
    model, test = network(torch.nn.BatchNorm1d(12)), AugmentedInnerProductTest(0.5, 1.0)
    gradients = by_pieces(model, *batch(), B // 8)
    products = gradients @ gradients.mean(0)
    controller = Controller(B, test, unbiased=True)
    scaler = scaler_of(model, controller=controller, max_micro_batch_size=16)
    with pytest.warns(UserWarning, match="couples the samples"):
        observed(scaler)
    assert scaler.moments.sum_inner == pytest.approx((B / 8 * products.sum()).item(), rel=1e-9)
    assert scaler.moments.sum_inner_sq == pytest.approx((B / 8 * products.square().sum()).item(), rel=1e-9)


class Sometimes(torch.nn.Sequential):
    """Its last layer takes part in some pieces of a batch only."""

    def forward(self, x):
        *first, last = self
        outputs = torch.nn.Sequential(*first)(x)
        return outputs + last(outputs) if x.sum() < 0 else outputs


def test_a_layer_that_some_pieces_do_not_use():
    model = network(torch.nn.BatchNorm1d(12))
    model = Sometimes(*model, torch.nn.Linear(3, 3).double())
    x, y = batch()
    sums = [float(piece.sum()) for piece in x.split(B // 8)]
    assert min(sums) < 0 < sums[-1]  # not in the last
    gradients = by_pieces(model, x, y, B // 8)
    scaler = scaler_of(model, batch_size=B)
    with pytest.warns(UserWarning, match="couples the samples"):
        observed(scaler)
    assert scaler.moments.grad_norm_sq == pytest.approx(gradients.mean(0).square().sum().item(), rel=1e-9)
    assert scaler.moments.sum_norm_sq == pytest.approx((B / 8 * gradients.square().sum()).item(), rel=1e-9)


def test_pieces_are_as_large_as_a_pass_may_be():
    scaler = scaler_of(network(torch.nn.BatchNorm1d(12)), batch_size=B, max_micro_batch_size=4)
    with pytest.warns(UserWarning, match="couples the samples"):
        observed(scaler)
    assert scaler.moments.num_groups == 12


def test_the_published_rule_keeps_its_own_statistics():
    """As the paper's code has them: every sample normalised by itself."""
    scaler = scaler_of(network(torch.nn.BatchNorm1d(12)), batch_size=B, test=NormTest(0.5))
    with pytest.warns(UserWarning, match="micro_batch is the accurate choice"):
        observed(scaler)
    assert isinstance(scaler.estimator, GhostNorms) and scaler.moments.num_groups == B


def test_a_batch_that_is_too_small_to_be_cut():
    scaler = scaler_of(network(torch.nn.BatchNorm1d(12)), controller=steady(3, None, False, None))
    with pytest.warns(UserWarning, match="cut it into two or more"):
        observed(scaler)
