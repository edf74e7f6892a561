"""The six held-out problems: data sets and models on which nothing of `steady` was tuned (docs/held_out.md).

Each data set takes `test` (`--dataset_args.test=true`): then the validation samples are those of the test set, which
is read once, when all runs are done. Else they are taken off the training set.
"""

import re
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models.resnet import BasicBlock

from benchmarks.cases import cifar10_npz
from data import DataSet, bits, next_token_loss
from text.windows import Windows

CACHE = Path(__file__).parent.parent / "out" / "held_out" / "data"
HELD_OUT = 2500
"""Samples that are taken off a training set."""


def _made_once(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, from a file where it was made before: hundreds of short runs read the same."""
    file = CACHE / f"{name}.pt"
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            torch.save(make(), Path(folder, "made.pt"))
            Path(folder, "made.pt").replace(file)
    return torch.load(file)


def _halved(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) → (N, C, H/2, W/2), the means of 2 × 2 pixels."""
    return avg_pool2d(images.float(), 2).round().byte()


def _split(train: TensorDataset, test_set: TensorDataset, test: bool) -> tuple[TensorDataset, TensorDataset]:
    """What trains, and what is evaluated on: the last samples of the training set, or the test set."""
    kept = TensorDataset(*(own[:-HELD_OUT] for own in train.tensors))
    return kept, test_set if test else TensorDataset(*(own[-HELD_OUT:] for own in train.tensors))


def small_cifar(data_dir: Path, test: bool = False) -> DataSet:
    """CIFAR-10 at 16 × 16 pixels, from `cifar10.npz` (benchmarks/cases.py)."""

    def make() -> list[tuple[Tensor, Tensor]]:
        whole = cifar10_npz(data_dir)
        return [(_halved(images), labels) for images, labels in (whole.train.tensors, whole.val.tensors)]

    halved = (TensorDataset(*tensors) for tensors in _made_once("cifar", make))
    return DataSet(*_split(*halved, test), 10, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))


def small_digits(data_dir: Path, test: bool = False) -> DataSet:
    """MNIST's images at 14 × 14 pixels between 0 and 1, to be drawn again: (N, 196), each its own target."""
    sets = (torchvision.datasets.MNIST(data_dir, train=is_train).data for is_train in (True, False))
    pixels = (_halved(images[:, None]).flatten(1).float() / 255 for images in sets)
    return DataSet(*_split(*(TensorDataset(own, own) for own in pixels), test), loss=drawn_again, num_outputs=196)


def drawn_again(logits: Tensor, pixels: Tensor) -> Tensor:
    """Cross entropy of the pixels, taken for probabilities, in nats a pixel (n,)."""
    return binary_cross_entropy_with_logits(logits, pixels, reduction="none").mean(1)


NOISE = 0.5
"""Standard deviation of what nobody can learn of `teacher`'s targets; its own is 1."""


def teacher(data_dir: Path, test: bool = False) -> DataSet:
    """20 numbers, and what a fixed random network makes of them, with noise: the least possible loss is NOISE²."""
    generator = torch.Generator().manual_seed(2402)
    x = torch.randn(70_000, 20, generator=generator)
    hidden = torch.tanh(x @ torch.randn(20, 40, generator=generator) / 2)
    y = hidden @ torch.randn(40, 1, generator=generator)
    y = (y - y.mean()) / y.std() + NOISE * torch.randn(70_000, 1, generator=generator)
    train, test_set = (TensorDataset(x[part], y[part]) for part in (slice(0, 65_000), slice(65_000, None)))
    return DataSet(*_split(train, test_set, test), loss=squared_error, num_outputs=1)


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def torch_sources(data_dir: Path, sequence_length: int = 32, test: bool = False) -> DataSet:
    """Bytes of PyTorch's own Python sources in windows of 32; files in a random order, by the file's name alone."""
    files = sorted(Path(torch.__file__).parent.rglob("*.py"))
    order = np.random.default_rng(11215).permutation(len(files))
    text = np.frombuffer(b"".join(files[i].read_bytes() for i in order)[:24_000_000], np.uint8)
    last = 1024 * (sequence_length + 1)
    parts = {"train": text[: -2 * last], "val": text[-last:] if test else text[-2 * last : -last]}
    windows = (Windows(tokens, sequence_length, 256) for tokens in parts.values())
    return DataSet(*windows, loss=next_token_loss, metrics={"bits_per_byte": bits}, num_outputs=256)


WORDS, VOCABULARY, PACKAGES = 48, 4096, 20


def packages(data_dir: Path, test: bool = False) -> DataSet:
    """48 neighbouring words of the standard library's sources, the commonest 4,095 by number and all others as 0: in
    which of its 20 largest packages do they stand? Windows in a random order."""
    x, y = _made_once("packages", _words_of_packages)
    train, test_set = (TensorDataset(x[part], y[part]) for part in (slice(None, -HELD_OUT), slice(-HELD_OUT, None)))
    metrics = {"accuracy": MulticlassAccuracy(PACKAGES, average="micro", validate_args=False)}
    loss = partial(cross_entropy, reduction="none")
    return DataSet(*_split(train, test_set, test), loss=loss, metrics=metrics, num_outputs=PACKAGES)


def _words_of_packages() -> tuple[Tensor, Tensor]:
    """Numbers of words, int64 (N, 48), and of their package (N,)."""
    library = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, list[str]] = {}
    for file in sorted(library.rglob("*.py")):
        package = file.relative_to(library).parts[0]
        if package not in ("site-packages", "dist-packages"):
            texts.setdefault(package, []).extend(re.findall(r"[A-Za-z_]\w+", file.read_text(errors="replace")))
    largest = sorted(texts, key=lambda name: (-len(texts[name]), name))[:PACKAGES]
    common = Counter(word for name in largest for word in texts[name]).most_common(VOCABULARY - 1)
    numbers = {word: i for i, (word, _) in enumerate(common, start=1)}
    rows, labels = [], []
    for label, name in enumerate(sorted(largest)):
        words = [numbers.get(word, 0) for word in texts[name]]
        own = [words[at : at + WORDS] for at in range(0, len(words) - WORDS, WORDS)]
        rows += own
        labels += [label] * len(own)
    order = np.random.default_rng(2).permutation(len(rows))
    return torch.tensor(rows)[order], torch.tensor(labels)[order]


class BagOfWords(nn.Module):
    """The mean of the words' vectors, and a hidden layer."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 64)
        self.rest = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_outputs))

    def forward(self, words: Tensor) -> Tensor:
        return self.rest(self.words(words).mean(1))


def resnet14(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Two blocks each of 8, 16 and 32 channels, with GroupNorm."""

    def norm(channels: int) -> nn.Module:
        return nn.GroupNorm(4, channels)

    def block(inputs: int, outputs: int, stride: int) -> nn.Module:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))
        return BasicBlock(inputs, outputs, stride, None if inputs == outputs else shortcut, norm_layer=norm)

    return nn.Sequential(
        *(nn.Conv2d(input_shape[0], 8, 3, padding=1, bias=False), norm(8), nn.ReLU()),
        *(block(8, 8, 1), block(8, 8, 1), block(8, 16, 2), block(16, 16, 1), block(16, 32, 2), block(32, 32, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, num_outputs)),
    )


def cnn_batch_norm(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """Convolutions of 16, 32 and 64 channels with BatchNorm, pooled to 2 × 2, and a hidden layer."""
    widths = (input_shape[0], 16, 32, 64)
    layers = [
        layer
        for inputs, outputs in zip(widths, widths[1:])
        for layer in (nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, num_outputs))


def student(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    layers = nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, num_outputs)
    return nn.Sequential(*layers)


def autoencoder(input_shape: tuple[int, ...], num_outputs: int) -> nn.Module:
    """196 pixels through 16 numbers."""
    layers = nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, num_outputs)
    return nn.Sequential(*layers)
