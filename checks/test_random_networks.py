"""Random small networks against the loop over samples, all five numbers.

RANDOM_NETWORKS=5000 python -m pytest checks/test_random_networks.py     # the long version; 200 networks by default
"""

import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from adadagrad import gradients
from adadagrad.gradients.samples import chunks
from checks import oracle
from checks.kinds import CLASSES, ToLogits

NETWORKS = int(os.environ.get("RANDOM_NETWORKS", 200))


class Step(nn.Module):
    """A function of (step, x) with these submodules and parameters."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.randn(part) / 2) if isinstance(part, tuple) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def sequence_first(m: Step, x: Tensor) -> Tensor:
    return m.layer(x.transpose(0, 1)).transpose(0, 1)


def with_token(m: Step, x: Tensor) -> Tensor:
    return torch.cat([m.token.expand(len(x), -1, -1), x], 1)


def filled(m: Step, x: Tensor) -> Tensor:
    y = torch.zeros(len(x), *m.layer(x).shape[1:], dtype=x.dtype)
    y[:, 0], y[:, 1:] = m.layer(x)[:, 0], m.layer(x)[:, 1:].tanh()
    return y


def routed(m: Step, x: Tensor) -> Tensor:
    rows = (x[:, 0, 0] > 0).nonzero()[:, 0]
    return x.index_add(0, rows, m.layer(x[rows]))


# Steps on (n, T, F): name → function of (T, F) that makes the step. Some change T or F.
TOKENS = {
    "linear": lambda T, W: nn.Linear(W, 4),
    "linear without bias": lambda T, W: nn.Linear(W, 3, bias=False),
    "residual": lambda T, W: Step(lambda m, x: x + m.layer(x).tanh(), layer=nn.Linear(W, W)),
    "used twice": lambda T, W: Step(lambda m, x: m.layer(m.layer(x).tanh()), layer=nn.Linear(W, W)),
    "used as it is and transposed": lambda T, W: Step(lambda m, x: F.linear(x, m.w).sin() @ m.w, w=(3, W)),
    "view, in place": lambda T, W: Step(lambda m, x: m.layer(x).view(len(x), -1).relu_().view(len(x), T, W),
                                        layer=nn.Linear(W, W)),
    "relu in place": lambda T, W: Step(lambda m, x: (x * 1.0).relu_()),
    "layer, then in place": lambda T, W: nn.Sequential(nn.Linear(W, W), nn.LeakyReLU(0.1, inplace=True)),
    "layer norm": lambda T, W: nn.LayerNorm(W),
    "rms norm": lambda T, W: nn.RMSNorm(W),
    "group norm": lambda T, W: nn.GroupNorm(1, T),
    "instance norm, in place": lambda T, W: nn.Sequential(nn.InstanceNorm1d(T, affine=True), nn.ELU(inplace=True)),
    "frozen batch norm": lambda T, W: nn.BatchNorm1d(T).eval(),
    "batch norm": lambda T, W: nn.BatchNorm1d(T),
    "scale": lambda T, W: Step(lambda m, x: x * m.s, s=(W,)),
    "scale of positions": lambda T, W: Step(lambda m, x: m.s * x, s=(T, 1)),
    "scalar": lambda T, W: Step(lambda m, x: x * m.s + m.b, s=(), b=()),
    "positions": lambda T, W: Step(lambda m, x: x + m.p, p=(1, T, W)),
    "positions by index": lambda T, W: Step(lambda m, x: x + m.e(torch.arange(T)), e=nn.Embedding(T + 1, W)),
    "minus, divided": lambda T, W: Step(lambda m, x: (m.a - x) / (2 + m.b.square()), a=(W,), b=(T, W)),
    "added in place": lambda T, W: Step(lambda m, x: (x * 2).add_(m.a), a=(W,)),
    "token": lambda T, W: Step(with_token, token=(1, 1, W)),
    "over positions": lambda T, W: Step(lambda m, x: m.layer(x.transpose(1, 2)).transpose(1, 2), layer=nn.Linear(T, 3)),
    "sequence first": lambda T, W: Step(sequence_first, layer=nn.Linear(W, 3)),
    "convolution": lambda T, W: nn.Conv1d(T, 4, 2, padding=1),
    "convolution over positions": lambda T, W: Step(lambda m, x: m.layer(x.mT).mT, layer=nn.Conv1d(W, 3, 2, padding=1)),
    "grouped convolution": lambda T, W: nn.Conv1d(T, 2 * T, 1, groups=T),
    "attention": lambda T, W: Step(lambda m, x: m.part(x, x, x)[0], part=nn.MultiheadAttention(W, 1, batch_first=True)),
    "cross attention": lambda T, W: Step(lambda m, x: m.part(x.sin(), x, x, need_weights=False)[0],
                                         part=nn.MultiheadAttention(W, 1, batch_first=True)),
    "matmul": lambda T, W: Step(lambda m, x: x @ m.w, w=(W, 3)),
    "low rank": lambda T, W: Step(lambda m, x: F.linear(x, m.b @ m.a), a=(2, W), b=(3, 2)),
    "normalised weight": lambda T, W: Step(lambda m, x: F.linear(x, m.v / m.v.norm(dim=1, keepdim=True)), v=(3, W)),
    "weight norm": lambda T, W: parametrizations.weight_norm(nn.Linear(W, 3)),
    "spectral norm": lambda T, W: parametrizations.spectral_norm(nn.Linear(W, 3)),
    "prelu": lambda T, W: nn.PReLU(T),
    "power": lambda T, W: Step(lambda m, x: (x.abs() + 0.5) ** m.a, a=(W,)),
    "einsum": lambda T, W: Step(lambda m, x: torch.einsum("ntf,fg->ntg", x, m.w), w=(W, 3)),
    "where": lambda T, W: Step(lambda m, x: torch.where(x > 0, x, m.a), a=(W,)),
    "recurrent": lambda T, W: Step(lambda m, x: m.part(x)[0], part=nn.GRU(W, 3, batch_first=True)),
    "checkpointed": lambda T, W: Step(lambda m, x: checkpoint(m.layer, x, use_reentrant=False), layer=nn.Linear(W, 3)),
    "filled": lambda T, W: Step(filled, layer=nn.Linear(W, 3)),
    "routed": lambda T, W: Step(routed, layer=nn.Linear(W, W)),
    "parts": lambda T, W: Step(lambda m, x: torch.cat([m.a(x[:, :1]), m.b(x[:, 1:])], 1), a=nn.Linear(W, 3),
                               b=nn.Linear(W, 3)),
    "rolled": lambda T, W: Step(lambda m, x: x.roll(1, 1) * m.a.roll(1, 0), a=(W,)),
    "mean over positions": lambda T, W: Step(lambda m, x: x - m.layer(x.mean(1, keepdim=True)), layer=nn.Linear(W, W)),
    "frozen layer": lambda T, W: nn.Linear(W, W).requires_grad_(False),
    "sine": lambda T, W: Step(lambda m, x: x.sin()),
}  # fmt: skip
# Most networks are of steps that have rules.
COMMON = ["linear", "residual", "layer norm", "view, in place", "scale", "positions", "convolution", "used twice"]


class Sequences(nn.Module):
    """Blocks on (N, T, E) or (T, N, E), of which some are left out of the check and take part later."""

    def __init__(self, blocks: list[str], width: int, first: bool, taken: list[bool]):
        super().__init__()
        self.first, self.taken, self.later = first, taken, False
        self.blocks = nn.ModuleList(SEQUENCES[name](width) for name in blocks)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if self.first else x
        for block, taken in zip(self.blocks, self.taken):
            if taken or self.later:
                x = block(x)
        return self.head((x.mean(0) if self.first else x.mean(1)).sin())


def attention(first: bool):
    def make(W: int) -> Step:
        part = nn.MultiheadAttention(W, 1, batch_first=not first)
        return Step(lambda m, x: x + m.part(x, x, x, need_weights=False)[0], part=part)

    return make


# On sequences, whichever dimension is which: all give what they are given.
SEQUENCES = {
    "residual": lambda W: Step(lambda m, x: x + m.layer(x).tanh(), layer=nn.Linear(W, W)),
    "layer norm": lambda W: nn.LayerNorm(W),
    "scale": lambda W: Step(lambda m, x: x * m.s + m.b, s=(W,), b=(1, 1, W)),
    "flattened": lambda W: Step(lambda m, x: x + m.layer(x.flatten(0, 1)).view(x.shape), layer=nn.Linear(W, W)),
    "product": lambda W: Step(lambda m, x: x + torch.addmm(m.b, x.reshape(-1, W), m.w).view(x.shape), w=(W, W), b=(W,)),
    "expanded": lambda W: Step(lambda m, x: x + m.p.expand(len(x), 1, W), p=(1, 1, W)),
    "other dimension expanded": lambda W: Step(lambda m, x: x + m.p.expand(x.shape[1], W), p=(1, W)),
    "attention": attention(False),
    "attention, sequence first": attention(True),
    "transposed": lambda W: Step(sequence_first, layer=nn.Linear(W, W)),
}


class Network(nn.Sequential):
    def __init__(self, names: list[str], tokens: int, width: int):
        super().__init__()
        x = torch.zeros(2, tokens, width)
        for name in [*names, "linear"]:
            self.append(TOKENS[name](*x.shape[1:]))
            with torch.no_grad():
                x = self[-1](x)
        self.append(ToLogits())


def five(moments) -> dict[str, float]:
    names = ("variance", "variance_inner_product", "variance_orthogonality", "grad_norm_sq", "sum_inner")
    return {name: getattr(moments, name) for name in names}


@settings(max_examples=NETWORKS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from([*TOKENS, *3 * COMMON]), min_size=1, max_size=4),
    tokens=st.integers(2, 4),
    width=st.integers(2, 4),
    n=st.integers(2, 6),
    size=st.integers(1, 6),
    mean=st.booleans(),
    in_training_pass=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_random_networks(names, tokens, width, n, size, mean, in_training_pass, seed):
    torch.manual_seed(seed)
    model = Network(names, tokens, width).double()
    inputs, targets = torch.randn(n, tokens, width, dtype=torch.float64), torch.arange(n) % CLASSES

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(outputs, targets, reduction="mean" if mean else "sum")

    vectors = oracle.gradient_vectors(model, loss, inputs, targets)
    expected = oracle.statistics(vectors)
    expected["sum_inner"] = n * expected["grad_norm_sq"]
    arguments = ("auto", model, loss, True, size, (inputs, targets))
    estimator, _ = gradients.build(*arguments, in_training_pass=in_training_pass)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for x, y in chunks(size, inputs, targets):
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])
        with estimator.observe(x, y, 1 / n, whole=size >= n):
            if getattr(estimator, "in_training_pass", False):
                (cross_entropy(model(x), y, reduction="sum") / n).backward()
    found = five(estimator.moments())
    # Where gradients cancel or are parallel, what is left of the sums has their rounding.
    largest = float(vectors.square().sum(1).max())
    for name, value in expected.items():
        scale = largest**2 if name == "variance_inner_product" else largest
        assert abs(found[name] - value) <= 1e-9 * max(abs(value), 1e-4 * scale) + 1e-25, (name, found[name], value)


@settings(max_examples=NETWORKS // 3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    blocks=st.lists(st.tuples(st.sampled_from([*SEQUENCES]), st.booleans()), min_size=1, max_size=4),
    first=st.booleans(),
    tokens=st.sampled_from([2, 4, 6, 8]),
    n=st.sampled_from([2, 4, 6, 8]),
    in_training_pass=st.booleans(),
    name=st.sampled_from(["auto", "auto", "ghost"]),
    seed=st.integers(0, 10**6),
)
def test_random_sequence_models(blocks, first, tokens, n, in_training_pass, name, seed):
    """Sizes that are equal, multiples, or neither; a later step takes what the check has left out."""
    torch.manual_seed(seed)
    names, taken = zip(*blocks)
    # Attention over what are the samples couples them.
    names = [own for own in names if own != ("attention" if first else "attention, sequence first")]
    model = Sequences(names, 3, first, taken).double()
    probe = torch.randn(7, tokens, 3, dtype=torch.float64), torch.arange(7) % CLASSES
    inputs, targets = torch.randn(n, tokens, 3, dtype=torch.float64), torch.arange(n) % CLASSES
    try:
        estimator, _ = gradients.build(
            name, model, cross_entropy, True, n, probe, in_training_pass=in_training_pass, recheck=False
        )
    except ValueError:
        assert name == "ghost"
        return
    for model.later in (False, True):
        vectors = oracle.gradient_vectors(model, cross_entropy, inputs, targets)
        expected, largest = oracle.statistics(vectors), float(vectors.square().sum(1).max())
        model.zero_grad()
        with estimator.observe(inputs, targets, 1 / n):
            if getattr(estimator, "in_training_pass", False):
                cross_entropy(model(inputs), targets).backward()
        found = five(estimator.moments())
        for statistic, value in expected.items():
            scale = largest**2 if statistic == "variance_inner_product" else largest
            assert abs(found[statistic] - value) <= 1e-9 * max(abs(value), 1e-4 * scale) + 1e-25, statistic
