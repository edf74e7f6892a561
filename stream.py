"""The sample stream: which sample stands at which position, and micro-batches of exactly the size that is asked for.

Order: position p = 0, 1, 2, … of a run is sample `perm(seed, epoch)[p % N]` of epoch p // N. A batch is a range of
positions, so every sample is used exactly once an epoch whatever the batch sizes were, on any number of ranks. What is
drawn at random for a sample depends on its position alone.

`InMemoryStream` and `LoadedStream` give the same micro-batches; both take up at any position.
"""

import contextlib
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from batching import positions_of_rank
from config import RunError, in_one_line
from data import DataSet, described
from interrupts import heed_the_parent_alone

CHUNK = 32
"""Samples that a worker process reads at a time."""


def build(
    data_set: DataSet,
    seed: int,
    shuffle: bool,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int = 0,
    batch_ahead: int = 2,
) -> "InMemoryStream | LoadedStream":
    """The stream of a data set: on the device where its samples are in memory, else by worker processes."""
    if data_set.in_memory:
        return InMemoryStream(data_set, seed, shuffle, device, dtype)
    return LoadedStream(data_set, seed, shuffle, device, dtype, num_workers, batch_ahead)


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
        return images.to(self.dtype).div_(255).sub_(self.mean).div_(self.std)


class SampleOrder:
    """Which sample stands at which position: a new permutation every epoch, the same for every world size."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool, device: torch.device | str = "cpu"):
        self.num_samples, self.device = num_samples, device

        def permutation(epoch: int) -> Tensor:
            if not shuffle:
                return torch.arange(num_samples, dtype=torch.int32, device=device)
            generator = torch.Generator().manual_seed(int(position_hash(torch.tensor(epoch), seed + 1)))
            return torch.randperm(num_samples, generator=generator, dtype=torch.int32).to(device)

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
        return torch.cat(parts).long()


class InMemoryStream:
    """Micro-batches from a data set in the device's memory."""

    def __init__(self, data_set: DataSet, seed: int, shuffle: bool, device: torch.device, dtype: torch.dtype):
        self.images, self.labels = (tensor.to(device) for tensor in data_set.train.tensors)
        self.val_images, self.val_labels = (tensor.to(device) for tensor in data_set.val.tensors)
        self.order = SampleOrder(len(self.images), seed, shuffle, device)
        self.normalise = Normalise(data_set, device, dtype)
        self.augment, self.seed = data_set.crop_and_flip, seed

    def read(self, positions: range) -> tuple[Tensor, Tensor]:
        """The training samples at these positions: inputs (n, C, H, W), targets (n,)."""
        samples = self.order.samples(positions)
        images = self.images[samples]
        if self.augment:
            images = crop_and_flip(images, _tensor(positions, images.device), self.seed)
        return self.normalise(images), self.labels[samples]

    def take(self, micro_batches: Iterable[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of training samples at these positions: inputs (n, C, H, W), targets (n,)."""
        return map(self.read, micro_batches)

    def validation(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the validation samples: over all ranks, each exactly once."""
        own = positions_of_rank(0, len(self.val_images), rank, world_size)
        for cut in range(0, len(own), micro_batch_size):
            part = own[cut : cut + micro_batch_size]
            index = slice(part.start, part.stop, part.step)
            yield self.normalise(self.val_images[index]), self.val_labels[index]


class LoadedStream:
    """Micro-batches from a data set that is read while training goes on.

    One DataLoader for the training samples and one for the validation samples live as long as the run. Their worker
    processes read chunks of a fixed size ahead along this rank's positions; `Recut` makes micro-batches of any size of
    them. The positions follow on each other without an end, so neither a new batch size nor a new epoch interrupts the
    reading; only where `take` is asked for other positions than the next ones does the reading start there anew.
    """

    def __init__(
        self,
        data_set: DataSet,
        seed: int,
        shuffle: bool,
        device: torch.device,
        dtype: torch.dtype,
        num_workers: int,
        batch_ahead: int,
    ):
        self.device, self.augment, self.seed = device, data_set.crop_and_flip, seed
        self.normalise = Normalise(data_set, device, dtype)
        self.val_size = len(data_set.val)
        self.train, self.val = (
            ChunkReader(
                SeededReader(samples, name, data_set.image_shape, data_set.num_classes),
                SampleOrder(len(samples), seed, shuffled),
                seed,
                num_workers,
                batch_ahead,
                pin_memory=device.type == "cuda",
            )
            for name, samples, shuffled in (
                ("training", data_set.train, shuffle),
                ("validation", data_set.val, False),
            )
        )
        self.recut: Recut | None = None
        self.next = (0, 1)  # position at which `recut` stands, and the step from each to the next

    def read(self, positions: range) -> tuple[Tensor, Tensor]:
        """The training samples at these positions, read in this process: inputs (n, C, H, W), targets (n,)."""
        images, labels = self.train.read(positions)
        return self._inputs(images.to(self.device), positions), labels.to(self.device)

    def take(self, micro_batches: Iterable[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches of training samples at these positions: inputs (n, C, H, W), targets (n,)."""
        for positions in micro_batches:
            start, step = positions.start, positions.step
            if self.recut is None or (start, step) != self.next:
                chunks = (range(p, p + CHUNK * step, step) for p in itertools.count(start, CHUNK * step))
                self.recut = Recut(self.train.chunks(chunks), self.device)
            self.next = (positions[-1] + step, step)
            images, labels = self.recut.take(len(positions))
            yield self._inputs(images, positions), labels

    def _inputs(self, images: Tensor, positions: range) -> Tensor:
        if self.augment:
            images = crop_and_flip(images, _tensor(positions, images.device), self.seed)
        return self.normalise(images)

    def validation(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of the validation samples: over all ranks, each exactly once."""
        own = positions_of_rank(0, self.val_size, rank, world_size)
        recut = Recut(self.val.chunks(own[cut : cut + CHUNK] for cut in range(0, len(own), CHUNK)), self.device)
        for cut in range(0, len(own), micro_batch_size):
            images, labels = recut.take(len(own[cut : cut + micro_batch_size]))
            yield self.normalise(images), labels


def _tensor(positions: range, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(positions.start, positions.stop, positions.step, device=device)


class Recut:
    """Chunks of samples in, any numbers of samples out, in the same order; on the device."""

    def __init__(self, chunks: Iterator[tuple[Tensor, Tensor]], device: torch.device):
        self.chunks, self.device = chunks, device
        self.rest = (torch.empty(0), torch.empty(0))  # of the last chunk: images and labels

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """The next n samples: images uint8 (n, C, H, W), labels int64 (n,)."""
        taken, filled = None, 0
        while filled < n:
            if not len(self.rest[0]):
                self.rest = next(self.chunks)
            if taken is None:
                taken = [torch.empty(n, *t.shape[1:], dtype=t.dtype, device=self.device) for t in self.rest]
            count = min(n - filled, len(self.rest[0]))
            for target, chunk in zip(taken, self.rest):
                target[filled : filled + count].copy_(chunk[:count], non_blocking=True)
            self.rest = tuple(chunk[count:] for chunk in self.rest)
            filled += count
        return tuple(taken)


class ChunkReader:
    """Reads samples in the order of their positions, a chunk at a time, by a DataLoader that is made once.

    Args:
        samples: what reads the samples, in the worker processes.
        order: which sample stands at which position.
        seed: of the run; with the position, it seeds the random generators for each sample.
        num_workers: worker processes; 0: this process reads.
        batch_ahead: chunks that each worker process reads ahead.
        pin_memory: into page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        samples: "SeededReader",
        order: "SampleOrder",
        seed: int,
        num_workers: int,
        batch_ahead: int,
        pin_memory: bool,
    ):
        self.samples, self.order, self.seed = samples, order, seed
        self.positions: Iterable[range] = ()
        self.loader = DataLoader(
            samples,
            batch_sampler=self,
            collate_fn=_unchanged,
            num_workers=num_workers,
            prefetch_factor=batch_ahead if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else making an iterator would draw from the one that dropout draws from
        )

    def read(self, positions: range) -> tuple[Tensor, Tensor]:
        """The samples at these positions, read in this process: images (n, C, H, W), labels (n,)."""
        return _checked(self.samples.__getitems__(self.requests(positions)))

    def chunks(self, positions: Iterable[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """The samples at these positions, one chunk a range; ends what was being read before."""
        self.positions = positions
        return map(_checked, self.loader)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """What the DataLoader asks its worker processes for."""
        return map(self.requests, self.positions)

    def requests(self, positions: range) -> list[tuple[int, int]]:
        """(sample, seed) at each of the positions."""
        seeds = position_hash(_tensor(positions), self.seed)
        return list(zip(self.order.samples(positions).tolist(), seeds.tolist()))


def _begin_worker(worker: int) -> None:
    """In a worker process: the training process decides on its end, and has the last words.

    When that one is killed, a broken pipe is no news and needs no traceback.
    """
    heed_the_parent_alone()
    report = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (OSError, EOFError)) else report(kind, *rest)


def _unchanged(chunk):
    return chunk


def _checked(chunk: list[Tensor] | str) -> tuple[Tensor, Tensor]:
    if isinstance(chunk, str):
        raise RunError(chunk)
    return tuple(chunk)


class SeededReader(Dataset):
    """Reads a chunk of samples; Python's, NumPy's and torch's random generators are seeded for each of them.

    So whatever the data set draws (crop, flip, …) is the same on any rank, in any process, before and after a resume.

    Args:
        samples: map-style: `samples[i]` is an image, uint8 (C, H, W), and its label.
        name: of the split, for messages.
        image_shape: (C, H, W) of every image.
        num_classes: labels are 0 … num_classes − 1.
    """

    def __init__(self, samples: Dataset, name: str, image_shape: tuple[int, int, int], num_classes: int):
        self.samples, self.name, self.image_shape, self.num_classes = samples, name, image_shape, num_classes

    def __getitems__(self, requests: list[tuple[int, int]]) -> list[Tensor] | str:
        """Images (n, C, H, W) and labels (n,) of these (sample, seed); one line where a sample cannot be read."""
        chunk = []
        with _generators_restored():
            for index, seed in requests:
                _seed_generators(seed)
                try:
                    chunk.append(self._sample(index))
                except Exception as error:  # a user's data set raises what it likes; the run ends with this line
                    return (
                        f"--dataset: sample {index} of the {self.name} set cannot be read: {in_one_line(error)}: "
                        "repair it or leave it out"
                    )
        return default_collate(chunk)

    def _sample(self, index: int) -> tuple[Tensor, int]:
        image, label = self.samples[index]
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or tuple(image.shape) != self.image_shape:
            raise ValueError(f"its image is {described(image)}, not uint8 {self.image_shape}")
        if not 0 <= label < self.num_classes or int(label) != label:
            raise ValueError(f"its label {label} is none of 0 … {self.num_classes - 1}")
        return image, int(label)


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too


@contextlib.contextmanager
def _generators_restored():
    """The generators' states are as before: this may be the training process."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
