"""Micro-batches of exactly the size that is asked for, from a data set that is read while training goes on."""

import contextlib
import fcntl
import itertools
import os
import random
import stat
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset, default_collate

from adadagrad.order import EvenlySpread, Orders, SampleOrder, as_tensor, position_hash
from batches.augment import Normalise
from batches.in_memory import Batch, Stream
from data import DataSet, described
from launch.signals import heed_the_parent_alone
from options.errors import RunError, in_one_line

CHUNK = 32
"""Samples that a worker process reads at a time."""
AHEAD = 2
"""Chunks that each worker process reads ahead."""


class LoadedStream(Stream):
    """Micro-batches from a data set that is read while training goes on.

    One DataLoader for the training samples and one for the validation samples live as long as the run. Their worker
    processes read chunks of a fixed size ahead along this rank's positions; `Recut` makes micro-batches of any size of
    them. The positions follow on each other without an end, so neither a new batch size nor a new epoch interrupts the
    reading; only where `take` is asked for other positions than the next ones does the reading start there anew.
    """

    def __init__(
        self,
        data_set: DataSet,
        orders: Orders,
        seed: int,
        device: torch.device,
        normalise: Normalise,
        num_workers: int,
    ):
        super().__init__(data_set, orders, seed, device, normalise)
        self.train, self.val = (
            ChunkReader(
                SeededReader(samples, name, data_set),
                order,
                seed,
                num_workers,
                pin_memory=device.type == "cuda",
            )
            for name, samples, order in zip(("training", "validation"), (data_set.train, data_set.val), orders)
        )
        self.recut: Recut | None = None
        self.next = (0, 1)  # position at which `recut` stands, and the step from each to the next

    def _read(self, positions: range) -> Batch:
        return tree_map(lambda tensor: tensor.to(self.device), self.train.read(positions))

    def _next(self, positions: range) -> Batch:
        start, step = positions.start, positions.step
        if self.recut is None or (start, step) != self.next:
            chunks = (range(p, p + CHUNK * step, step) for p in itertools.count(start, CHUNK * step))
            self.recut = Recut(self.train.chunks(chunks), self.device)
        self.next = (positions[-1] + step, step)
        return self.recut.take(len(positions))

    def _validation(self, own: range, cuts: Iterable[range]) -> Iterator[Batch]:
        recut = Recut(self.val.chunks(own[cut : cut + CHUNK] for cut in range(0, len(own), CHUNK)), self.device)
        return (recut.take(len(cut)) for cut in cuts)


class Recut:
    """Chunks of samples in, any numbers of samples out, in the same order; on the device."""

    def __init__(self, chunks: Iterator[Batch], device: torch.device):
        self.chunks, self.device = chunks, device
        self.rest = [torch.empty(0)]  # of the last chunk: the tensors of its inputs and targets
        self.structure = None  # how these are nested

    def take(self, n: int) -> Batch:
        """The next n samples: images uint8 (n, C, H, W), labels int64 (n,)."""
        taken, filled = None, 0
        while filled < n:
            if not len(self.rest[0]):
                self.rest, self.structure = tree_flatten(next(self.chunks))
            if taken is None:
                taken = [torch.empty(n, *t.shape[1:], dtype=t.dtype, device=self.device) for t in self.rest]
            count = min(n - filled, len(self.rest[0]))
            for target, chunk in zip(taken, self.rest):
                target[filled : filled + count].copy_(chunk[:count], non_blocking=True)
            self.rest = [chunk[count:] for chunk in self.rest]
            filled += count
        return tree_unflatten(taken, self.structure)


class ChunkReader:
    """Reads samples in the order of their positions, a chunk at a time, by a DataLoader that is made once.

    Args:
        samples: what reads the samples, in the worker processes.
        order: which sample stands at which position.
        seed: of the run; with the position, it seeds the random generators for each sample.
        num_workers: worker processes; 0: this process reads.
        pin_memory: into page-locked memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        samples: "SeededReader",
        order: SampleOrder | EvenlySpread,
        seed: int,
        num_workers: int,
        pin_memory: bool,
    ):
        self.samples, self.order, self.seed = samples, order, seed
        self.positions: Iterable[range] = ()
        self.loader = DataLoader(
            samples,
            batch_sampler=self,
            collate_fn=_unchanged,
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else making an iterator would draw from the one that dropout draws from
        )

    def read(self, positions: range) -> Batch:
        """The samples at these positions, read in this process: images (n, C, H, W), labels (n,)."""
        return _checked(self.samples.__getitems__(self.requests(positions)))

    def chunks(self, positions: Iterable[range]) -> Iterator[Batch]:
        """The samples at these positions, one chunk a range; ends what was being read before."""
        self.positions = positions
        return map(_checked, _from_workers(iter(self.loader)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """What the DataLoader asks its worker processes for."""
        return map(self.requests, self.positions)

    def requests(self, positions: range) -> list[tuple[int, int]]:
        """(sample, seed) at each of the positions."""
        seeds = position_hash(as_tensor(positions), self.seed)
        return list(zip(self.order.samples(positions).tolist(), seeds.tolist()))


def _begin_worker(worker: int) -> None:
    """In a worker process: the training process decides on its end, and has the last words.

    When that one is killed, a broken pipe is no news and needs no traceback.
    """
    heed_the_parent_alone()
    _read_files_by_itself()
    report = sys.excepthook
    sys.excepthook = lambda kind, *rest: None if issubclass(kind, (OSError, EOFError)) else report(kind, *rest)


def _read_files_by_itself() -> None:
    """In a forked process: files that were open for reading are opened anew under the numbers that they have.

    Else all processes share one position in each of them, and where one seeks the others read. (On Linux.)
    """
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that of the listing itself is closed already
                number = int(name)
                read_only = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
                if read_only and stat.S_ISREG(os.fstat(number).st_mode):
                    position, own = os.lseek(number, 0, os.SEEK_CUR), os.open(f"/proc/self/fd/{name}", os.O_RDONLY)
                    os.lseek(own, position, os.SEEK_SET)
                    os.dup2(own, number)
                    os.close(own)


def _unchanged(chunk):
    return chunk


def _from_workers(chunks: Iterator) -> Iterator:
    """A worker process that dies while it hands over a chunk shows as a broken connection: said as torch says it else.

    (A data set's own errors come as text.)
    """
    try:
        yield from chunks
    except (OSError, EOFError) as error:
        raise RuntimeError(f"DataLoader worker is gone: {type(error).__name__}: {error}") from error


def _checked(chunk: Batch | str) -> Batch:
    if isinstance(chunk, str):
        raise RunError(chunk)
    return tuple(chunk)


class SeededReader(Dataset):
    """Reads a chunk of samples; Python's, NumPy's and torch's random generators are seeded for each of them, and those
    that the data set keeps itself.

    So whatever the data set draws (crop, flip, …) is the same on any rank, in any process, before and after a resume.

    Args:
        samples: map-style: `samples[i]` is an input and its target.
        name: of the split, for messages.
        data_set: says what each sample has to be.
    """

    def __init__(self, samples: Dataset, name: str, data_set: DataSet):
        self.samples, self.name = samples, name
        self.input_shape, self.num_classes = data_set.input_shape, data_set.num_classes
        self.generators = own_generators(samples)

    def __getitems__(self, requests: list[tuple[int, int]]) -> Batch | str:
        """Inputs (n, …) and targets (n, …) of these (sample, seed); one line where a sample cannot be read."""
        chunk = []
        with _generators_restored():
            for index, seed in requests:
                _seed_generators(seed, self.generators)
                try:
                    chunk.append(self._sample(index))
                except Exception as error:  # a user's data set raises what it likes; the run ends with this line
                    return (
                        f"--dataset: sample {index} of the {self.name} set cannot be read: {in_one_line(error)}: "
                        "repair it or leave it out"
                    )
        try:
            return tree_map(lambda *parts: default_collate(parts), *chunk)
        except Exception as error:
            return (
                f"--dataset: samples of the {self.name} set do not go into one batch: {in_one_line(error)}: "
                "give all of them the same structure, types and shapes"
            )

    def _sample(self, index: int) -> Batch:
        if self.num_classes is None:
            inputs, targets = self.samples[index]
            return inputs, targets
        image, label = self.samples[index]
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or tuple(image.shape) != self.input_shape:
            raise ValueError(f"its image is {described(image)}, not uint8 {self.input_shape}")
        if not 0 <= label < self.num_classes or int(label) != label:
            raise ValueError(f"its label {label} is none of 0 … {self.num_classes - 1}")
        return image, int(label)


MANY = 1000
"""Longer lists hold samples, not what draws for them."""


def own_generators(holder: Any) -> list[Any]:
    """The random generators of NumPy, torch and Python in an object's attributes, and in what lies in these.

    (One that is made anew for a sample, or hidden in a closure, is not found: docs/extending.md.)
    """
    found, seen, to_look_at = [], set(), [holder]
    while to_look_at:
        value = to_look_at.pop()
        if id(value) in seen or isinstance(value, (type, ModuleType)):
            continue
        seen.add(id(value))
        if isinstance(value, (np.random.Generator, np.random.RandomState, torch.Generator, random.Random)):
            found.append(value)
        elif isinstance(value, (dict, list, tuple)):
            to_look_at += [] if len(value) > MANY else value.values() if isinstance(value, dict) else value
        else:
            to_look_at += getattr(value, "__dict__", {}).values()
    return found


def _seed_generators(seed: int, own: Iterable[Any]) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs, too
    for generator in own:
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(seed).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        else:
            generator.seed(seed % 2**32)


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
