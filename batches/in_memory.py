"""Micro-batches of exactly the size that is asked for, from a data set whose samples are had by their numbers: it lies
in the device's memory, or gathers many samples at once (tokens of a memory-mapped file).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, TensorDataset

from adadagrad.order import Orders, as_tensor, positions
from batches.augment import Normalise, crop_and_flip
from data import DataSet

LOOKED_AT = 64
"""Samples at a time, where one is looked for."""
Batch = tuple[Any, Any]
"""Inputs and targets: tensors (n, …), or nested tuples, lists and dicts of them."""


class Stream:
    """Micro-batches of training samples at any positions, and of validation samples: augmented, normalised."""

    def __init__(self, data_set: DataSet, orders: Orders, seed: int, device: torch.device, normalise: Normalise):
        self.order, self.val_order = orders
        self.device = device
        self.normalise, self.augment, self.seed = normalise, data_set.crop_and_flip, seed

    def read(self, positions: range) -> Batch:
        """The training samples at these positions, by themselves: images (n, C, H, W), labels (n,)."""
        return self.normalise.batch(self._augmented(self._read(positions), positions))

    def not_finite(self, positions: range) -> int | None:
        """The first of the training samples at these positions that has a NaN or an infinite number; waits for it."""
        for first in range(0, len(positions), LOOKED_AT):
            some = positions[first : first + LOOKED_AT]
            for leaf in tree_leaves(self.read(some)):
                if isinstance(leaf, Tensor) and leaf.is_floating_point():
                    finite = torch.isfinite(leaf).reshape(len(some), -1).all(1)
                    if not finite.all():
                        at = some[int(finite.int().argmin())]
                        return int(self.order.samples(range(at, at + 1)))
        return None

    def take(self, micro_batches: Iterable[range]) -> Iterator[Batch]:
        """Micro-batches of training samples at these positions."""
        return map(self.normalise.batch, self.raw(micro_batches))

    def raw(self, micro_batches: Iterable[range]) -> Iterator[Batch]:
        """The same before `normalise`: images as uint8 (n, C, H, W), in a quarter of the memory."""
        return (self._augmented(self._next(positions), positions) for positions in micro_batches)

    def validation(self, rank: int, world_size: int, micro_batch_size: int) -> Iterator[Batch]:
        """This rank's share of the validation samples: over all ranks, each exactly once."""
        own = positions(0, self.val_order.taken, rank, world_size)
        cuts = [own[cut : cut + micro_batch_size] for cut in range(0, len(own), micro_batch_size)]
        return map(self.normalise.batch, self._validation(own, cuts))

    def _augmented(self, batch: Batch, positions: range) -> Batch:
        inputs, targets = batch
        if self.augment:
            inputs = crop_and_flip(inputs, as_tensor(positions, self.device), self.seed)
        return inputs, targets

    def _read(self, positions: range) -> Batch:
        """The training samples at these positions, on the device."""
        raise NotImplementedError

    def _next(self, positions: range) -> Batch:
        """The same, where reading ahead pays: mostly they follow on the ones before."""
        return self._read(positions)

    def _validation(self, own: range, cuts: Iterable[range]) -> Iterator[Batch]:
        """The validation samples at these cuts of a rank's own positions, on the device."""
        raise NotImplementedError


class InMemoryStream(Stream):
    """Micro-batches from a data set in the device's memory, or one that gathers its samples."""

    def __init__(self, data_set: DataSet, orders: Orders, seed: int, device: torch.device, normalise: Normalise):
        super().__init__(data_set, orders, seed, device, normalise)
        self.train, self.val = (_by_number(samples, device) for samples in (data_set.train, data_set.val))

    def _read(self, positions: range) -> Batch:
        return self.train(self.order.samples(positions))

    def _validation(self, own: range, cuts: Iterable[range]) -> Iterator[Batch]:
        return (self.val(self.val_order.samples(cut)) for cut in cuts)


def _by_number(samples: Dataset, device: torch.device) -> Callable[[Tensor], Batch]:
    """A function: numbers of samples, int64 (n,), on the device where the samples lie there → the samples, there."""
    if isinstance(samples, TensorDataset):
        inputs, targets = (tensor.to(device) for tensor in samples.tensors)
        # (A tenth of the time that inputs[chosen] takes.)
        return lambda chosen: (inputs.index_select(0, chosen), targets.index_select(0, chosen))
    return lambda chosen: tree_map(lambda tensor: tensor.to(device, non_blocking=True), samples.gather(chosen))
