"""What models take and keep beside one batch of numbers: masks, draws, dtypes, complex weights, padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import cross_entropy

from adadagrad import gradients
from checks import oracle
from checks.kinds import CLASSES, STATISTICS, relative
from checks.test_kinds import batch, exact
from checks.test_later_steps import step, step_in_pieces


def test_masks_and_positions_among_the_inputs():
    """As transformers have them: no parameter's gradient is beyond ghost for that."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.words, self.places, self.kinds = (nn.Embedding(k, 8) for k in (20, 9, 2))
            self.bias, self.qkv, self.out = nn.Embedding(4, 2), nn.Parameter(torch.randn(8, 24)), nn.Linear(8, 8)
            self.offset, self.head = nn.Parameter(torch.randn(24)), nn.Linear(8, CLASSES)
            self.register_buffer("numbers", torch.arange(9)[None])
            self.register_buffer("kind", torch.zeros(1, 9, dtype=torch.int64))

        def forward(self, inputs):
            ids, mask = inputs["ids"], inputs["mask"]
            n, T = ids.shape
            places = inputs["places"] if "places" in inputs else self.numbers[:, :T].expand(n, T)
            x = self.words(ids) + self.places(places) + self.kinds(self.kind[:, :T].expand(n, T))
            x = x + self.kinds(torch.zeros(n, T, dtype=torch.int64))
            q, k, v = (
                part.view(n, T, 2, 4).transpose(1, 2)
                for part in torch.addmm(self.offset, x.view(-1, 8), self.qkv).view(n, T, 24).split(8, 2)
            )
            relative_places = (torch.arange(T)[:, None] - torch.arange(T)).abs().clamp(max=3)
            bias = self.bias(relative_places).permute(2, 0, 1).unsqueeze(0)
            rows, columns = torch.arange(n)[:, None, None, None], torch.arange(T)[None, None, None, :]
            seen = mask[rows, columns].bool()
            x = x + self.out(
                F.scaled_dot_product_attention(q, k, v, torch.where(seen, bias, -1e9)).transpose(1, 2).flatten(2)
            )
            x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
            return self.head(x[torch.arange(n), mask.sum(1) - 1])

    generator, n, T = torch.Generator().manual_seed(0), 10, 6
    lengths = torch.tensor([6, 6, 3, 6, 5, 6, 6, 1, 2, 4])
    inputs = {
        "ids": torch.randint(20, (n, T), generator=generator),
        "mask": (torch.arange(T) < lengths[:, None]).long(),
    }
    places = torch.randint(9, (n, T), generator=generator)
    targets = torch.arange(n) % CLASSES
    for given in (inputs, inputs | {"places": places}):
        model = Masked().double()
        probe = ({name: own[:7] for name, own in given.items()}, targets[:7])
        for in_training_pass in (False, True):
            estimator, told = gradients.build(
                "auto", model, cross_entropy, True, 256, probe, in_training_pass=in_training_pass
            )
            assert isinstance(estimator, gradients.GhostNorms) and not told
            model.zero_grad()
            with estimator.observe(given, targets, 1 / n):
                cross_entropy(model(given), targets).backward()
            assert exact(model, cross_entropy, given, targets, estimator.moments())


def draw(function):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            x = self.a(x).tanh()
            if not function() < 0:
                x = x + self.b(x).tanh()
            return self.c(x)

    return Draws().double()


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.rand([]),
        lambda: torch.rand(1),
        lambda: torch.empty(()).uniform_(),
        lambda: torch.tensor(0.5).bernoulli(),
        lambda: torch.randn(()).abs(),
        lambda: torch.randint(2, ()),
        lambda: torch.randperm(3)[0],
    ],
)
def test_draws_of_single_numbers(function):
    model, (inputs, targets) = draw(function), batch()
    for kind in ("auto", "loop"):
        moments = gradients.moments(model, cross_entropy, inputs, targets, test_gradients=kind)
        assert exact(model, cross_entropy, inputs, targets, moments)


def test_a_layer_that_is_sometimes_left_out_is_compared():
    """With LayerDrop the check leaves none out: later, all are `ghost`'s."""
    model, (inputs, targets) = draw(lambda: torch.rand([]) - 0.9), batch()
    probe = (inputs, targets)
    estimator, told = gradients.build("auto", model, cross_entropy, True, 8, probe, in_training_pass=True)
    assert isinstance(estimator, gradients.GhostNorms) and not told
    for seed in range(12):
        torch.manual_seed(seed)
        moments = step(estimator, model, inputs, targets)
        used = model.b.weight.grad is not None
        fixed = draw(lambda: 1.0 if used else -1.0)  # noqa: B023
        assert exact(fixed, cross_entropy, inputs, targets, moments) and not estimator.own_norms_sq


@pytest.mark.parametrize("low, high", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("pieces", [(7,), (4, 3)])
def test_several_dtypes_in_one_model(low, high, pieces):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8).to(low), nn.Linear(8, CLASSES).to(high)

        def forward(self, x):
            return self.b(self.a(x.to(low)).tanh().to(high))

    model, (inputs, targets) = Mixed(), batch()
    exactly = Mixed().double()
    exactly.forward = lambda x: exactly.b(exactly.a(x).tanh())
    expected = oracle.statistics(oracle.gradient_vectors(exactly, cross_entropy, inputs, targets))
    for kind in ("auto", "vmap", "loop"):
        for in_training_pass in (False, True):
            arguments = (kind, model, cross_entropy, True, pieces[0], (inputs, targets))
            estimator, _ = gradients.build(*arguments, in_training_pass=in_training_pass)
            moments = step_in_pieces(estimator, model, inputs, targets, pieces)
            for name in STATISTICS:
                assert relative(getattr(moments, name), expected[name]) < 1e-4, name


def test_complex_weights_beside_real_ones():
    class Fourier(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.w, self.head = nn.Parameter(torch.randn(4, 4, dtype=torch.cdouble)), nn.Linear(6, CLASSES).double()

        def forward(self, x):
            return self.head(torch.fft.irfft(torch.fft.rfft(x) @ self.w, n=6).tanh())

    model, (inputs, targets) = Fourier(), batch()
    for kind in ("auto", "ghost", "vmap", "loop"):
        moments = gradients.moments(model, cross_entropy, inputs, targets, test_gradients=kind, max_micro_batch_size=4)
        assert exact(model, cross_entropy, inputs, targets, moments)


def test_single_numbers_among_the_inputs():
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(6, CLASSES), nn.Parameter(torch.ones(6))

        def forward(self, inputs):
            share, x, z = inputs["share"], inputs["x"], inputs["z"]
            return self.layer(share * x + (1 - share) * z * (share * self.scale))

    model, (inputs, targets) = Mixes().double(), batch()
    tree = {"share": torch.tensor(0.3).double(), "x": inputs, "z": inputs.roll(1, 0)}
    alone = nn.Module()
    alone.layer, alone.scale = model.layer, model.scale
    alone.forward = lambda pair: model({"share": tree["share"], "x": pair[:, :6], "z": pair[:, 6:]})
    expected = oracle.statistics(
        oracle.gradient_vectors(alone, cross_entropy, torch.cat([tree["x"], tree["z"]], 1), targets)
    )
    for kind in ("auto", "ghost", "vmap", "loop"):
        moments = gradients.moments(model, cross_entropy, tree, targets, test_gradients=kind)
        assert all(relative(getattr(moments, name), expected[name]) < 1e-9 for name in STATISTICS)


@pytest.mark.parametrize("padding", [-1, 2, None])
@pytest.mark.parametrize("plain", [False, True])
def test_the_last_row_as_padding(padding, plain):
    """−1 is the last row for F.embedding, and none for torch.embedding."""

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Parameter(torch.randn(9, 4)), nn.Linear(4, CLASSES)

        def forward(self, x):
            if plain:
                rows = torch.embedding(self.table, x, *(() if padding is None else (padding,)))
            else:
                rows = F.embedding(x, self.table, padding)
            return self.head(rows.tanh().mean(1))

    model, targets = Table().double(), torch.arange(7) % CLASSES
    inputs = torch.randint(9, (7, 5), generator=torch.Generator().manual_seed(0))
    moments = gradients.moments(model, cross_entropy, inputs, targets, test_gradients="ghost")
    assert exact(model, cross_entropy, inputs, targets, moments)
