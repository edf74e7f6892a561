"""What the check at the start cannot see: other layouts, other branches, other samples, in later steps."""

import random
from collections import Counter

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from adadagrad import gradients
from checks.kinds import CLASSES
from checks.test_kinds import batch, exact


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(self.a(self.norm(x)).tanh())


class SequenceFirst(nn.Module):
    """(T, N, E) between projection and head; `depth` of the blocks take part."""

    def __init__(self, depth: int = 2):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks, self.head = nn.Linear(4, 8), nn.ModuleList(Block() for _ in range(2)), nn.Linear(8, 3)
        self.depth = depth

    def forward(self, x):
        x = self.first(x).transpose(0, 1)
        for block in self.blocks[: self.depth]:
            x = block(x)
        return self.head(x.mean(0))


def step(estimator, model, inputs, targets, loss=cross_entropy):
    """A whole training step; the estimator may or may not look at its pass."""
    model.zero_grad()
    with estimator.observe(inputs, targets, 1 / len(targets)):
        loss(model(inputs), targets).backward()
    return estimator.moments()


def step_in_pieces(estimator, model, inputs, targets, pieces: tuple[int, ...]):
    """The same by micro-batches of so many samples."""
    model.zero_grad()
    for x, y in zip(inputs.split(pieces), targets.split(pieces)):
        with estimator.observe(x, y, 1 / len(targets), whole=len(pieces) == 1):
            (cross_entropy(model(x), y, reduction="sum") / len(targets)).backward()
    return estimator.moments()


def sequences(n: int, positions: int):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, positions, 4, generator=generator).double(), torch.arange(n) % CLASSES


LAYOUTS = [(8, 16), (8, 8), (4, 16)]
"""Samples and positions: what stands along the first dimension fits the number of samples."""


@pytest.mark.parametrize("n, positions", LAYOUTS)
@pytest.mark.parametrize("test_gradients", ["auto", "ghost"])
@pytest.mark.parametrize("in_training_pass", [False, True])
def test_positions_are_not_taken_for_samples(n, positions, test_gradients, in_training_pass):
    model, (inputs, targets) = SequenceFirst().double(), sequences(n, positions)
    probe = sequences(7, positions)
    estimator, _ = gradients.build(
        test_gradients, model, cross_entropy, True, 256, probe, in_training_pass=in_training_pass
    )
    assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))


@pytest.mark.parametrize("n, positions", LAYOUTS)
@pytest.mark.parametrize("in_training_pass", [False, True])
def test_layers_that_take_part_later(n, positions, in_training_pass):
    """Left out in the check, they are no one's rows yet."""
    model, (inputs, targets) = SequenceFirst(depth=0).double(), sequences(n, positions)
    probe = sequences(7, positions)
    arguments = ("auto", model, cross_entropy, True, 256, probe)
    estimator, _ = gradients.build(*arguments, in_training_pass=in_training_pass, recheck=False)
    for model.depth in (0, 2, 1):
        assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))


def test_layers_that_are_unfrozen_later():
    model, (inputs, targets) = SequenceFirst().double(), sequences(8, 16)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    probe = sequences(7, 16)
    arguments = ("auto", model, cross_entropy, True, 256, probe)
    estimator, _ = gradients.build(*arguments, in_training_pass=True, recheck=False)
    model.requires_grad_(True)
    assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))


def test_expansions_of_layers_that_come_and_go():
    """The one over the batch is told from the one over positions, whatever else was expanded before."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.shift, self.layer = (nn.Parameter(torch.randn(1, 4)) for _ in range(3))
            self.head, self.drop = nn.Linear(4, CLASSES), True

        def forward(self, x):
            if not self.drop:
                x = x * self.layer.expand(x.shape[1], -1).mean(0)
            x = x + self.shift.expand(x.shape[1], -1).cumsum(0)
            return self.head((x.sum(1) + self.token.expand(len(x), -1)).tanh())

    torch.manual_seed(0)
    model, (inputs, targets) = Tokens().double(), sequences(5, 5)
    probe = sequences(7, 4)
    estimator, _ = gradients.build("ghost", model, cross_entropy, True, 256, probe, in_training_pass=True)
    for model.drop in (True, False):
        assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))


def rare():
    targets = torch.zeros(40, dtype=torch.int64)
    targets[[9, 30]] = 1
    return nn.CrossEntropyLoss(weight=torch.tensor([1.0, 19.0]).double()), torch.randn(40, 6).double(), targets


def padded():
    targets = torch.randint(0, 2, (40, 4))
    targets[10:, 2:] = -100
    return padded_tokens_of_two, torch.randn(40, 4, 6).double(), targets


def padded_tokens_of_two(outputs, targets):
    return cross_entropy(outputs.flatten(0, 1), targets.flatten())


def unlabelled():
    targets = torch.arange(40) % 2
    targets[20:30] = -100
    return cross_entropy, torch.randn(40, 6).double(), targets


@pytest.mark.parametrize("case", [rare, padded, unlabelled])
@pytest.mark.parametrize("test_gradients", ["auto", "vmap", "loop"])
def test_a_loss_that_is_no_mean_is_refused_when_its_samples_come(case, test_gradients):
    loss, inputs, targets = case()
    model = nn.Linear(6, 2).double()
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        gradients.moments(model, loss, inputs, targets, test_gradients=test_gradients, max_micro_batch_size=64)


def test_a_loss_is_held_against_its_samples_in_the_training_pass():
    loss, inputs, targets = rare()
    model = nn.Linear(6, 2).double()
    estimator, _ = gradients.build("auto", model, loss, True, 64, (inputs[:7], targets[:7]), in_training_pass=True)
    step(estimator, model, inputs[:8], targets[:8], loss)
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        step(estimator, model, inputs, targets, loss)
    step(estimator, model, inputs[:8], targets[:8], loss)  # and nothing of it stays


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [1.0, float("inf"), float("nan")])
def test_losses_that_are_means_are_not_refused(reduction, scale):
    """In single precision, among them a run that diverges."""
    torch.manual_seed(0)
    model, inputs, targets = nn.Linear(6, CLASSES), 100 * torch.randn(500, 6), torch.arange(500) % CLASSES

    def loss(outputs, targets):
        return cross_entropy(outputs, targets, reduction=reduction)

    for kind in ("auto", "vmap", "loop"):
        estimator, _ = gradients.build(kind, model, loss, True, 64, (inputs[:7], targets[:7]), in_training_pass=True)
        step(estimator, model, scale * inputs, targets, loss)


class Keeps(nn.Module):
    """Counts, draws from generators of its own, notes what passes: in attributes, which no state dict has."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.seen, self.names = nn.Linear(6, CLASSES), 0, [], Counter()
        self.scale, self.own, self.python = torch.ones(()), torch.Generator(), random.Random(0)
        self.numpy, self.meter, self.in_place = numpy.random.default_rng(0), Meter(), True

    def forward(self, x):
        self.calls += 1
        self.names["passes"] += 1
        self.seen.append(x.shape)
        self.meter.update(len(x))
        if self.in_place:
            self.scale.mul_(1.5)
        torch.rand(1, generator=self.own), self.python.random(), self.numpy.random()
        return self.layer(x)

    def everything(self):
        of_generators = (self.own.get_state().tolist(), self.python.getstate(), str(self.numpy.bit_generator.state))
        return self.calls, list(self.seen), dict(self.names), float(self.scale), self.meter.total, *of_generators


class Meter:
    def __init__(self):
        self.total = 0

    def update(self, n):
        self.total += n


@pytest.mark.parametrize("test_gradients", ["auto", "vmap", "loop"])
def test_own_passes_leave_nothing_behind(test_gradients):
    model, (inputs, targets) = Keeps().double(), batch()
    model.layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    model.layer.register_full_backward_hook(lambda module, inputs, outputs: kept.append(outputs))
    model.layer.weight.register_hook(lambda gradient: kept.append(gradient.shape))
    before, held = model.everything(), (model.seen, model.scale, model.names)
    kept.clear()
    if test_gradients == "vmap":  # which has neither
        model.layer._backward_hooks.clear()
        model.in_place = False
    gradients.moments(model, cross_entropy, inputs, targets, test_gradients=test_gradients)
    assert model.everything() == before and not kept
    assert all(now is then for now, then in zip((model.seen, model.scale, model.names), held))
    with gradients.preserving_attributes(model):
        model(inputs)
        assert model.everything() != before and kept
    assert model.everything() == before and not kept


kept: list = []


def transposed_later(model, inputs):
    """A layer that is used in another way from some step on, in a way that the shapes do not tell."""
    return inputs.transpose(0, 1) if model.transposed else inputs


class ChangesLayout(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head, self.transposed = nn.Linear(4, 8), nn.Linear(8, CLASSES), False
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        x = self.layer(transposed_later(self, x)).tanh()
        return self.head(self.drop(transposed_later(self, x)).mean(1))


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("in_training_pass", [False, True])
def test_later_steps_are_looked_at_again(drop, in_training_pass):
    """N = T: nothing but single samples can tell."""
    model, (inputs, targets), lines = ChangesLayout().double(), sequences(6, 6), []
    model.drop.p = drop
    arguments = ("auto", model, cross_entropy, True, 8, sequences(7, 6))
    estimator, _ = gradients.build(*arguments, in_training_pass=in_training_pass, notify=lines.append)
    assert isinstance(estimator, gradients.GhostNorms)
    model.transposed = True
    model.drop.p = 0.0
    assert not exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))
    model.drop.p = drop
    assert not lines
    second = step(estimator, model, inputs, targets)
    assert second.variance != second.variance and len(lines) == 1 and "single samples" in lines[0]
    model.drop.p = 0.0
    for _ in range(2):
        assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))
    assert len(lines) == 1


def test_what_is_right_is_looked_at_and_kept():
    model, (inputs, targets), lines = SequenceFirst(depth=0).double(), sequences(8, 16), []
    for kind in ("ghost", "vmap"):
        estimator, _ = gradients.build(
            kind, model, cross_entropy, True, 8, (inputs[:7], targets[:7]), notify=lines.append
        )
        looks = []
        look, estimator._norms_again = estimator._norms_again, lambda *a: looks.append(estimator.measured) or look(*a)  # noqa: B023
        for _ in range(21):
            assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))
        assert looks == [1, 19] and not lines
        estimator.recheck = False
        estimator.forget()
        for _ in range(3):
            step(estimator, model, inputs, targets)
        assert looks == [1, 19]


@pytest.mark.parametrize("kind", ["ghost", "vmap"])
def test_looked_at_again_in_several_passes(kind):
    """A model that draws, more samples than in a pass of the test's own; parameters without a rule: all passes draw the
    same."""

    class OwnProduct(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.weight, self.c = nn.Linear(6, 5), nn.Parameter(torch.randn(5, 4)), nn.Linear(4, CLASSES)

        def forward(self, x):
            x = F.dropout(self.a(x).tanh(), 0.4)
            x = torch.einsum("na,ab->nb", x, self.weight.cumsum(0))  # ghost has no rule for it
            return self.c(F.dropout(x.tanh(), 0.4))

    model, lines = OwnProduct().double(), []
    inputs, targets = torch.randn(20, 6).double(), torch.arange(20) % CLASSES
    arguments = (kind, model, cross_entropy, True, 7, (inputs[:7], targets[:7]))
    for in_training_pass in (False, True):
        estimator, _ = gradients.build(*arguments, in_training_pass=in_training_pass, notify=lines.append)
        for _ in range(3):
            assert step(estimator, model, inputs, targets).variance > 0
    assert not lines


def test_vmap_gives_way_to_single_samples():
    model, (inputs, targets), lines = nn.Sequential(nn.Linear(6, CLASSES)).double(), batch(), []
    estimator, _ = gradients.build("vmap", model, cross_entropy, True, 8, (inputs, targets), notify=lines.append)
    step(estimator, model, inputs, targets)
    own = estimator._pass
    estimator._pass = lambda *a: (
        ({k: 1.1 * g for k, g in own(*a)[0].items()}, *own(*a)[1:]) if not estimator.loop else own(*a)
    )
    assert step(estimator, model, inputs, targets).variance != 0 and len(lines) == 1
    assert exact(model, cross_entropy, inputs, targets, step(estimator, model, inputs, targets))
