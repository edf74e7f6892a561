"""`ghost` against the plain autograd loop in float64, over every kind of layer and use of a parameter."""

import gc
import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import models
from adadagrad import gradients
from adadagrad.gradients import contributions, ghost
from benchmarks.cases import for_comparison
from checks import oracle
from checks.kinds import CLASSES, KINDS, Tied, ToLogits
from checks.test_gradients import SMALL, assert_matches


def assert_ghost_is_exact(model: nn.Module, inputs: torch.Tensor, rel: float = 1e-9, covered: bool = True) -> None:
    """V, V_ip, V_orth and ‖ḡ‖² of the batched pass, and of the training pass where that is possible."""
    model = model.double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    targets = torch.arange(len(inputs)) % CLASSES
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    # In one piece the p_i come from what the pass has kept, in several by forward mode.
    for in_training_pass, sizes in itertools.product((False, True), ((len(inputs),), (3, len(inputs) - 3))):
        if in_training_pass and gradients.couples_samples(model):
            continue
        arguments = ("ghost", model, cross_entropy, True, sizes[0], (inputs, targets))
        estimator, told = gradients.build(*arguments, in_training_pass=in_training_pass)
        assert any("in part" in line for line in told) != covered, told
        model.zero_grad()
        scale, grad_scale = 0.5, 8.0
        for x, y in zip(inputs.split(sizes), targets.split(sizes)):
            with estimator.observe(x, y, loss_scale=scale):
                if in_training_pass:
                    (grad_scale * scale * cross_entropy(model(x), y, reduction="sum")).backward()
        assert bool(estimator.kept) == (covered and len(sizes) == 1)
        for parameter in model.parameters():  # as the training step leaves it: grad_scale times the mean
            if parameter.grad is not None:
                parameter.grad /= scale * len(inputs)
        assert_matches(estimator.moments(grad_scale), expected, rel)
        model.zero_grad()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@settings(max_examples=50, deadline=None)
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
    channels_last=st.booleans(),
    form=st.sampled_from(["gram", "gram, as on a GPU", "instantiate", "cheaper"]),
)
def test_convolutions(dims, groups, wide, kernel, stride, padding, dilation, size, bias, channels_last, form):
    """All forms of the norm, whatever shape and device would choose."""
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
    costs = {"instantiate": 10**9, "cheaper": contributions.Convolution.ADDITION}
    devices = () if form == "gram, as on a GPU" else ("cpu",)
    with mock.patch.multiple(
        contributions.Convolution, ADDITION=costs.get(form, 0), SUMS_IN_TURN_ON=devices, LITTLE=2**40
    ):  # fmt: skip
        inputs = images(5, channels, *[size + i for i in range(dims)])
        if channels_last and dims == 2:
            model, inputs = (thing.to(memory_format=torch.channels_last) for thing in (model, inputs))
        assert_ghost_is_exact(model, inputs, rel=1e-8)


def test_under_mixed_precision_16_bits_are_kept():
    """A normalisation's output is float32; what the layer after it multiplies is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.LayerNorm(32))
    model.append(nn.Linear(32, 3))
    inputs, targets = torch.randn(6, 2, 4, 4), torch.randint(3, (6,))
    with torch.autocast("cpu", torch.bfloat16), ghost.GhostMode(dict(model.named_parameters()), inputs, keep=True) as m:
        cross_entropy(model(inputs), targets, reduction="sum").backward()
    kept = {name: own for name, own in m._contributions if name in ("0.weight", "2.weight", "5.weight")}
    assert len(kept) == 3
    assert all(tensor.dtype == torch.bfloat16 for own in kept.values() for tensor in (own.x, own.B))


def test_a_rule_that_fails_on_the_device_is_told(monkeypatch):
    """The check in double precision cannot see it; the numbers stay right, and the user learns why it is slow."""

    def fails(self):
        raise RuntimeError("no such product on this device")

    model = nn.Sequential(nn.Linear(6, 4), ToLogits()).double()
    inputs, targets, told = images(5, 6).double(), torch.arange(5) % CLASSES, []
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    estimator = gradients.GhostNorms(model, cross_entropy, True, 5, in_training_pass=True, notify=told.append)
    monkeypatch.setattr(contributions.OuterProducts, "parts", fails)
    for _ in range(2):
        model.zero_grad()
        with estimator.observe(inputs, targets, 1 / 5):
            (cross_entropy(model(inputs), targets, reduction="sum") / 5).backward()
        assert_matches(estimator.moments(), expected, rel=1e-9)
    assert any("fails in a pass (no such product on this device)" in line for line in told)


class Products(TorchDispatchMode):
    """Notes the precision of batched products: of the factors, and of the sums."""

    def __init__(self):
        super().__init__()
        self.factors, self.sums = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._schema.name == "aten::bmm":
            self.factors |= {factor.dtype for factor in args[:2]}
            self.sums.add(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_multiplies_16_bits_as_they_are(monkeypatch, dtype):
    """Without numbers, as no GPU is at hand: which factors, and that sums are single."""
    monkeypatch.setattr(contributions, "_scratch", lambda device: 2**20)
    monkeypatch.setattr(contributions, "_multiplies_halves", lambda device, dtype: dtype in contributions.HALF)
    with Products() as products:
        x, B, indices = (torch.empty(4, 5, 6, dtype=dtype, device="meta") for _ in range(3))
        maps, of_maps = (torch.empty(4, 6, 7, 7, dtype=dtype, device="meta") for _ in range(2))
        indices = torch.zeros(4, 5, dtype=torch.int64, device="meta")
        layer, rows = contributions.OuterProducts(x, B), contributions.EmbeddingRows(indices, B, 9, None)
        geometry = (torch.Size([6, 6, 3, 3]), (1, 1), (1, 1), (1, 1), 1)
        convolution = contributions.Convolution(maps, of_maps, *geometry)
        few_channels = contributions.Convolution(
            maps[:, :3].contiguous(), of_maps, torch.Size([6, 3, 3, 3]), *geometry[1:]
        )
        summed = [convolution._gram_terms(maps, of_maps), layer.instantiate(slice(0, 4)), layer.parts()[1]]
        summed += [few_channels.instantiate(slice(0, 4)), rows.parts()[1], layer.norms_sq()]
        assert few_channels.by_patches
    assert products.factors == {dtype} and products.sums == {torch.float32}
    assert all(sums.dtype in (torch.float32, torch.float64) for sums in summed)


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


@pytest.mark.parametrize("padding_index", [None, 2])
def test_embedding_with_repeated_rows(padding_index):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 4, padding_idx=padding_index), ToLogits())
    assert_ghost_is_exact(model, torch.randint(6, (5, 7), generator=torch.Generator().manual_seed(1)))


def test_parameters_without_a_rule_take_per_sample_gradients():
    model = nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), ToLogits())
    assert_ghost_is_exact(model, images(5, 6), covered=False)


# Under BatchNorm the reference itself is only good to some 1e-4 in float32 (measured: resnet18 2e-4, densenet121 6e-4).
FLOATS = {torch.float64: 1e-8, torch.float32: 1e-4}
FAMILIES = ["resnet18", "mobilenet_v3_small", *SMALL]


@pytest.mark.parametrize(
    "name, dtype", [pair for pair in itertools.product(FAMILIES, FLOATS) if pair != ("resnet18", torch.float32)]
)
def test_torchvision_models_equal_vmap(name, dtype):
    """Training mode, no dropout: the fast path agrees with the reference."""
    torch.manual_seed(0)
    model = SMALL[name](CLASSES) if name in SMALL else models.build(name, (3, 64, 64), CLASSES)
    model.to(dtype)
    for_comparison(model)
    inputs, targets = images(4, 3, 64, 64).to(dtype), torch.arange(4) % CLASSES
    ours, _ = gradients.build("auto", model, cross_entropy, True, 4, (inputs, targets))
    results = []
    for estimator, size in (
        (ours, 4),  # in one piece
        (ours, 3),  # in pieces: forward mode
        (gradients.PerSampleGradients(model, cross_entropy, True, 4), 4),
    ):
        estimator.max_micro_batch_size = size
        with estimator.observe(inputs, targets):
            pass
        results.append(estimator.moments())
    assert isinstance(ours, gradients.GhostNorms) and ours.forward_mode
    names = ("variance", "variance_inner_product", "variance_orthogonality", "grad_norm_sq")
    *ours, reference = results
    for result in ours:
        assert_matches(result, {name: getattr(reference, name) for name in names}, rel=FLOATS[dtype])


def test_a_gradient_that_is_rounding_alone_goes_to_another_estimator():
    """Maps of equal values, whose BatchNorm leaves no gradient: ghost would have rounding where there is nothing."""
    torch.manual_seed(0)
    pooled = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 1, 1)]  # 2×2 pixels, each of which sees all
    model = nn.Sequential(*pooled, nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64), nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.randn(7, 3, 2, 2, dtype=torch.float64), torch.arange(7) % 3
    model(x.float())
    model.double()
    estimator, told = gradients.build("auto", model, cross_entropy, True, 4, (x, y))
    assert isinstance(estimator, gradients.PerSampleGradients)
    assert "not usable: ghost: its gradients of 3.weight are not those of single samples" in told[0]
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, x, y))
    assert_matches(gradients.moments(model, cross_entropy, x, y), expected, rel=1e-9)


def test_without_forward_mode_inner_products_take_per_sample_gradients():
    """Where the batch comes in pieces; in one piece nothing of the kind is needed."""
    kind = next(kind for kind in KINDS if kind.name == "autograd.Function without forward mode")
    model, inputs, targets = kind.build()
    lines = []
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    for size, said in ((6, 0), (4, 1), (2, 2)):
        probe = (inputs, targets)
        estimator, _ = gradients.build("ghost", model, cross_entropy, True, size, probe, notify=lines.append)
        with estimator.observe(inputs, targets):
            pass
        assert_matches(estimator.moments(), expected, rel=1e-9)
        assert len(lines) == said and all("no forward-mode derivative" in line for line in lines)


def test_large_pulled_back_gradients_are_not_kept(monkeypatch):
    """Then the p_i come by forward mode, and are the same."""
    monkeypatch.setattr(contributions, "_scratch", lambda device: 1)
    kind = next(kind for kind in KINDS if kind.name == "table from a network of parameters")
    model, inputs, targets = kind.build()
    estimator = gradients.GhostNorms(model, cross_entropy, True, len(inputs))
    with estimator.observe(inputs, targets):
        pass
    assert not estimator.kept
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    assert_matches(estimator.moments(), expected, rel=1e-9)


def test_tied_embeddings_need_no_matrix_a_sample(monkeypatch):
    """The norms come from the two uses and their cross term, without vocabulary × width numbers a sample."""
    torch.manual_seed(0)
    vocabulary, width = 50, 8
    model = Tied(False)
    model.embedding, model.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary, bias=False)
    model.head.weight = model.embedding.weight
    inputs = torch.randint(vocabulary, (5, 4))
    for kind in (contributions.EmbeddingRows, contributions.OuterProducts):
        monkeypatch.setattr(kind, "instantiate", lambda self, chunk: pytest.fail("a matrix was made"))
    assert_ghost_is_exact(model, inputs)


def tensors_alive(reach: int) -> int:
    """Numbers in all tensors of at least so many."""
    gc.collect()
    return sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor and o.numel() >= reach)


@pytest.mark.parametrize("inner_products, whole, kept", [(False, True, 0), (True, False, 0), (True, True, 1)])
def test_inputs_of_layers_are_dropped_when_their_gradient_comes(inner_products, whole, kept):
    """Even while the graph lives on; kept are they only for inner products of a share that comes in one piece."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, CLASSES))
    inputs, targets = images(256, 64).float(), torch.arange(256) % CLASSES
    estimator = gradients.GhostNorms(model, cross_entropy, inner_products, 256, in_training_pass=True)
    before = tensors_alive(256 * 512)
    with estimator.observe(inputs, targets, 1 / 256, whole):
        logits = model(inputs)
        cross_entropy(logits, targets).backward()
    del model[0].weight.grad, model[2].weight.grad
    after = tensors_alive(256 * 512)
    assert logits.grad_fn is not None and (after - before >= 2 * 256 * 512) == bool(kept)
    assert kept or after == before
