"""Data sets by name or import path: what a data set is, and where the built-in ones come from."""

import contextlib
import inspect
import io
import math
import os
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
from torchvision.datasets.utils import check_integrity, extract_archive

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


def _cifar_like(kind: type, num_classes: int, mean: tuple, std: tuple, data_dir: Path) -> DataSet:
    train, val = (kind(data_dir, train=is_train) for is_train in (True, False))
    splits = (_tensors(split.data.transpose(0, 3, 1, 2), split.targets) for split in (train, val))
    return DataSet(*splits, num_classes=num_classes, mean=mean, std=std, crop_and_flip=True)


def _tensors(images, labels) -> TensorDataset:
    return TensorDataset(torch.as_tensor(images).contiguous(), torch.as_tensor(labels, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class _Archive:
    """An official file of a data set.

    Args:
        name: of the file.
        md5: its official check sum.
        place: where torchvision keeps it and unpacks it, in the folder of the data sets.
        content: what it holds, by path in that folder, and how to tell that this is whole.
    """

    name: str
    md5: str
    place: str
    content: dict[str, Callable[[Path], bool]]

    def candidates(self, data_dir: Path) -> list[Path]:
        """Files of this name: in `data_dir`, or where torchvision leaves them."""
        places = dict.fromkeys((data_dir, data_dir / self.place, (data_dir / self.place).parent))
        return [folder / self.name for folder in places if (folder / self.name).is_file()]

    def whole(self, data_dir: Path) -> Path | None:
        """The file of this name with the official check sum."""
        return next((path for path in self.candidates(data_dir) if check_integrity(path, self.md5)), None)

    def problem(self, data_dir: Path) -> str:
        """What is missing or damaged, "" where the file or all of its content is whole."""
        paths = {data_dir / path: is_whole for path, is_whole in self.content.items()}
        damaged = [path for path, is_whole in paths.items() if path.is_file() and not is_whole(path)]
        if self.whole(data_dir) or not (damaged or any(not path.is_file() for path in paths)):
            return ""
        found = [f"{path} is damaged" for path in damaged]
        found += [f"{path} is partial or damaged: not the official MD5" for path in self.candidates(data_dir)]
        return ", ".join(found) or f"{self.name} is missing"


@dataclass(frozen=True)
class _Downloadable:
    """A data set of torchvision: its official files, how to fetch and unpack them, and how to read what is in them."""

    kind: type
    read: Callable[[Path], DataSet]

    def __call__(self, data_dir: Path) -> DataSet:
        return self.read(data_dir)

    def is_readable(self, data_dir: Path) -> bool:
        try:
            self.read(data_dir)
        except Exception:  # missing, truncated and overwritten files raise whatever they run into
            return False
        return True

    def archives(self) -> list[_Archive]:
        """The official files, by what torchvision says of them."""
        kind = self.kind
        if hasattr(kind, "resources"):  # MNIST's kind: one file in each
            place = f"{kind.__name__}/raw"
            return [
                _Archive(name, md5, place, {f"{place}/{name.removesuffix('.gz')}": _is_whole_idx})
                for name, md5 in kind.resources
            ]
        files = dict([*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])])
        content = {f"{kind.base_folder}/{name}": partial(check_integrity, md5=md5) for name, md5 in files.items()}
        return [_Archive(kind.filename, kind.tgz_md5, ".", content)]

    def problems(self, data_dir: Path) -> dict[str, str]:
        """The official files that are needed, and what is wrong with what is there instead."""
        found = {archive.name: archive.problem(data_dir) for archive in self.archives()}
        lacking = {name: problem for name, problem in found.items() if problem}
        return lacking or dict.fromkeys(found, "what is there does not belong together")

    def unpack(self, data_dir: Path) -> None:
        """Unpack the official files that are whole."""
        whole = {archive: path for archive in self.archives() if (path := archive.whole(data_dir))}
        if not whole:
            return
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=data_dir) as temporary:
            for archive, path in whole.items():
                (folder := Path(temporary, archive.place)).mkdir(parents=True, exist_ok=True)
                extract_archive(path, folder)
            _move_files(Path(temporary), data_dir)

    def download(self, data_dir: Path) -> None:
        """Fetch into a folder beside and move the files when they are complete: no half-made folder stays behind."""
        made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
                self._link_what_is_there(data_dir, Path(temporary))
                # torchvision prints every mirror that it tries; one clear line at the end says more.
                with contextlib.redirect_stdout(io.StringIO()):
                    self.kind(temporary, train=True, download=True)
                self.read(Path(temporary))
                _move_files(Path(temporary), data_dir)
        except BaseException:
            with contextlib.suppress(OSError):  # somebody else may have put something there
                for folder in made:
                    folder.rmdir()
            raise

    def _link_what_is_there(self, data_dir: Path, folder: Path) -> None:
        """torchvision does not fetch what it finds whole."""
        for archive in self.archives():
            if path := archive.whole(data_dir):
                (folder / archive.place).mkdir(parents=True, exist_ok=True)
                (folder / archive.place / archive.name).symlink_to(path.absolute())


def _is_whole_idx(path: Path) -> bool:
    """A file of MNIST's kind: four bytes, of which the last is the number of dimensions, their sizes, the values."""
    with open(path, "rb") as file:
        dimensions = int.from_bytes(file.read(4), "big") & 0xFF
        sizes = [int.from_bytes(file.read(4), "big") for _ in range(dimensions)]
    return 0 < dimensions <= 3 and path.stat().st_size == 4 + 4 * dimensions + math.prod(sizes)


def _move_files(source: Path, target: Path) -> None:
    """Move every file below `source` to the same place below `target`, over the one that is there; no links."""
    for path in [path for path in source.rglob("*") if path.is_file() and not path.is_symlink()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _downloadable(kind: type, read, *arguments) -> _Downloadable:
    return _Downloadable(kind, lambda data_dir: read(kind, *arguments, data_dir))


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
DATASETS: dict[str, Callable[..., DataSet]] = {
    "digits": digits,
    "mnist": _downloadable(_sets.MNIST, _mnist_like),
    "fashion_mnist": _downloadable(_sets.FashionMNIST, _mnist_like),
    "cifar10": _downloadable(_sets.CIFAR10, _cifar_like, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _downloadable(_sets.CIFAR100, _cifar_like, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": _imagenet,
    "tokens": _tokens,
    "stdlib": _stdlib,
}


def prepare(name: str, data_dir: Path) -> None:
    """Unpack the official files that are there, download what is missing or damaged; to be called by one process.

    Raises:
        UsageError: unknown name, or the data can be neither read nor downloaded.
    """
    source = _find(name)
    if not isinstance(source, _Downloadable):
        return
    if source.is_readable(data_dir):
        return
    try:
        source.unpack(data_dir)
    except OSError as error:
        raise UsageError(
            f"--data_dir={data_dir}: the official files of {name} are there, but cannot be unpacked "
            f"({in_one_line(error)}): make room and allow writing there, or unpack them in another folder"
        ) from None
    if source.is_readable(data_dir):
        return
    problems = source.problems(data_dir)
    found = "; ".join(dict.fromkeys(problems.values()))
    try:
        source.download(data_dir)
    except Exception as error:  # whatever went wrong on the net or on the disk, the remedy is the same
        raise UsageError(
            f"--data_dir={data_dir} has no usable copy of {name} ({found}) and none could be downloaded "
            f"({in_one_line(error)}): put {', '.join(problems)} there, or connect to the network"
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
