"""Models by name: sizes, stems, refusals."""

import math

import pytest
import torch
from torch import nn

import models
from options.errors import UsageError
from options.schema import Config


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "name, shape, parameters",
    [("logistic", (1, 28, 28), 7850), ("cnn", (1, 28, 28), 28_938), ("cnn", (3, 32, 32), 541_094)],
)
def test_parameter_counts(name, shape, parameters):
    assert count(models.build(name, shape, 10)) == parameters


@pytest.mark.parametrize("shape, classes", [((1, 8, 8), 10), ((3, 40, 24), 7), ((1, 28, 28), 3)])
@pytest.mark.parametrize("name", ["logistic", "cnn"])
def test_any_image_shape(name, shape, classes):
    assert models.build(name, shape, classes)(torch.zeros(2, *shape)).shape == (2, classes)


def test_cifar_stem():
    small, large = models.build("resnet18", (3, 32, 32), 10), models.build("resnet18", (3, 224, 224), 10)
    assert small.conv1.kernel_size == (3, 3) and small.conv1.stride == (1, 1) and isinstance(small.maxpool, nn.Identity)
    assert large.conv1.kernel_size == (7, 7) and isinstance(large.maxpool, nn.MaxPool2d)
    assert count(small) == 11_173_962


@pytest.mark.parametrize("name", ["googlenet", "mobilenet_v2", "regnet_x_400mf", "shufflenet_v2_x0_5", "vit_b_16"])
def test_torchvision_models_without_auxiliary_heads(name):
    model = models.build(name, (1, 32, 32), 5)  # grey images, too
    assert model.train()(torch.rand(2, 1, 32, 32)).shape == (2, 5)


def no_module(image_shape, num_classes):
    return 5


def two_outputs(image_shape, num_classes):
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x.flatten(1)), 0

    return Net(math.prod(image_shape), num_classes)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("resnet19", (3, 32, 32), "did you mean 'resnet18'"),
        ("alexnet", (3, 32, 32), "does not work on images of 3×32×32"),
        ("vit_b_16", (3, 30, 30), "does not work on images"),
        ("vit_b_16", (3, 32, 48), "square"),
        ("maxvit_t", (3, 32, 32), "does not work on images"),
        ("torch.nn:Nothing", (3, 32, 32), "has no 'Nothing'"),
        ("torch.nn:", (3, 32, 32), "write package.module:name"),
        ("checks.test_models:no_module", (3, 32, 32), "it gives int, not torch.nn.Module"),
        ("checks.test_models:two_outputs", (3, 32, 32), "its output is tuple"),
        ("checks.test_models:wrong_output", (3, 32, 32), "gives an output of shape"),
    ],
)
def test_refused(name, shape, words):
    with pytest.raises(UsageError, match=words) as refused:
        models.build(name, shape, 10)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size, least", [(8, 2), (64, 1)])
def test_batch_norm_on_single_positions_needs_two_samples(size, least):
    model = models.build("resnet18", (3, size, size), 10)
    assert models.smallest_micro_batch(model, (3, size, size)) == least and model.training
    assert models.smallest_micro_batch(models.build("cnn", (3, size, size), 10), (3, size, size)) == 1


class LeNet(nn.Module):
    """Its maps become vectors by `view`, which channels last do not bear."""

    def __init__(self, image_shape, num_classes):
        super().__init__()
        self.maps, self.logits = nn.Conv2d(image_shape[0], 6, 5), nn.Linear(6 * 4 * 4, num_classes)

    def forward(self, x):
        return self.logits(torch.relu(self.maps(x)).view(-1, 6 * 4 * 4))


@pytest.mark.parametrize(
    "build, expected",
    [
        (models.cnn, torch.channels_last),
        (LeNet, torch.contiguous_format),
        (models.logistic, torch.contiguous_format),
        (lambda *of: nn.Sequential(models.cnn(*of), nn.GroupNorm(1, 10)), torch.contiguous_format),
        (lambda *of: nn.Sequential(nn.BatchNorm2d(3), models.cnn(*of)), torch.contiguous_format),
    ],
)
def test_order_in_memory(build, expected):
    """Chosen by what the model can have; all else of it is as before."""
    torch.manual_seed(0)
    model = build((3, 8, 8), 10).eval()
    before, state = {name: weight.clone() for name, weight in model.state_dict().items()}, torch.get_rng_state()
    assert models.choose_memory_format(model, (3, 8, 8)) == expected and not model.training
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(p.grad is None and (p.dim() != 4 or p.is_contiguous(memory_format=expected)) for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def wrong_output(image_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes + 1))


class TrainingHead(nn.Module):
    """A second head that is there in training only; and what a pass leaves behind."""

    def __init__(self, used: bool = True):
        super().__init__()
        self.body, self.head, self.second = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.used, self.calls = used, 0

    def forward(self, x):
        self.calls += 1
        x = self.body(x)
        return (self.head(x), self.second(x)) if self.training and self.used else self.head(x)


def loss_of_both(outputs, targets):
    outputs = sum(outputs) if isinstance(outputs, tuple) else outputs
    return nn.functional.cross_entropy(outputs, targets)


def test_unused_parameters_are_looked_for_in_training():
    inputs, targets, config = torch.randn(2, 6), torch.arange(2), Config(model="own:Net")
    model = TrainingHead().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.refuse_unused_parameters(model, loss_of_both, inputs, targets, config)
    assert model.calls == 0 and not model.training and not model.body.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match="does not use second.weight, second.bias"):
        models.refuse_unused_parameters(TrainingHead(used=False), loss_of_both, inputs, targets, config)


def test_a_loss_that_sums_is_refused():
    """The step would depend on how a batch is cut into micro-batches."""
    model, inputs, targets, config = nn.Linear(6, 3), torch.randn(2, 6), torch.arange(2), Config(loss="own:loss")
    for reduction in ("mean", "none"):
        models.refuse_loss(model, nn.CrossEntropyLoss(reduction=reduction), inputs, targets, config)
    with pytest.raises(UsageError, match="--loss=own:loss gives the sum of the samples' losses"):
        models.refuse_loss(model, nn.CrossEntropyLoss(reduction="sum"), inputs, targets, config)
