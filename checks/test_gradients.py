"""gradients.py against the plain autograd loop."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.models.convnext import CNBlockConfig

import models
import tests
from adadagrad import gradients
from adadagrad.gradients import micro_batch
from checks import oracle


def small_net(shape=(1, 6, 6), classes=4) -> nn.Module:
    torch.manual_seed(3)
    return models.cnn(shape, classes).double()


def batch(n: int, shape=(1, 6, 6), classes=4):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.rand(n, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(classes, (n,), generator=generator)


def assert_matches(moments, expected: dict[str, float], rel: float):
    for name, value in expected.items():
        assert getattr(moments, name) == pytest.approx(value, rel=rel), name


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_vmap_equals_autograd_loop(chunk):
    model, (inputs, targets) = small_net(), batch(13)
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    moments = gradients.moments(model, cross_entropy, inputs, targets, max_micro_batch_size=chunk)
    assert_matches(moments, expected, rel=1e-9)
    assert moments.batch_size == moments.num_groups == 13
    assert moments.sum_inner == pytest.approx(13 * moments.grad_norm_sq, rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_are_left_out():
    model, (inputs, targets) = small_net(), batch(7)
    model[0].requires_grad_(False)
    expected = oracle.statistics(oracle.gradient_vectors(model, cross_entropy, inputs, targets))
    assert_matches(gradients.moments(model, cross_entropy, inputs, targets), expected, rel=1e-9)


@pytest.mark.parametrize("size", [8, 2], ids=["maps", "1×1 maps"])
def test_batch_norm_normalises_each_sample_by_itself(size):
    """The copy's gradient of a sample is that of a batch of one, also where a map has a single position."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    model.append(nn.Linear(3 * (size // 2) ** 2, 4)).double()
    with torch.no_grad():
        model[2].weight.uniform_(), model[2].bias.normal_()
    inputs, targets = batch(6, (1, size, size))

    # The same thing by hand: a batch of one through instance normalisation (zero variance gives the bias).
    def by_hand(x):
        y = model[1](model[0](x))
        centred = y - y.mean((2, 3), keepdim=True)
        normalised = centred / (y.var((2, 3), unbiased=False, keepdim=True) + model[2].eps).sqrt()
        y = normalised * model[2].weight.view(1, -1, 1, 1) + model[2].bias.view(1, -1, 1, 1)
        return model[5](model[4](model[3](y)))

    by_hand.parameters = model.parameters
    expected = oracle.statistics(oracle.gradient_vectors(by_hand, cross_entropy, inputs, targets))
    before = model[2].running_mean.clone()
    assert_matches(gradients.moments(model, cross_entropy, inputs, targets), expected, rel=1e-9)
    assert torch.equal(model[2].running_mean, before)


def test_dropout_draws_per_sample_and_agrees_between_passes():
    """Σ p_i = b‖ḡ‖² holds only if the second pass draws what the first one drew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4)).double()
    inputs, targets = batch(1)
    inputs, targets = inputs.expand(32, -1, -1, -1), targets.expand(32)
    state = torch.get_rng_state()
    moments = gradients.moments(model, cross_entropy, inputs, targets, max_micro_batch_size=5)
    assert torch.equal(torch.get_rng_state(), state)  # testing does not change what training draws
    assert moments.variance > 1e-3  # equal samples differ by their masks alone
    assert moments.sum_inner == pytest.approx(32 * moments.grad_norm_sq, rel=1e-9)


def convnext(classes: int) -> nn.Module:
    blocks = [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 48, 2), CNBlockConfig(48, None, 1)]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=classes)


def swin(classes: int) -> nn.Module:
    sizes = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return torchvision.models.SwinTransformer([4, 4], stochastic_depth_prob=0.2, num_classes=classes, **sizes)


def vit(classes: int) -> nn.Module:
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    return torchvision.models.VisionTransformer(64, 16, num_classes=classes, **sizes)


@pytest.mark.parametrize("test_gradients", ["ghost", "vmap"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_dropout_behind_attention_agrees_between_passes(attention_dropout, test_gradients):
    """Its input is transposed in memory, and the forward-mode pass takes another kernel for attention."""
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 4}
    model = torchvision.models.VisionTransformer(
        64, 16, dropout=0.1, attention_dropout=attention_dropout, **sizes
    ).double()
    nn.init.normal_(model.heads.head.weight)
    inputs, targets = torch.randn(3, 3, 64, 64, dtype=torch.float64), torch.arange(3)
    ways = {"test_gradients": test_gradients, "max_micro_batch_size": 2}
    moments = gradients.moments(model, cross_entropy, inputs, targets, **ways)
    assert moments.sum_inner == pytest.approx(3 * moments.grad_norm_sq, rel=1e-9)


SMALL = {"convnext": convnext, "swin": swin, "vit": vit}
"""torchvision's blocks, in networks of seconds; benchmarks/results/checked.md has all of them in their own sizes."""


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "convnext", "vit"])
def test_torchvision_families(name):
    """Dropout and stochastic depth included: finite, and the two passes agree."""
    torch.manual_seed(0)
    size = 64 if name in SMALL else 32
    model = SMALL[name](4) if name in SMALL else models.build(name, (3, size, size), 4)
    inputs, targets = batch(3, (3, size, size))
    moments = gradients.moments(model, cross_entropy, inputs.float(), targets, max_micro_batch_size=2)
    assert 0 < moments.variance < float("inf")
    assert moments.sum_inner == pytest.approx(3 * moments.grad_norm_sq, rel=1e-3)


def test_norms_of_many_uneven_groups():
    """micro_batch for the norm test alone, over more groups than it keeps."""
    model, (inputs, targets) = small_net(), batch(23)
    vectors = oracle.gradient_vectors(model, cross_entropy, inputs, targets)
    estimator = gradients.MicroBatchGradients(model, cross_entropy, False, 8, num_groups=2)
    pieces = torch.arange(23).split([3, 1, 4, 2, 5, 1, 7])
    model.zero_grad()
    for piece in pieces:
        with estimator.observe(inputs[piece], targets[piece], 0.5 / 23):
            (cross_entropy(model(inputs[piece]), targets[piece], reduction="sum") * 0.5 / 23 * 4).backward()
    moments = estimator.moments(grad_scale=4.0)
    expected = sum(len(piece) * vectors[piece].mean(0).square().sum() for piece in pieces)
    assert (moments.batch_size, moments.num_groups) == (23, 7)
    assert moments.sum_norm_sq == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("together", [1, 30, 10**6])
def test_inner_products_in_few_kernels(monkeypatch, together):
    """As on a GPU, whatever is cut where: with groups that lack a parameter, and more groups than go at a time."""
    monkeypatch.setattr(micro_batch, "TOGETHER", together)
    monkeypatch.setattr(micro_batch, "BLOCK", 7)
    torch.manual_seed(0)
    shapes = {"a": (3, 4), "b": (5,), "c": (6, 5, 2), "d": ()}
    mean = {name: torch.randn(shape).double() for name, shape in shapes.items()}
    groups = [{name: torch.randn(shape).double() for name, shape in shapes.items()} for _ in range(40)]
    del groups[3]["c"]
    mean["e"] = torch.randn(3, 2, 4, 4).double().to(memory_format=torch.channels_last)
    for i, group in enumerate(groups):  # some lie in memory as the mean does, others do not
        e = torch.randn(3, 2, 4, 4).double()
        group["e"] = e.to(memory_format=torch.channels_last) if i % 2 else e
    expected = [float(sum((g * mean[name]).sum() for name, g in group.items())) for group in groups]
    for inner in (micro_batch._inner_in_few_kernels, micro_batch._inner):
        assert inner(groups, mean).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("inner", [micro_batch._inner, micro_batch._inner_in_few_kernels])
def test_inner_products_of_complex_gradients(inner):
    torch.manual_seed(0)
    mean, group = ({"a": torch.randn(3, 4, dtype=torch.complex128)} for _ in range(2))
    expected = float((torch.view_as_real(mean["a"]) * torch.view_as_real(group["a"])).sum())
    assert inner([group], mean).tolist() == pytest.approx([expected])


class Branches(nn.Module):
    """The layer that a micro-batch passes depends on its first sample."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(2))

    def forward(self, x):
        return self.layers[int(x[0, 0] > 0)](x)


def test_groups_that_lack_a_parameter_are_merged():
    """More micro-batches than groups, of which each has the gradient of one layer only."""
    torch.manual_seed(0)
    model, (inputs, targets) = Branches().double(), batch(10, (6,))
    inputs[:, 0] = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]).repeat_interleave(2)
    estimator = gradients.MicroBatchGradients(model, cross_entropy, True, 2, num_groups=2)
    for x, y in zip(inputs.split(2), targets.split(2)):  # five groups are one too many: neighbours become one
        with estimator.observe(x, y, 1 / 10):
            (cross_entropy(model(x), y, reduction="sum") / 10).backward()
    moments = estimator.moments()
    expected = 0.0
    for pieces in ([0, 1], [2, 3], [4]):
        model.zero_grad()
        n = 2 * len(pieces)
        for piece in pieces:
            x, y = inputs[2 * piece : 2 * piece + 2], targets[2 * piece : 2 * piece + 2]
            (cross_entropy(model(x), y, reduction="sum") / n).backward()
        expected += n * sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert moments.num_groups == 3
    assert moments.sum_norm_sq == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("test_gradients", ["vmap", "ghost", "micro_batch"])
def test_mixed_precision_and_a_scaler_do_not_change_the_decision(test_gradients):
    """bfloat16 autocast and scaled gradients ask for the batch that single precision asks for, but for rounding."""
    torch.manual_seed(0)
    model = models.cnn((1, 8, 8), 4)
    inputs, targets = batch(64, (1, 8, 8))
    inputs, scaler = inputs.float(), torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def asked(mixed: bool) -> tuple[int, int]:
        def autocast():
            return torch.autocast("cpu", torch.bfloat16, enabled=mixed)

        estimator, told = gradients.build(
            test_gradients, model, cross_entropy, True, 16, (inputs[:3], targets[:3]), autocast, in_training_pass=True
        )
        assert not told
        model.zero_grad()
        for x, y in zip(inputs.split(8), targets.split(8)):
            with estimator.observe(x, y, 1 / 64):
                with autocast():
                    logits = model(x)
                loss = cross_entropy(logits.float(), y, reduction="sum") / 64
                (scaler.scale(loss) if mixed else loss).backward()
        moments = estimator.moments(scaler.get_scale() if mixed else 1.0)
        norm, augmented = tests.NormTest(0.3), tests.AugmentedInnerProductTest(0.05, 0.2)
        return norm(moments).next_batch_size, augmented(moments).next_batch_size

    expected = asked(mixed=False)
    assert min(expected) > 100
    assert asked(mixed=True) == pytest.approx(expected, rel=0.02)


def test_overflow_under_a_scaler_decides_nothing():
    """Where the scaled gradients overflow, the scaler skips the step; the batch stays as well."""
    model, (inputs, targets) = small_net(), batch(12)
    estimator, _ = gradients.build(
        "ghost", model, cross_entropy, False, 16, (inputs[:3], targets[:3]), in_training_pass=True
    )
    with estimator.observe(inputs, targets, 1 / 12):
        (cross_entropy(model(inputs), targets) * float("inf")).backward()
    decision = tests.NormTest(0.1)(estimator.moments(grad_scale=2.0**40))
    assert decision.passed is None and decision.next_batch_size == 12 and "not finite" in decision.reason


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("FIND was unable to find an engine to execute this computation"),
        torch.distributed.DistBackendError("NCCL error …: Failed to CUDA calloc async 608 bytes"),
    ],
)
def test_out_of_memory_in_all_its_words(error):
    assert gradients.is_out_of_memory(error)
    assert not gradients.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("pieces", [(11,), (4, 5, 2)])
@pytest.mark.parametrize("test_gradients", ["ghost", "vmap", "loop", "micro_batch"])
def test_products_with_all_other_samples(test_gradients, pieces):
    """Σ m_k q_k² by the definition, q_k = ⟨ḡ_k, the mean of all samples outside group k⟩; a scaled loss."""
    model, (inputs, targets) = small_net(), batch(11)
    vectors = oracle.gradient_vectors(model, cross_entropy, inputs, targets)
    probe = (inputs[: gradients.PROBE], targets[: gradients.PROBE])
    estimator, _ = gradients.build(test_gradients, model, cross_entropy, True, 3, probe, in_training_pass=True)
    model.zero_grad()
    for piece in torch.arange(11).split(list(pieces)):
        with estimator.observe(inputs[piece], targets[piece], 1 / 11, whole=len(pieces) == 1):
            (cross_entropy(model(inputs[piece]), targets[piece], reduction="sum") / 11 * 4).backward()
    moments = estimator.moments(grad_scale=4.0)
    groups = torch.arange(11).split(list(pieces) if test_gradients == "micro_batch" else 1)
    expected = 0.0
    for group in groups:
        others = torch.tensor([i for i in range(11) if i not in group.tolist()], dtype=torch.int64)
        if len(others):
            expected += len(group) * float(vectors[group].mean(0) @ vectors[others].mean(0)) ** 2
    if len(groups) > 1:
        assert moments.sum_leave_one_out_sq == pytest.approx(expected, rel=1e-9)
        of_products = moments.statistics(unbiased=True).variance_inner_product
        assert of_products is not None and of_products >= 0
