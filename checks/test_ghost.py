"""`ghost` against the plain autograd loop in float64, over every kind of layer and use of a parameter."""

import itertools

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import gradients
import models
from benchmarks.cases import for_comparison
from checks import oracle
from checks.test_gradients import assert_matches
from gradients import contributions, per_sample_copy

CLASSES = 3


class ToLogits(nn.Module):
    """Bends what a layer gives and projects it to logits by a fixed matrix."""

    def forward(self, x):
        x = x.flatten(1)
        fixed = torch.sin(1.7 * torch.arange(x.shape[1] * CLASSES)).view(-1, CLASSES).to(x)
        return torch.sin(x) @ fixed


def assert_ghost_is_exact(model: nn.Module, inputs: torch.Tensor, rel: float = 1e-9, covered: bool = True) -> None:
    """V, V_ip, V_orth and ‖ḡ‖² of the batched pass, and of the training pass where that is possible."""
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = torch.arange(len(inputs)) % CLASSES
    reference = per_sample_copy.per_sample_copy(model)
    parameters = dict(model.named_parameters())

    def alone(x):
        buffers = {n: b for n, b in model.named_buffers() if n in dict(reference.named_buffers())}
        return torch.func.functional_call(reference, {**parameters, **buffers}, (x,))

    alone.parameters = model.parameters
    expected = oracle.statistics(oracle.gradient_vectors(alone, cross_entropy, inputs, targets))
    probe = (inputs[:3], targets[:3])
    for in_training_pass, sizes in itertools.product((False, True), ((len(inputs),), (3, len(inputs) - 3))):
        if in_training_pass and per_sample_copy.couples_samples(model):
            continue
        # In one piece the p_i come from what the pass has kept, in several by forward mode.
        estimator = gradients.GhostNorms(model, cross_entropy, True, sizes[0], in_training_pass=in_training_pass)
        problem = estimator.check(*probe)
        assert (problem == "") == covered, problem
        model.zero_grad()
        scale, grad_scale = 0.5, 8.0
        for x, y in zip(inputs.split(sizes), targets.split(sizes)):
            with estimator.observe(x, y, loss_scale=scale):
                if in_training_pass:
                    (grad_scale * scale * cross_entropy(model(x), y, reduction="sum")).backward()
        assert bool(estimator.whole) == (covered and len(sizes) == 1)
        for parameter in model.parameters():  # as the training step leaves it: grad_scale times the mean
            if parameter.grad is not None:
                parameter.grad /= scale * len(inputs)
        assert_matches(estimator.moments(grad_scale), expected, rel)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 1, 2, 3]),
    wide=st.integers(1, 2),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 2),
    size=st.integers(4, 9),
    bias=st.booleans(),
    form=st.sampled_from(["gram", "instantiate", "cheaper"]),
)
def test_convolutions(dims, groups, wide, kernel, stride, padding, dilation, size, bias, form):
    """All three forms of the norm, whatever the shape would choose."""
    if (kernel - 1) * dilation >= size + 2 * padding:
        return
    size = min(size, 5) if dims == 3 else size
    if (kernel - 1) * dilation >= size + 2 * padding:
        return
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    channels = 2 * groups
    model = nn.Sequential(
        layer(channels, wide * channels, kernel, stride, padding, dilation, groups, bias=bias), ToLogits()
    )
    costs = {"gram": 0, "instantiate": 10**9, "cheaper": contributions.Convolution.ADDITION}
    before, contributions.Convolution.ADDITION = contributions.Convolution.ADDITION, costs[form]
    try:
        assert_ghost_is_exact(model, images(5, channels, *[size + i for i in range(dims)]), rel=1e-8)
    finally:
        contributions.Convolution.ADDITION = before


@pytest.mark.parametrize("padding, mode", [("same", "zeros"), ("valid", "zeros"), (2, "circular")])
def test_convolution_paddings(padding, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, (3, 2), padding=padding, dilation=(1, 2), padding_mode=mode)
    assert_ghost_is_exact(nn.Sequential(conv, ToLogits()), images(5, 2, 6, 7))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 6), max_size=2), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_linear_with_any_leading_dimensions(leading, inputs, outputs, bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias), ToLogits())
    assert_ghost_is_exact(model, images(5, *leading, inputs), rel=1e-8)


def norm_layers():
    yield "batch_norm_1d", nn.BatchNorm1d(4), (5, 4, 6)
    yield "batch_norm_2d", nn.BatchNorm2d(4), (5, 4, 3, 3)
    yield "batch_norm_3d", nn.BatchNorm3d(4), (5, 4, 2, 3, 2)
    yield "group_norm", nn.GroupNorm(2, 4), (5, 4, 3, 5)
    yield "group_norm_vectors", nn.GroupNorm(2, 4), (5, 4)
    yield "layer_norm", nn.LayerNorm(6), (5, 3, 6)
    yield "layer_norm_2_axes", nn.LayerNorm((3, 6)), (5, 2, 3, 6)
    yield "layer_norm_2d", torchvision.models.convnext.LayerNorm2d(4), (5, 4, 3, 3)
    yield "instance_norm", nn.InstanceNorm2d(4, affine=True), (5, 4, 3, 3)


@pytest.mark.parametrize("layer, shape", [case[1:] for case in norm_layers()], ids=[case[0] for case in norm_layers()])
def test_normalisations(layer, shape):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    assert_ghost_is_exact(nn.Sequential(layer, ToLogits()), images(*shape) * 2 + 1)


@pytest.mark.parametrize("padding_index", [None, 2])
def test_embedding_with_repeated_rows(padding_index):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=padding_index), ToLogits())
    assert_ghost_is_exact(model, torch.randint(6, (5, 7), generator=torch.Generator().manual_seed(1)))


class Uses(nn.Module):
    """A small network around one unusual use of parameters."""

    def __init__(self, use, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.use = use
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))
        self.index = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 0], [0, 0, 1, 2]])
        self.logits = ToLogits()

    def forward(self, x):
        return self.logits(self.use(self, x))


USES = {
    "used twice": Uses(lambda m, x: F.linear(F.linear(x, m.w).tanh(), m.w), w=(6, 6)),
    "used in two ways": Uses(lambda m, x: F.linear(x, m.w) + m.w.sum(0), w=(6, 6)),
    "matmul": Uses(lambda m, x: x @ m.w, w=(6, 4)),
    "class token and position embedding": Uses(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.position, token=(1, 1, 6), position=(1, 5, 6)
    ),
    "layer scale": Uses(lambda m, x: x + m.scale * x.tanh(), scale=(4, 1)),
    "parameter minus batch, divided": Uses(lambda m, x: (m.a - x) / m.b, a=(6,), b=(4, 6)),
    "batch divided in place": Uses(lambda m, x: (1.0 * x).add_(m.a), a=(6,)),
    "scalar": Uses(lambda m, x: m.a * x, a=()),
    "relative position bias": Uses(
        lambda m, x: (x @ x.mT + m.table[m.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)[0].unsqueeze(0)).softmax(-1),
        table=(3, 2),
    ),
    "normalised weight": Uses(lambda m, x: F.linear(x, m.g * m.v / m.v.norm(dim=1, keepdim=True)), g=(5, 1), v=(5, 6)),
    "table from a network of parameters": Uses(
        lambda m, x: x + F.linear(torch.relu(F.linear(torch.ones(4, 2).to(x), m.w1)), m.w2), w1=(7, 2), w2=(6, 7)
    ),
    "windows": Uses(lambda m, x: F.linear(x.reshape(-1, 2, 6), m.w, m.b).reshape(len(x), -1), w=(3, 6), b=(3,)),
}


@pytest.mark.parametrize("name", USES)
def test_parameters_in_unusual_places(name):
    assert_ghost_is_exact(USES[name], images(5, 4, 6))


def test_multi_head_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.logits = ToLogits()

        def forward(self, x):
            return self.logits(self.attention(x, x, x, need_weights=False)[0])

    assert_ghost_is_exact(Attention(), images(5, 4, 6))


def test_parameters_without_a_rule_take_per_sample_gradients():
    model = nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), ToLogits())
    assert_ghost_is_exact(model, images(5, 6), covered=False)


def test_auto_takes_vmap_where_the_batch_is_not_in_front():
    """A model that mixes its samples' rows cannot be told from shapes: comparing with single samples shows it."""

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 5)
            self.logits = ToLogits()

        def forward(self, x):
            return self.logits(self.linear(x.transpose(0, 1)).transpose(0, 1))

    torch.manual_seed(0)
    model, inputs, targets = SequenceFirst(), images(6, 6, 4).float(), torch.arange(6) % CLASSES
    estimator, told = gradients.build("auto", model, cross_entropy, True, 8, (inputs[:3], targets[:3]))
    assert isinstance(estimator, gradients.PerSampleGradients) and "off those of single samples" in told[0]


# Under BatchNorm the reference itself is only good to some 1e-4 in float32 (measured: resnet18 2e-4, densenet121 6e-4).
FLOATS = {torch.float64: 1e-8, torch.float32: 1e-4}
FAMILIES = ["resnet18", "swin_t", "vit_b_32", "convnext_tiny", "mobilenet_v3_small"]


@pytest.mark.parametrize(
    "name, dtype", [(n, d) for n in FAMILIES for d in FLOATS if (n, d) != (FAMILIES[0], torch.float32)]
)
def test_torchvision_models_equal_vmap(name, dtype):
    """Training mode, no dropout: the fast path agrees with the reference."""
    torch.manual_seed(0)
    model = models.build(name, (3, 64, 64), CLASSES).to(dtype)
    for_comparison(model)
    inputs, targets = images(4, 3, 64, 64).to(dtype), torch.arange(4) % CLASSES
    results = []
    for estimator in (
        gradients.build("auto", model, cross_entropy, True, 4, (inputs[:3], targets[:3]))[0],  # in one piece
        gradients.build("auto", model, cross_entropy, True, 3, (inputs[:3], targets[:3]))[0],  # in pieces: forward mode
        gradients.PerSampleGradients(model, cross_entropy, True, 4),
    ):
        with estimator.observe(inputs, targets):
            pass
        results.append(estimator.moments())
        if isinstance(estimator, gradients.GhostNorms):
            assert estimator.forward_mode
    names = ("variance", "variance_inner_product", "variance_orthogonality", "grad_norm_sq")
    *ours, reference = results
    for result in ours:
        assert_matches(result, {name: getattr(reference, name) for name in names}, rel=FLOATS[dtype])


def test_without_forward_mode_inner_products_take_per_sample_gradients():
    """Where the batch comes in pieces; in one piece nothing of the kind is needed."""

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

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(6, 4)
            self.logits = ToLogits()

        def forward(self, x):
            return self.logits(Cubed.apply(self.linear(x)))

    lines = []
    inputs, targets = images(6, 6).float(), torch.arange(6) % CLASSES
    arguments = ("ghost", Net(), cross_entropy, True)
    expected = gradients.moments(Net(), cross_entropy, inputs, targets, test_gradients="vmap")
    for size, said in ((6, 0), (4, 1), (2, 2)):
        estimator, _ = gradients.build(*arguments, size, (inputs[:3], targets[:3]), notify=lines.append)
        with estimator.observe(inputs, targets):
            pass
        assert estimator.moments().variance_inner_product == pytest.approx(expected.variance_inner_product, rel=1e-4)
        assert len(lines) == said and all("no forward-mode derivative" in line for line in lines)


def test_large_pulled_back_gradients_are_not_kept(monkeypatch):
    """Then the p_i come by forward mode, and are the same."""
    monkeypatch.setitem(contributions.CHUNK, "cpu", 1)
    name = "table from a network of parameters"
    estimator = gradients.GhostNorms(USES[name].double(), cross_entropy, True, 5)
    inputs, targets = images(5, 4, 6), torch.arange(5) % CLASSES
    with estimator.observe(inputs, targets):
        pass
    assert estimator.whole is None
    expected = gradients.moments(USES[name], cross_entropy, inputs, targets, test_gradients="vmap")
    assert estimator.moments().variance_inner_product == pytest.approx(expected.variance_inner_product, rel=1e-9)
