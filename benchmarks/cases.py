"""Models and data of the benchmarks, in the form in which main.py takes them (`--model=benchmarks.cases:…`)."""

import platform
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock

import models
from data import DataSet, load
from runs.log import versions

RESULTS = Path(__file__).parent / "results"


def random_mnist(data_dir: Path) -> DataSet:
    """Noise in MNIST's form."""
    return _random_images((1, 28, 28))


def random_cifar(data_dir: Path) -> DataSet:
    """Noise in CIFAR-10's form."""
    return _random_images((3, 32, 32))


def random_imagenet(data_dir: Path) -> DataSet:
    """Noise in the form of ImageNet's crops."""
    return _random_images((3, 224, 224), count=64)


def cifar10_npz(data_dir: Path) -> DataSet:
    """CIFAR-10 from `cifar10.npz`: x_train, y_train, x_test, y_test, images uint8 (N, 32, 32, 3)."""
    arrays = np.load(data_dir / "cifar10.npz")
    splits = (
        TensorDataset(
            torch.from_numpy(arrays[f"x_{name}"]).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(arrays[f"y_{name}"]),
        )
        for name in ("train", "test")
    )
    return DataSet(*splits, 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_and_flip=True)


def stdlib_short(data_dir: Path) -> DataSet:
    """The standard library's bytes in windows of 64; 1,024 of them validate, as all would take most of the time."""
    whole = load("stdlib", data_dir, sequence_length=64)
    tokens, width = whole.val.tokens, whole.val.width
    whole.val.tokens = np.concatenate([tokens[start : start + width] for start in _spread(len(tokens) - width, 1024)])
    return whole


def _spread(end: int, count: int) -> np.ndarray:
    """Whole numbers from 0 to `end`, equally far apart."""
    return np.linspace(0, end, count, dtype=int)


class Float32Muon(torch.optim.Muon):
    """torch's, which multiplies in bfloat16: for CPUs that have no instructions for it, and take a hundred times as
    long."""

    def step(self, closure: Callable | None = None):
        with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", _newton_schulz):
            return super().step(closure)


def _newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """(m, n) → (m, n), all of whose singular values are near 1 (https://kellerjordan.github.io/posts/muon)."""
    a, b, c = coefficients
    wide = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.T if matrix.size(0) > matrix.size(1) else wide


def _random_images(shape: tuple[int, int, int], count: int = 4096) -> DataSet:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)
    split = TensorDataset(images, torch.randint(10, (count,), generator=generator))
    return DataSet(split, split, num_classes=10)


class OutOfPlaceBlock(BasicBlock):
    """A ResNet block whose operations are not in place (Opacus) and whose activations are two modules (BackPACK)."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.second_relu(out + (x if self.downsample is None else self.downsample(x)))


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def resnet18_group_norm(image_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """ResNet-18 for small images (3×3 stem) with GroupNorm (32 groups) in the place of BatchNorm."""
    return _small_stem(torchvision.models.resnet18(num_classes=num_classes, norm_layer=group_norm))


def resnet18_batch_norm(image_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """ResNet-18 for small images (3×3 stem)."""
    return _small_stem(torchvision.models.resnet18(num_classes=num_classes))


class SmallResNet(nn.Sequential):
    """ResNet-8: three blocks of 16, 32 and 64 channels (about 78,000 parameters on colour images)."""

    def __init__(self, channels: int, num_classes: int, norm: Callable[[int], nn.Module]):
        def block(inputs: int, outputs: int, stride: int) -> BasicBlock:
            shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
            return BasicBlock(inputs, outputs, stride, None if inputs == outputs else shortcut, norm_layer=norm)

        super().__init__(
            *(nn.Conv2d(channels, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()),
            *(block(16, 16, 1), block(16, 32, 2), block(32, 64, 2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes)),
        )


def mlp(image_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """Pixels, 256, 256, classes."""
    pixels = image_shape[0] * image_shape[1] * image_shape[2]
    layers = (
        nn.Flatten(),
        nn.Linear(pixels, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, num_classes),
    )
    return nn.Sequential(*layers)


def small_resnet_batch_norm(image_shape: models.ImageShape, num_classes: int) -> nn.Module:
    return SmallResNet(image_shape[0], num_classes, nn.BatchNorm2d)


def small_resnet_group_norm(image_shape: models.ImageShape, num_classes: int) -> nn.Module:
    return SmallResNet(image_shape[0], num_classes, lambda channels: nn.GroupNorm(8, channels))


def small_cnn_batch_norm(image_shape: models.ImageShape, num_classes: int) -> nn.Module:
    """Three convolutions of 16, 32 and 64 channels, each with BatchNorm and pooled, and a linear layer."""
    widths = (image_shape[0], 16, 32, 64)
    layers = [
        layer
        for inputs, outputs in zip(widths, widths[1:])
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
    ]
    features = widths[-1] * (image_shape[1] // 8) * (image_shape[2] // 8)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, num_classes))


def without_in_place(model: nn.Module) -> nn.Module:
    """The same model for libraries that hook modules."""
    for module in list(model.modules()):
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, BasicBlock):
            module.__class__ = OutOfPlaceBlock
            module.second_relu = nn.ReLU()
    return model


def for_comparison(model: nn.Module) -> nn.Module:
    """The same model where passes must agree: without dropout and stochastic depth, and with gradients everywhere.

    (torchvision's vision transformers start with a head of zeros, before which all gradients vanish.)
    """
    for module in model.modules():
        if isinstance(module, (nn.modules.dropout._DropoutNd, torchvision.ops.StochasticDepth)):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        if isinstance(module, nn.Linear) and not module.weight.any():
            nn.init.normal_(module.weight, std=0.02)
    return model


def _small_stem(model: torchvision.models.ResNet) -> nn.Module:
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def provenance() -> str:
    """Machine, versions and date of a measurement, in one line."""
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        machine = f"{torch.get_num_threads()} threads of {model[1] if model else platform.machine()}"
    software = ", ".join(f"{name} {version}" for name, version in versions().items())
    return f"{machine}; {software}; {date.today().isoformat()}"
