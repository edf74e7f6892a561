"""Data sets, augmentation, and the sample stream.

Order: position p = 0, 1, 2, … of a run is sample `perm(seed, epoch)[p % N]` of epoch p // N. A batch is a range of
positions, so every sample is used exactly once an epoch whatever the batch sizes were, on any number of ranks.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from batching import positions_of_rank
from config import UsageError, import_object, nearest


@dataclass
class DataSet:
    """A classification data set.

    A data set of one's own is a function `(data_dir: Path) -> DataSet`, named by `--dataset=package.module:function`.

    Args:
        train: training samples: `TensorDataset(images, labels)` with images uint8 (N, C, H, W) and labels int64 (N,),
            held in the device's memory.
        val: validation samples, likewise.
        num_classes: labels are 0 … num_classes − 1.
        mean: per-channel mean of the pixels scaled to [0, 1], subtracted from them.
        std: per-channel standard deviation of the pixels scaled to [0, 1], by which they are divided.
        crop_and_flip: augment the training images: zero-padded by 4 and cropped at random, flipped at random.
    """

    train: Dataset
    val: Dataset
    num_classes: int
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    crop_and_flip: bool = False

    def __post_init__(self):
        for name in ("train", "val"):
            images, labels = getattr(self, name).tensors
            if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != len(labels) or not len(images):
                raise ValueError(
                    f"{name} needs uint8 images (N, C, H, W) and N labels, not {images.dtype} {tuple(images.shape)}"
                )
            if labels.min() < 0 or labels.max() >= self.num_classes:
                raise ValueError(f"{name} has labels outside 0 … {self.num_classes - 1}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return tuple(self.train[0][0].shape)


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


@dataclass(frozen=True)
class _Downloadable:
    """A data set of torchvision: how to fetch it and how to read it."""

    kind: type
    read: Callable[[Path], DataSet]

    def __call__(self, data_dir: Path) -> DataSet:
        return self.read(data_dir)

    def problem(self, data_dir: Path) -> str:
        """Why the files cannot be used; empty where they can."""
        try:
            self.read(data_dir)
        except Exception as error:  # missing, truncated and overwritten files raise whatever they run into
            return _words(error)
        return ""

    def download(self, data_dir: Path) -> None:
        """Fetch into a folder beside and move the files when they are complete: no half-made folder stays behind."""
        made = [folder for folder in (data_dir, *data_dir.parents) if not folder.exists()]
        data_dir.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as temporary:
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


def _move_files(source: Path, target: Path) -> None:
    """Move every file below `source` to the same place below `target`, over the one that is there."""
    for path in [path for path in source.rglob("*") if path.is_file()]:
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _downloadable(kind: type, read, *arguments) -> _Downloadable:
    return _Downloadable(kind, lambda data_dir: read(kind, *arguments, data_dir))


_sets = torchvision.datasets
DATASETS: dict[str, Callable[[Path], DataSet]] = {
    "digits": digits,
    "mnist": _downloadable(_sets.MNIST, _mnist_like),
    "fashion_mnist": _downloadable(_sets.FashionMNIST, _mnist_like),
    "cifar10": _downloadable(_sets.CIFAR10, _cifar_like, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _downloadable(_sets.CIFAR100, _cifar_like, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def prepare(name: str, data_dir: Path) -> None:
    """Download what is missing or damaged; to be called by one process.

    Raises:
        UsageError: unknown name, or the data can be neither read nor downloaded.
    """
    source = _find(name)
    if not isinstance(source, _Downloadable):
        return
    problem = source.problem(data_dir)
    if not problem:
        return
    try:
        source.download(data_dir)
    except Exception as error:  # whatever went wrong on the net or on the disk, the remedy is the same
        raise UsageError(
            f"--data_dir={data_dir} has no usable copy of {name} ({problem}) and none could be downloaded "
            f"({_words(error)}): put the official files there, or connect to the network"
        ) from None


def load(name: str, data_dir: Path) -> DataSet:
    """Read the data set into memory; `prepare` has seen to it that the files are there.

    Raises:
        UsageError: the files cannot be read, or the user's function does not keep the contract.
    """
    source = _find(name)
    try:
        data_set = source(data_dir)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"--dataset={name} with --data_dir={data_dir} cannot be read: {_words(error)}: "
            "check the files there" + (" and the function (README.md, 'Your own data set')" if ":" in name else "")
        ) from None
    if not isinstance(data_set, DataSet):
        raise UsageError(f"--dataset={name} must return a data.DataSet, not {type(data_set).__name__}")
    return data_set


def _find(name: str) -> Callable[[Path], DataSet]:
    if ":" in name:
        return import_object("dataset", name)
    if name not in DATASETS:
        raise UsageError(f"--dataset={name} is unknown{nearest(name, list(DATASETS))} (known: {', '.join(DATASETS)})")
    return DATASETS[name]


def _words(error: Exception) -> str:
    """An error in one line."""
    words = " ".join(str(error).split()).replace(". You can use download=True to download it", "")
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def position_hash(positions: Tensor, seed: int) -> Tensor:
    """63 random bits for every position: SplitMix64's finaliser (Steele, Lea, Flood, OOPSLA 2014) of seed and position.

    Args:
        positions: int64, any shape.

    Returns:
        int64 ≥ 0, the same shape. Integer arithmetic only: the same on every device.
    """
    z = positions * -7046029254386353131 + (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**63
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685
    return (z ^ _shift_right(z, 31)) & (2**63 - 1)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own keeps the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def crop_and_flip(images: Tensor, positions: Tensor, seed: int, padding: int = 4) -> Tensor:
    """Zero-pad, crop back at a random place, and flip half of the images; what is drawn depends on the position alone.

    Args:
        images: (N, C, H, W), any dtype.
        positions: (N,) int64, the images' positions in the run.
    """
    n, _, height, width = images.shape
    bits = position_hash(positions, seed)
    choices = 2 * padding + 1
    top, left, flip = bits % choices, bits // choices % choices, bits // choices**2 % 2
    rows = top[:, None] + torch.arange(height, device=images.device)  # n×h
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None] == 1, columns.flip(0), columns)  # n×w
    padded = torch.nn.functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    sample = torch.arange(n, device=images.device)
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Normalise:
    """uint8 pixels → (pixel/255 − mean)/std in the training's dtype, on the device."""

    def __init__(self, data_set: DataSet, device: torch.device, dtype: torch.dtype):
        self.dtype = dtype
        self.mean, self.std = (
            torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
            for values in (data_set.mean, data_set.std)
        )

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.dtype) / 255 - self.mean) / self.std


class SampleOrder:
    """Which sample stands at which position: a new permutation every epoch, the same for every world size."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool, device: torch.device | str = "cpu"):
        self.num_samples, self.device = num_samples, device

        def permutation(epoch: int) -> Tensor:
            if not shuffle:
                return torch.arange(num_samples, device=device)
            generator = torch.Generator().manual_seed(int(position_hash(torch.tensor(epoch), seed + 1)))
            return torch.randperm(num_samples, generator=generator).to(device)

        # Two: a batch that crosses from one epoch to the next asks for both.
        self._permutation = lru_cache(maxsize=2)(permutation)

    def samples(self, positions: range) -> Tensor:
        """The samples at these positions: int64 (len(positions),)."""
        parts, n, p = [], self.num_samples, positions.start
        while p < positions.stop:
            epoch = p // n
            end = min(positions.stop, (epoch + 1) * n)
            parts.append(self._permutation(epoch)[p - epoch * n : end - epoch * n : positions.step])
            p += len(range(p, end, positions.step)) * positions.step
        return torch.cat(parts) if len(parts) != 1 else parts[0]


class InMemoryStream:
    """Micro-batches of exact size from a data set in the device's memory; any position at any time, nothing rebuilt."""

    def __init__(self, data_set: DataSet, seed: int, shuffle: bool, device: torch.device, dtype: torch.dtype):
        self.images, self.labels = (tensor.to(device) for tensor in data_set.train.tensors)
        self.val_images, self.val_labels = (tensor.to(device) for tensor in data_set.val.tensors)
        self.order = SampleOrder(len(self.images), seed, shuffle, device)
        self.normalise = Normalise(data_set, device, dtype)
        self.augment, self.seed = data_set.crop_and_flip, seed

    def take(self, micro_batches: list[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches at these positions: inputs (n, C, H, W), targets (n,)."""
        for positions in micro_batches:
            samples = self.order.samples(positions)
            images = self.images[samples]
            if self.augment:
                where = torch.arange(positions.start, positions.stop, positions.step, device=images.device)
                images = crop_and_flip(images, where, self.seed)
            yield self.normalise(images), self.labels[samples]

    def validation(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the validation samples: over all ranks, each exactly once."""
        own = positions_of_rank(0, len(self.val_images), rank, world_size)
        for cut in range(0, len(own), micro_batch_size):
            part = own[cut : cut + micro_batch_size]
            index = slice(part.start, part.stop, part.step)
            yield self.normalise(self.val_images[index]), self.val_labels[index]
