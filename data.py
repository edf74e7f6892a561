"""Data sets by name or import path: what a data set is, and where the built-in ones come from."""

import contextlib
import inspect
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets.utils import check_integrity

from imagenet.sources import load as load_imagenet
from options.errors import UsageError, in_one_line
from options.names import import_object, nearest, unknown
from text.windows import Text, Windows, read_tokens, standard_library

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) of n samples → their losses (n,), or the mean of these ()."""


@dataclass
class DataSet:
    """Training and validation samples, and what a model is to learn from them: its loss and its metrics.

    A data set of one's own is a function `(data_dir: Path) -> DataSet`, named by `--dataset=package.module:function`.
    With `num_classes` it is a set of images to be classified. Else it needs a `loss`, and inputs and targets are
    tensors or nested tuples, lists and dicts of tensors. Everywhere, inputs that are uint8 (C, H, W) are images and
    reach the model normalised; floating-point numbers come in the training's precision, whole numbers as they are.

    Args:
        train: training samples. `TensorDataset(inputs, targets)` is held in the device's memory; images are uint8
            (N, C, H, W), their labels whole (N,). Any other map-style data set, in which `train[i]` is an input and
            its target, of one shape each, is read while training goes on, by `num_workers` processes. Where it has
            `gather(indices)`, which gives inputs and targets of many samples at once, that is used instead.
        val: validation samples, likewise.
        num_classes: labels are 0 … num_classes − 1.
        mean: per-channel mean of the pixels scaled to [0, 1], subtracted from them.
        std: per-channel standard deviation of the pixels scaled to [0, 1], by which they are divided.
        crop_and_flip: augment the training images: zero-padded by 4 and cropped at random, flipped at random.
        loss: default: cross entropy.
        metrics: what is measured on the validation samples beside the loss: by name, a `torchmetrics.Metric` of
            outputs and targets, or a function of the mean loss, such as `math.exp` for a perplexity. The first one
            says which checkpoint is the best; where there is none, the loss does. Default: accuracy.
        train_metrics: what is measured on the training samples beside the loss: by name, a function of outputs and
            targets → a number for each sample (n,). Default: accuracy.
        num_outputs: what the model's maker is told beside the shape of an input; default: num_classes.
        defaults: values of max_samples and validation_samples that suit it better than 30 epochs and all.
        largest_micro_batch: max_micro_batch_size=auto need not look at larger ones [samples].
    """

    train: Dataset
    val: Dataset
    num_classes: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_and_flip: bool = False
    loss: Loss | None = None
    metrics: dict[str, Metric | Callable[[float], float]] | None = None
    train_metrics: dict[str, Callable[[Any, Any], Tensor]] | None = None
    num_outputs: int | None = None
    defaults: dict[str, Any] = field(default_factory=dict)
    largest_micro_batch: int | None = None
    example: Any = field(init=False)
    """An input as `train[0]` has it."""

    def __post_init__(self):
        for name in ("train", "val"):
            samples = getattr(self, name)
            if not len(samples):
                raise ValueError(f"{name} has no samples")
            if isinstance(samples, TensorDataset):
                setattr(self, name, self._checked(name, samples))
        self.example = self.train[0][0]
        if self.num_classes is None:
            self._of_another_task()
        else:
            self._of_classification()
        self.num_outputs = self.num_outputs or self.num_classes

    def _of_classification(self) -> None:
        if not is_image(self.example):
            raise ValueError(f"train[0] needs an image, uint8 (C, H, W), not {described(self.example)}")
        self.loss = self.loss or classification_loss
        if self.metrics is None:
            # By default the metric looks at what it is given, and the host waits.
            unchecked = {"average": "micro", "validate_args": False}
            self.metrics = {"accuracy": MulticlassAccuracy(self.num_classes, **unchecked)}
            if self.num_classes >= 100:
                self.metrics["top5_accuracy"] = MulticlassAccuracy(self.num_classes, top_k=5, **unchecked)
        if self.train_metrics is None:
            self.train_metrics = {"accuracy": lambda logits, labels: logits.argmax(1) == labels}

    def _of_another_task(self) -> None:
        if self.loss is None:
            raise ValueError("it needs num_classes, for images to be classified, or a loss")
        if self.crop_and_flip and not is_image(self.example):
            raise ValueError(f"crop_and_flip needs images, uint8 (C, H, W), not {described(self.example)}")
        self.metrics, self.train_metrics = self.metrics or {}, self.train_metrics or {}

    def _checked(self, name: str, samples: TensorDataset) -> TensorDataset:
        if len(samples.tensors) != 2:
            raise ValueError(f"{name} needs two tensors, inputs and targets, not {len(samples.tensors)}")
        if self.num_classes is None:
            return samples
        images, labels = samples.tensors
        if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels):
            raise ValueError(f"{name} needs uint8 images (N, C, H, W) and N labels, not {described(images)}")
        if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"{name} needs labels of whole numbers (N,), not {described(labels)}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(f"{name} has labels outside 0 … {self.num_classes - 1}")
        return TensorDataset(images, labels.long())

    @property
    def at_hand(self) -> bool:
        """Samples are had by their numbers, without anybody reading ahead."""
        return all(isinstance(s, TensorDataset) or hasattr(s, "gather") for s in (self.train, self.val))

    @property
    def input_shape(self) -> Any:
        """Of an input without the batch: a tuple of numbers, (channels, height, width) of an image; nested as it is."""
        return tree_map(lambda tensor: tuple(torch.as_tensor(tensor).shape), self.example)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def is_image(sample: Any) -> bool:
    return isinstance(sample, Tensor) and sample.dtype == torch.uint8 and sample.dim() == 3


def described(image) -> str:
    """Type and shape, for a message."""
    return f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__


def digits(data_dir: Path) -> DataSet:
    """The 1,797 handwritten digits (8×8) that scikit-learn carries, split 80/20, stratified, always the same split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images * (255 / 16)).round().astype(np.uint8).reshape(-1, 1, 8, 8)
    train_x, val_x, train_y, val_y = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return DataSet(_tensors(train_x, train_y), _tensors(val_x, val_y), num_classes=10)


def _mnist_like(kind: type, data_dir: Path) -> DataSet:
    train, val = (kind(data_dir, train=is_train) for is_train in (True, False))
    return DataSet(*(_tensors(split.data.unsqueeze(1), split.targets) for split in (train, val)), num_classes=10)


def _cifar_like(num_classes: int, mean: tuple, std: tuple, kind: type, data_dir: Path) -> DataSet:
    train, val = (kind(data_dir, train=is_train) for is_train in (True, False))
    splits = (_tensors(split.data.transpose(0, 3, 1, 2), split.targets) for split in (train, val))
    return DataSet(*splits, num_classes=num_classes, mean=mean, std=std, crop_and_flip=True)


def _tensors(images, labels) -> TensorDataset:
    return TensorDataset(torch.as_tensor(images).contiguous(), torch.as_tensor(labels, dtype=torch.int64))


@dataclass(frozen=True)
class _Downloadable:
    """A data set of torchvision, which fetches, checks and unpacks its official files."""

    kind: type
    read: Callable[[type, Path], DataSet]

    def __call__(self, data_dir: Path) -> DataSet:
        return self.read(self.kind, data_dir)

    @property
    def place(self) -> Path:
        """The folder within `data_dir` in which torchvision keeps the official files."""
        return Path(self.kind.__name__, "raw") if hasattr(self.kind, "resources") else Path()

    def archives(self, data_dir: Path) -> dict[str, Path | None]:
        """The official files: where each lies in `data_dir` with its official check sum, None: nowhere."""
        kind = self.kind
        sums = dict(kind.resources if hasattr(kind, "resources") else [(kind.filename, kind.tgz_md5)])
        found: dict[str, Path | None] = dict.fromkeys(sums)
        for name, folder in itertools.product(sums, (data_dir, data_dir / self.place)):
            if check_integrity(folder / name, sums[name]):
                found[name] = folder / name
        return found

    def fetch(self, data_dir: Path) -> None:
        """Make all files in a folder beside, and move them when they are complete: none is ever there by half."""
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
            (folder := Path(temporary, self.place)).mkdir(parents=True, exist_ok=True)
            for name, path in self.archives(data_dir).items():
                if path:  # torchvision does not download what it finds whole
                    (folder / name).symlink_to(path.absolute())
            self.kind(temporary, download=True)
            self(Path(temporary))
            for path in [path for path in Path(temporary).rglob("*") if path.is_file() and not path.is_symlink()]:
                place = data_dir / path.relative_to(temporary)
                place.parent.mkdir(parents=True, exist_ok=True)
                path.replace(place)


def _imagenet(data_dir: Path) -> DataSet:
    train, val, num_classes = load_imagenet(data_dir)
    return DataSet(train, val, num_classes, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def _text(text: Text, sequence_length: int) -> DataSet:
    """A sample predicts `sequence_length` tokens; its loss is the mean over them, in nats a token."""
    windows = [Windows(tokens, sequence_length, text.vocab_size) for tokens in (text.train, text.val)]
    metrics = {"perplexity": perplexity}
    if text.is_bytes:
        metrics = {"bits_per_byte": bits, **metrics}
    return DataSet(
        *windows,
        loss=next_token_loss,
        metrics=metrics,
        num_outputs=text.vocab_size,
        largest_micro_batch=max(1, 2**13 // sequence_length),
        defaults={"max_samples": len(windows[0])},
    )


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each sequence, the mean over its tokens: logits (n, T, V), targets (n, T) → (n,), in nats."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


def perplexity(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def bits(nats: float) -> float:
    return nats / math.log(2)


def _tokens(data_dir: Path, sequence_length: int = 256, vocab_size: int | None = None) -> DataSet:
    return _text(read_tokens(data_dir, vocab_size), sequence_length)


def _stdlib(data_dir: Path, sequence_length: int = 256) -> DataSet:
    whole = _text(standard_library(), sequence_length)
    # Some minutes on two cores, few of them for evaluations.
    whole.defaults = {"max_samples": min(2**13, len(whole.train)), "validation_samples": 2**11}
    return whole


_sets = torchvision.datasets
_cifar10 = partial(_cifar_like, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_cifar100 = partial(_cifar_like, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
DATASETS: dict[str, Callable[..., DataSet]] = {
    "digits": digits,
    "mnist": _Downloadable(_sets.MNIST, _mnist_like),
    "fashion_mnist": _Downloadable(_sets.FashionMNIST, _mnist_like),
    "cifar10": _Downloadable(_sets.CIFAR10, _cifar10),
    "cifar100": _Downloadable(_sets.CIFAR100, _cifar100),
    "imagenet": _imagenet,
    "tokens": _tokens,
    "stdlib": _stdlib,
}


def prepare(name: str, data_dir: Path) -> None:
    """Unpack the official files that are there, download those that are missing or damaged; for one process to call.

    Raises:
        UsageError: unknown name, or the data can be neither read nor made.
    """
    source = _find(name)
    if not isinstance(source, _Downloadable):
        return
    with contextlib.suppress(Exception):  # missing, truncated and overwritten files raise whatever they run into
        source(data_dir)
        return
    try:
        source.fetch(data_dir)
    except Exception as error:  # whatever went wrong on the net or on the disk
        lacking = [file for file, path in source.archives(data_dir).items() if not path]
        remedy = f"put whole copies of {', '.join(lacking)} there, or connect to the network"
        if not lacking:
            remedy = "its official files are there: make room and allow writing, or take another folder"
        raise UsageError(
            f"--data_dir={data_dir} has no usable copy of {name} ({in_one_line(error)}): {remedy}"
        ) from None


def load(name: str, data_dir: Path, **options) -> DataSet:
    """Read the data set; `prepare` has seen to it that the files are there.

    Args:
        options: what the data set takes beside its folder.

    Raises:
        UsageError: the files cannot be read, the user's function does not keep the contract, or an option is given that
            the data set does not take.
    """
    source = _find(name)
    taken = inspect.signature(source).parameters
    for option in options:
        if option not in list(taken)[1:]:
            raise UsageError(
                f"--dataset_args.{option}: {name} takes no '{option}'{nearest(option, list(taken)[1:])}: leave it out"
            )
    try:
        data_set = source(data_dir, **options)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--dataset={name} with --data_dir={data_dir} cannot be read: {in_one_line(error)}: "
            "check the files there" + (" and the function (docs/extending.md)" if ":" in name else "")
        ) from None
    if not isinstance(data_set, DataSet):
        raise UsageError(f"--dataset={name} must return a data.DataSet, not {type(data_set).__name__}")
    return data_set


def _find(name: str) -> Callable[..., DataSet]:
    if ":" in name:
        return import_object("dataset", name)
    if name not in DATASETS:
        raise UsageError(unknown("dataset", name))
    return DATASETS[name]
