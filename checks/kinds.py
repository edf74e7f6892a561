"""Kinds of modules and uses of parameters, which the suite tests and the table of docs/module_kinds.md lists.

python -m checks.kinds > docs/module_kinds.md
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from adadagrad import gradients
from checks import oracle

CLASSES, SAMPLES = 3, 6
STATISTICS = ("variance", "variance_inner_product", "variance_orthogonality", "grad_norm_sq")


@dataclass(frozen=True)
class Kind:
    """A module to try.

    Args:
        make: gives the module, after the seed was set; it is taken in double precision.
        inputs: of `SAMPLES` samples.
        adds_up: the loss is the sum of the samples', not their mean.
    """

    group: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    loss: Callable = cross_entropy
    adds_up: bool = False

    def build(self) -> tuple[nn.Module, Any, Tensor]:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, inputs = self.make(), self.inputs()
            with torch.no_grad():
                if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):
                    model(inputs.float())
        return _double(model), inputs, torch.arange(SAMPLES) % CLASSES


def _double(model: nn.Module) -> nn.Module:
    return model._apply(
        lambda t: t.double() if t.is_floating_point() else t.to(torch.complex128) if t.is_complex() else t
    )


def noise(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def numbers(*shape: int, below: int = 9) -> Tensor:
    return torch.randint(below, (SAMPLES, *shape), generator=torch.Generator().manual_seed(sum(shape)))


class ToLogits(nn.Module):
    """Bends what a layer gives and projects it to logits by a fixed matrix."""

    def forward(self, x):
        x = _first(x).flatten(1)
        fixed = torch.sin(1.7 * torch.arange(x.shape[1] * CLASSES, dtype=x.dtype)).view(-1, CLASSES)
        return torch.sin(x) @ fixed


def _first(output) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return torch.view_as_real(output) if output.is_complex() else output


class Calls(nn.Module):
    """A module around a function of (module, x), with these submodules and parameters."""

    def __init__(self, call: Callable, **parts):
        super().__init__()
        self.call = call
        for name, part in parts.items():
            value = nn.Parameter(torch.randn(part)) if isinstance(part, tuple) else part
            setattr(self, name, value)
        self.logits = ToLogits()

    def forward(self, x):
        return self.logits(self.call(self, x))


def layer(create: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(create(), ToLogits())


# Every class of torch.nn that has parameters: arguments and the shape of a sample, or the inputs themselves.
LAYERS: dict[str, tuple[tuple, dict, Any]] = {
    "Linear": ((6, 4), {}, (6,)),
    "Bilinear": ((6, 5, 4), {}, None),
    "LazyLinear": ((4,), {}, (6,)),
    "PReLU": ((4,), {}, (4, 3)),
    "Embedding": ((9, 4), {}, numbers(5)),
    "EmbeddingBag": ((9, 4), {}, numbers(5)),
    "LayerNorm": ((6,), {}, (4, 6)),
    "RMSNorm": ((6,), {}, (4, 6)),
    "GroupNorm": ((2, 4), {}, (4, 3, 5)),
    "MultiheadAttention": ((6, 2), {"batch_first": True}, None),
    "RNN": ((6, 4), {"batch_first": True}, (5, 6)),
    "LSTM": ((6, 4), {"batch_first": True}, (5, 6)),
    "GRU": ((6, 4), {"batch_first": True}, (5, 6)),
    "RNNCell": ((6, 4), {}, (6,)),
    "LSTMCell": ((6, 4), {}, (6,)),
    "GRUCell": ((6, 4), {}, (6,)),
    "TransformerEncoderLayer": ((6, 2, 8, 0.0), {"batch_first": True}, (5, 6)),
    "TransformerDecoderLayer": ((6, 2, 8, 0.0), {"batch_first": True}, None),
    "Transformer": ((6, 2, 1, 1, 8, 0.0), {"batch_first": True}, None),
    "AdaptiveLogSoftmaxWithLoss": ((6, 8, [2, 4]), {}, None),
}
MAPS = {1: (4, 8), 2: (4, 5, 4), 3: (4, 3, 4, 2)}
for _d, _shape in MAPS.items():
    LAYERS |= {
        f"Conv{_d}d": ((4, 6, 2), {"padding": 1}, _shape),
        f"LazyConv{_d}d": ((6, 2), {}, _shape),
        f"ConvTranspose{_d}d": ((4, 6, 2), {}, _shape),
        f"LazyConvTranspose{_d}d": ((6, 2), {}, _shape),
        f"BatchNorm{_d}d": ((4,), {}, _shape),
        f"LazyBatchNorm{_d}d": ((), {}, _shape),
        f"InstanceNorm{_d}d": ((4,), {"affine": True}, _shape),
        f"LazyInstanceNorm{_d}d": ((), {"affine": True}, _shape),
    }
LAYERS["SyncBatchNorm"] = ((4,), {}, MAPS[2])
if hasattr(nn, "LinearCrossEntropyLoss"):  # of torch 2.14
    LAYERS["LinearCrossEntropyLoss"] = ((6, 4), {}, None)
# These are pieces of others (or hold others), or are no layer.
NOT_BY_THEMSELVES = {"TransformerEncoder", "TransformerDecoder", "RNNBase", "RNNCellBase", "DataParallel"}
_CALLS = {
    "Bilinear": lambda m, x: m.part(x[:, 0], x[:, 1, :5]),
    "MultiheadAttention": lambda m, x: m.part(x, x, x, need_weights=False)[0],
    "TransformerDecoderLayer": lambda m, x: m.part(x, x.flip(1)),
    "Transformer": lambda m, x: m.part(x, x.flip(1)),
    "AdaptiveLogSoftmaxWithLoss": lambda m, x: m.part.log_prob(x[:, 0]),
    # The sum over positions for each sample: a loss inside a model
    "LinearCrossEntropyLoss": lambda m, x: torch.stack([m.part(one, torch.arange(len(one)) % 4) for one in x])[:, None],
}


def _layers() -> Iterator[Kind]:
    for name, (arguments, options, inputs) in LAYERS.items():
        create = partial(getattr(nn, name), *arguments, **options)
        given = (lambda x=inputs: x) if isinstance(inputs, Tensor) else partial(noise, *(inputs or (5, 6)))
        if name in _CALLS:
            yield Kind("torch.nn", name, lambda c=create, n=name: Calls(_CALLS[n], part=c()), given)
        else:
            yield Kind("torch.nn", name, layer(create), given)


def _frozen(create: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        norm = create()
        if norm.running_mean is not None:
            norm.running_mean.copy_(torch.linspace(-1, 1, 4))
            norm.running_var.copy_(torch.linspace(0.5, 2, 4))
        return nn.Sequential(norm.eval(), ToLogits())

    return make


def _normalisations() -> Iterator[Kind]:
    for d, shape in MAPS.items():
        batch, instance = getattr(nn, f"BatchNorm{d}d"), getattr(nn, f"InstanceNorm{d}d")
        yield Kind("normalisation", f"BatchNorm{d}d, eval mode", _frozen(partial(batch, 4)), partial(noise, *shape))
        yield Kind(
            "normalisation",
            f"BatchNorm{d}d without running statistics, eval mode",
            layer(lambda c=batch: c(4, track_running_stats=False).eval()),
            partial(noise, *shape),
        )
        tracked = partial(instance, 4, affine=True, track_running_stats=True)
        yield Kind("normalisation", f"InstanceNorm{d}d, tracked", layer(tracked), partial(noise, *shape))
        yield Kind("normalisation", f"InstanceNorm{d}d, tracked, eval mode", _frozen(tracked), partial(noise, *shape))
    local = lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.LocalResponseNorm(2), ToLogits())
    yield Kind("normalisation", "LocalResponseNorm after a convolution", local, partial(noise, 4, 3, 3))
    maps = partial(noise, 4, 3, 5)
    yield Kind("normalisation", "LayerNorm over two axes", layer(lambda: nn.LayerNorm((3, 5))), maps)
    yield Kind(
        "normalisation", "LayerNorm2d of ConvNeXt", layer(lambda: torchvision.models.convnext.LayerNorm2d(4)), maps
    )
    yield Kind("normalisation", "GroupNorm on vectors", layer(lambda: nn.GroupNorm(2, 4)), partial(noise, 4))


def _attention() -> Iterator[Kind]:
    def attention(call=lambda m, x: m.part(x, x, x)[0], **options):
        options = {"batch_first": True} | options
        return lambda: Calls(call, part=nn.MultiheadAttention(6, 2, **options))

    def first(m, x):
        x = x.transpose(0, 1)
        return m.part(x, x, x)[0].mean(0)

    mask = torch.ones(5, 5).triu(1).bool()
    late = torch.arange(5) > 3
    kinds = {
        "batch first": attention(),
        "weights not needed": attention(lambda m, x: m.part(x, x, x, need_weights=False)[0]),
        "sequence first": attention(first, batch_first=False),
        "cross attention": attention(lambda m, x: m.part(x, x.tanh(), x.tanh())[0]),
        "three different inputs": attention(lambda m, x: m.part(x, x.tanh(), x.sin())[0]),
        "causal mask": attention(lambda m, x: m.part(x, x, x, attn_mask=mask)[0]),
        "key padding": attention(lambda m, x: m.part(x, x, x, key_padding_mask=late.expand(len(x), 5))[0]),
        "different key and value sizes": attention(lambda m, x: m.part(x, x[..., :4], x[..., 1:6])[0], kdim=4, vdim=5),
        "bias_k and bias_v": attention(add_bias_kv=True),
        "zero attention": attention(add_zero_attn=True),
        "no bias": attention(bias=False),
    }
    for name, make in kinds.items():
        yield Kind("attention", name, make, partial(noise, 5, 6))

    def encoder(batch_first: bool, **options):
        def make():
            own = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=batch_first, **options)
            call = (lambda m, x: m.part(x)) if batch_first else (lambda m, x: m.part(x.transpose(0, 1)).mean(0))
            return Calls(call, part=nn.TransformerEncoder(own, 2, enable_nested_tensor=False))

        return make

    yield Kind("attention", "TransformerEncoder, batch first", encoder(True), partial(noise, 5, 6))
    yield Kind(
        "attention", "TransformerEncoder, batch first, norm first", encoder(True, norm_first=True), partial(noise, 5, 6)
    )
    yield Kind("attention", "TransformerEncoder, sequence first", encoder(False), partial(noise, 5, 6))

    def zero_head():
        model = encoder(False)()
        model.head = nn.Linear(6, CLASSES)
        nn.init.zeros_(model.head.weight)
        model.logits = model.head
        return model

    yield Kind("attention", "TransformerEncoder, sequence first, a head of zeros", zero_head, partial(noise, 9, 6))


def _recurrent() -> Iterator[Kind]:
    for name in ("RNN", "LSTM", "GRU"):
        kinds = {"two layers": {"num_layers": 2}, "both directions": {"bidirectional": True}, "sequence first": {}}
        for words, options in kinds.items():
            first = words == "sequence first"
            create = partial(getattr(nn, name), 6, 4, batch_first=not first, **options)
            call = (lambda m, x: m.part(x.transpose(0, 1))[0][-1]) if first else (lambda m, x: m.part(x)[0])
            yield Kind(
                "recurrent", f"{name}, {words}", lambda c=create, f=call: Calls(f, part=c()), partial(noise, 5, 6)
            )

    def unrolled(m, x):
        state = torch.zeros(len(x), 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            state = m.part(x[:, t], state)
        return state

    yield Kind("recurrent", "GRUCell, unrolled", lambda: Calls(unrolled, part=nn.GRUCell(6, 4)), partial(noise, 5, 6))


class Tied(nn.Module):
    """Token embedding and output layer share their matrix, as in GPT-2."""

    def __init__(self, mean: bool = True):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight, self.mean = self.embedding.weight, mean

    def forward(self, x):
        hidden = self.embedding(x).tanh()
        return self.head(hidden.mean(1)) if self.mean else self.head(hidden).sin().sum(1)


def _tied_linears():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6, bias=False), ToLogits())
    model[2].weight = model[0].weight
    return model


def _half_frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), ToLogits())
    model[0].weight.requires_grad_(False)
    return model


def _without_gradients(model: nn.Module, index: int) -> nn.Module:
    model[index].requires_grad_(False)
    return model


def _embeddings() -> Iterator[Kind]:
    kinds = {
        "Embedding, padding": lambda: nn.Embedding(9, 4, padding_idx=2),
        "Embedding, sparse": lambda: nn.Embedding(9, 4, sparse=True),
        "Embedding, max_norm": lambda: nn.Embedding(9, 4, max_norm=100.0),
        "EmbeddingBag, sum": lambda: nn.EmbeddingBag(9, 4, mode="sum"),
        "EmbeddingBag, max": lambda: nn.EmbeddingBag(9, 4, mode="max"),
        "EmbeddingBag, sparse": lambda: nn.EmbeddingBag(9, 4, sparse=True),
    }
    for name, create in kinds.items():
        yield Kind("embedding", name, layer(create), partial(numbers, 5))

    def positions(m, x):
        return m.token(x) + m.position(torch.arange(x.shape[1])[None])

    make = lambda: Calls(positions, token=nn.Embedding(9, 6), position=nn.Embedding(5, 6))
    yield Kind("embedding", "positions of shape (1, T)", make, partial(numbers, 5))
    yield Kind("tied", "embedding and output layer", Tied, partial(numbers, 5))
    yield Kind("tied", "embedding and output layer at every position", partial(Tied, False), partial(numbers, 5))
    yield Kind("tied", "two linear layers", _tied_linears, partial(noise, 6))
    yield Kind("tied", "two linear layers over positions", _tied_linears, partial(noise, 4, 6))
    yield Kind("frozen", "weight of a layer, not its bias", _half_frozen, partial(noise, 6))
    whole = lambda: _without_gradients(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), ToLogits()), 0)
    yield Kind("frozen", "a layer", whole, partial(noise, 6))


def _parametrizations() -> Iterator[Kind]:
    kinds = {
        "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
        "weight_norm, convolution": lambda: parametrizations.weight_norm(nn.Conv1d(6, 4, 2)),
        "weight_norm, as a hook": lambda: nn.utils.weight_norm(nn.Linear(6, 4)),
        "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
        "spectral_norm, eval mode": lambda: parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
        "spectral_norm, as a hook": lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
        "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 4)),
    }
    for name, create in kinds.items():
        inputs = partial(noise, 6, 5) if "convolution" in name else partial(noise, 6)
        yield Kind("parametrization", name, layer(create), inputs)


class Sign(torch.autograd.Function):
    """Straight through; in the old style."""

    @staticmethod
    def forward(ctx, x):
        return torch.where(x > 0, 1.0, -1.0).to(x)

    @staticmethod
    def backward(ctx, B):
        return B


class Scaled(torch.autograd.Function):
    """x · w, in the old style: a parameter goes in with the batch."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, B):
        x, w = ctx.saved_tensors
        return B * w, (B * x).sum(0)


class Cubed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, B):
        return 3 * ctx.saved_tensors[0] ** 2 * B


INDEX = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 0], [0, 0, 1, 2]])
EXPRESSIONS: dict[str, tuple[Callable, dict, tuple[int, ...]]] = {
    "used twice": (lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w), {"w": (6, 6)}, (4, 6)),
    "used in two ways": (lambda m, x: F.linear(x, m.w) + m.w.sum(0), {"w": (6, 6)}, (4, 6)),
    "used twice, once without a part in the loss": (
        lambda m, x: (F.linear(x, m.w), F.linear(x.tanh(), m.w))[0], {"w": (6, 6)}, (4, 6)),
    "matmul": (lambda m, x: x @ m.w, {"w": (6, 4)}, (4, 6)),
    "class token and position embedding": (
        lambda m, x: torch.cat([m.t.expand(len(x), -1, -1), x], 1) + m.p, {"t": (1, 1, 6), "p": (1, 5, 6)}, (4, 6)),
    "layer scale": (lambda m, x: x + m.s * x.tanh(), {"s": (4, 1)}, (4, 6)),
    "minus the batch, divided": (lambda m, x: (m.a - x) / m.b, {"a": (6,), "b": (4, 6)}, (4, 6)),
    "added in place": (lambda m, x: (1.0 * x).add_(m.a), {"a": (6,)}, (4, 6)),
    "scalars": (lambda m, x: m.a * x + m.b, {"a": (), "b": ()}, (4, 6)),
    "relative position bias": (
        lambda m, x: (x @ x.mT + m.t[INDEX.view(-1)].view(4, 4, -1).permute(2, 0, 1)[0].unsqueeze(0)).softmax(-1),
        {"t": (3, 2)}, (4, 6)),
    "normalised weight": (
        lambda m, x: F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)), {"g": (5, 1), "v": (5, 6)}, (4, 6)),
    "table from a network of parameters": (
        lambda m, x: x + F.linear(torch.relu(F.linear(torch.ones(4, 2).to(x), m.u)), m.w),
        {"u": (7, 2), "w": (6, 7)}, (4, 6)),
    "windows": (
        lambda m, x: F.linear(x.reshape(-1, 2, 6), m.w, m.b).reshape(len(x), -1), {"w": (3, 6), "b": (3,)}, (4, 6)),
    "low rank, added": (lambda m, x: x + x @ m.a.T @ m.b.T, {"a": (2, 6), "b": (6, 2)}, (6,)),
    "low rank, merged": (
        lambda m, x: F.linear(x, m.w + m.b @ m.a), {"w": (5, 6), "a": (2, 6), "b": (5, 2)}, (6,)),
    "pow": (lambda m, x: x.abs().add(0.5) ** m.a, {"a": (6,)}, (4, 6)),
    "where": (lambda m, x: torch.where(x > 0, x, m.a), {"a": (6,)}, (4, 6)),
    "lerp": (lambda m, x: torch.lerp(x, x.tanh(), m.a), {"a": (6,)}, (4, 6)),
    "einsum": (lambda m, x: torch.einsum("btd,dc->bc", x, m.w), {"w": (6, 5)}, (4, 6)),
    "addcmul": (lambda m, x: torch.addcmul(x, x.tanh(), m.a), {"a": (6,)}, (4, 6)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), {"b": (5,), "w": (6, 5)}, (6,)),
    "bmm with an expanded parameter": (
        lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), {"w": (6, 5)}, (4, 6)),
    "index by the batch": (lambda m, x: m.t[x[:, :, 0].long().abs() % 3], {"t": (3, 4)}, (4, 6)),
    "cat along features": (
        lambda m, x: torch.cat([x, m.a.unsqueeze(0).expand(len(x), 2)], 1), {"a": (2,)}, (6,)),
    "stack": (lambda m, x: torch.stack([x, x * m.a], 1), {"a": (6,)}, (6,)),
    "roll": (lambda m, x: x.roll(1, 1) * m.a.roll(2, 0), {"a": (6,)}, (4, 6)),
    "grid_sample": (
        lambda m, x: F.grid_sample(
            m.map.expand(len(x), -1, -1, -1), x.view(len(x), 4, 3, 2).tanh(), align_corners=False),
        {"map": (1, 2, 4, 4)}, (4, 6)),
    "prototypes by cdist": (lambda m, x: -torch.cdist(x, m.p), {"p": (3, 6)}, (4, 6)),
    "max with a parameter": (lambda m, x: torch.maximum(x, m.a), {"a": (6,)}, (4, 6)),
    "filled by index": (
        lambda m, x: _filled(F.linear(x[:, 0], m.a), F.linear(x[:, 1], m.b)), {"a": (4, 6), "b": (3, 6)}, (4, 6)),
    "view, then in place": (lambda m, x: F.linear(x, m.w).view(len(x), -1).mul_(2).relu_(), {"w": (5, 6)}, (4, 6)),
    "view with a bias, then in place": (
        lambda m, x: F.linear(x, m.w, m.b).view(len(x), -1).mul_(2).relu_(), {"w": (5, 6), "b": (5,)}, (4, 6)),
    "a part of a view, then in place": (
        lambda m, x: _relu_first(F.linear(x, m.w, m.b)), {"w": (5, 6), "b": (5,)}, (4, 6)),
    "added in place to a part": (lambda m, x: _add_to_part(1.0 * x, m.a), {"a": (3,)}, (4, 6)),
    "parameters that come and go": (lambda m, x: F.linear(x, m.w).detach() + m.b + x, {"w": (6, 6), "b": (6,)}, (4, 6)),
    "autograd.Function of a weight": (lambda m, x: F.linear(x, Sign.apply(m.w)), {"w": (5, 6)}, (6,)),
    "autograd.Function of a weight that is also used": (
        lambda m, x: F.linear(F.linear(x, Sign.apply(m.w)).tanh(), m.w), {"w": (6, 6)}, (6,)),
    "autograd.Function of batch and parameter": (lambda m, x: Scaled.apply(x, m.a), {"a": (6,)}, (6,)),
    "autograd.Function of batch and a parameter that is also used": (
        lambda m, x: Scaled.apply(x * m.a, m.a), {"a": (6,)}, (6,)),
    "autograd.Function without forward mode": (lambda m, x: Cubed.apply(F.linear(x, m.w)), {"w": (4, 6)}, (6,)),
    "no part in the loss": (lambda m, x: (F.linear(x, m.w), x * m.a)[1], {"w": (4, 6), "a": (6,)}, (6,)),
}  # fmt: skip


def _filled(first: Tensor, second: Tensor) -> Tensor:
    y = torch.zeros(len(first), 7, dtype=first.dtype)
    y[:, :4], y[:, 4:] = first, second
    return y.tanh()


def _relu_first(y: Tensor) -> Tensor:
    y[:, :2].relu_()
    return y * 1.0


def _add_to_part(x: Tensor, a: Tensor) -> Tensor:
    x[..., :3].add_(a)
    return x.tanh()


def _guarded(m, x):
    y = m.a(x)
    if torch.isnan(y).any():
        raise RuntimeError("NaN")
    return y.relu()


def _routed(m, x):
    weight, choice = m.gate(x).softmax(1).max(1)
    y = x.new_zeros(len(x), 4)
    for i, expert in enumerate(m.experts):
        rows = (choice == i).nonzero()[:, 0]
        y = y.index_add(0, rows, expert(x[rows]) * weight[rows, None])
    return y


class KeepsMap(nn.Module):
    """Keeps its attention map for pictures."""

    def __init__(self):
        super().__init__()
        self.q, self.v, self.h, self.map = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 3), None

    def forward(self, x):
        self.map = (self.q(x) @ x.mT).softmax(-1)
        return self.h((self.map @ self.v(x)).mean(1))


class RunningMean(nn.Module):
    """A running mean of its inputs, as in observation normalisers; not used in training."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                self.calls += 1
        return self.layer(x)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 4, dtype=torch.complex64))

    def forward(self, x):
        return x.to(self.w.dtype) @ self.w


class DictOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        y = self.layer(x["features"][0] + x["features"][1]) if isinstance(x, dict) else self.layer(x)
        return {"logits": y, "hidden": (y.tanh(),)}


def _conv(*layers) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(4, 4, 2), *(create() for create in layers), ToLogits())


def _others() -> Iterator[Kind]:
    maps, flat = partial(noise, 4, 5, 4), partial(noise, 6)
    affine = partial(nn.InstanceNorm2d, 4, affine=True)
    yield Kind("in place", "convolution, ReLU", _conv(partial(nn.ReLU, True)), maps)
    yield Kind("in place", "convolution, InstanceNorm, ReLU", _conv(affine, partial(nn.ReLU, True)), maps)
    yield Kind(
        "in place",
        "convolution, frozen BatchNorm, ReLU",
        _conv(lambda: nn.BatchNorm2d(4).eval(), partial(nn.ReLU, True)),
        maps,
    )
    yield Kind(
        "in place",
        "linear, hardswish",
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Hardswish(True), ToLogits()),
        partial(noise, 5, 6),
    )
    for reentrant in (False, True):
        call = lambda m, x, r=reentrant: checkpoint(m.part, m.before(x), use_reentrant=r)
        make = lambda c=call: Calls(c, before=nn.Linear(6, 6), part=nn.Sequential(nn.Linear(6, 5), nn.Tanh()))
        yield Kind("checkpointing", "reentrant" if reentrant else "not reentrant", make, flat)
    shared = lambda: Calls(
        lambda m, x: m.part(checkpoint(m.part, m.part(x).tanh(), use_reentrant=True)), part=nn.Linear(6, 6)
    )
    yield Kind("checkpointing", "reentrant, of a layer that is also used outside", shared, flat)
    scripted = lambda: nn.Sequential(
        nn.Linear(6, 6), torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.Tanh())), nn.Linear(4, 4), ToLogits()
    )
    yield Kind("scripted", "a submodule", scripted, flat)
    yield Kind(
        "scripted",
        "the model",
        lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))),
        flat,
    )
    last = lambda: nn.Sequential(nn.Conv2d(4, 6, 2), ToLogits()).to(memory_format=torch.channels_last)
    yield Kind("memory format", "channels_last", last, lambda: maps().to(memory_format=torch.channels_last))
    yield Kind("complex", "weights", layer(Complex), flat)
    for name, act in (("ReLU", nn.ReLU), ("PReLU", nn.PReLU)):
        guard = lambda a=act: Calls(lambda m, x: m.act(_guarded(m, x)), a=nn.Linear(6, 8), act=a())
        yield Kind("depends on values", f"NaN guard, {name}", guard, flat)
    experts = lambda: Calls(_routed, gate=nn.Linear(6, 2), experts=nn.ModuleList(nn.Linear(6, 4) for _ in range(2)))
    yield Kind("depends on values", "mixture of experts", experts, flat)
    yield Kind("keeps state", "its last attention map", KeepsMap, partial(noise, 5, 6))
    yield Kind("keeps state", "a running mean of its own", RunningMean, flat)
    yield Kind(
        "batches",
        "dict and tuple outputs",
        DictOutput,
        flat,
        lambda o, t: cross_entropy(o["logits"] + o["hidden"][0], t),
    )
    tree = lambda: {"features": (noise(6), noise(6).sin())}
    yield Kind("batches", "dicts and tuples as inputs", DictOutput, tree, lambda o, t: cross_entropy(o["logits"], t))
    yield Kind(
        "batches",
        "outputs with the sequence first",
        SequenceOutput,
        partial(noise, 5, 6),
        lambda o, t: cross_entropy(o.mean(0), t),
    )
    yield Kind(
        "losses", "sum", lambda: nn.Sequential(nn.Linear(6, 3)), flat, partial(cross_entropy, reduction="sum"), True
    )
    yield Kind(
        "losses",
        "label smoothing",
        lambda: nn.Sequential(nn.Linear(6, 3)),
        flat,
        nn.CrossEntropyLoss(label_smoothing=0.1),
    )
    yield Kind(
        "losses",
        "a mean over tokens inside a sample",
        lambda: nn.Sequential(nn.Linear(6, 3)),
        partial(noise, 5, 6),
        _token_loss,
    )
    yield Kind("losses", "a mask by value", lambda: nn.Sequential(nn.Linear(6, 3)), flat, _hard_samples, True)


class SequenceOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return self.layer(x).transpose(0, 1)


def _token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs.flatten(0, 1), targets.repeat_interleave(outputs.shape[1]))


def _hard_samples(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = cross_entropy(outputs, targets, reduction="none")
    return losses[losses > 0.1].sum()


def _expressions() -> Iterator[Kind]:
    for name, (call, shapes, sample) in EXPRESSIONS.items():
        yield Kind("expressions", name, lambda c=call, s=shapes: Calls(c, **s), partial(noise, *sample))


KINDS = [
    kind
    for kinds in (
        _layers,
        _normalisations,
        _attention,
        _recurrent,
        _embeddings,
        _parametrizations,
        _expressions,
        _others,
    )
    for kind in kinds()
]


def layers_with_parameters() -> set[str]:
    """Classes of torch.nn that are not known to have no parameters."""
    found = set()
    for name, kind in vars(nn).items():
        if not (inspect.isclass(kind) and issubclass(kind, nn.Module)) or name in NOT_BY_THEMSELVES:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if not list(kind().parameters()):
                    continue
        except TypeError:
            if name in WITHOUT_PARAMETERS:
                continue
        found.add(name)
    return found


# They need arguments, and have no parameters.
WITHOUT_PARAMETERS = {
    *(f"{kind}Pool{d}d" for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax", "LP") for d in (1, 2, 3)),
    *(f"{kind}Pad{d}d" for kind in ("Zero", "Constant", "Reflection", "Replication", "Circular") for d in (1, 2, 3)),
    *(f"{kind}{d}d" for kind in ("MaxUnpool", "FractionalMaxPool") for d in (1, 2, 3)),
    *("Fold", "Unfold", "PixelShuffle", "PixelUnshuffle", "Threshold", "LocalResponseNorm", "Unflatten"),
    *("UpsamplingNearest2d", "UpsamplingBilinear2d", "CrossMapLRN2d", "ChannelShuffle"),
}  # fmt: skip


def difference(kind: Kind, test_gradients: str) -> tuple[float, str, list[str]]:
    """The largest relative error over the four statistics, the estimator that was taken, and what was told of it.

    Raises:
        ValueError: the estimator is refused.
    """
    model, inputs, targets = kind.build()
    expected = oracle.statistics(oracle.gradient_vectors(model, kind.loss, inputs, targets))
    estimator, told = gradients.build(test_gradients, model, kind.loss, True, 256, (inputs, targets))
    with estimator.observe(inputs, targets):
        pass
    moments = estimator.moments()
    return max(relative(getattr(moments, name), expected[name]) for name in STATISTICS), _name(estimator), told


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected) if expected else abs(found)


def _name(estimator: gradients.Estimator) -> str:
    names = {gradients.GhostNorms: "ghost", gradients.PerSampleGradients: "vmap", gradients.SingleGradients: "loop"}
    return names[type(estimator)]


def _cell(kind: Kind, test_gradients: str) -> str:
    try:
        error, _, told = difference(kind, test_gradients)
    except ValueError:
        return "refused"
    if error > 1e-9:
        return f"**off by {error:.0e}**"
    return "in part" if any("in part" in line for line in told) else "exact"


def cells(kind: Kind) -> list[str]:
    """What each estimator makes of it, and which `auto` takes."""
    error, taken, _ = difference(kind, "auto")
    shown = taken if error <= 1e-9 else f"{taken}, **off by {error:.0e}**"
    return [*(_cell(kind, name) for name in ("ghost", "vmap", "loop")), shown]


def row(kind: Kind, own: list[str]) -> str:
    return f"| {kind.group} | {kind.name} | {' | '.join(own)} |"


def table() -> str:
    """Markdown, a line for each kind."""
    lines = ["| | kind | `ghost` | `vmap` | `loop` | `auto` takes |", "|---|---|---|---|---|---|"]
    return "\n".join([*lines, *(row(kind, cells(kind)) for kind in KINDS)])


PAGE = """# Which estimator takes which module

V, V_ip, V_orth and ‖ḡ‖² of {n} samples in float64, against one backward pass a sample through the module itself:

- **exact**: equal to 1e-9 relative or better.
- **in part**: exact; some of the parameters have no rule, and take per-sample gradients by `vmap` or `loop`.
- **refused**: named explicitly, the estimator does not pass the check at the start; the error says what to choose.

BatchNorm in training couples the samples of a batch: here each sample is a batch of one
([docs/statistics.md](statistics.md)). The list is that of the suite's own tests (`checks/kinds.py`); this page is what
`python -m checks.kinds` writes.

{table}
"""

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(PAGE.format(n=SAMPLES, table=table()), end="")
