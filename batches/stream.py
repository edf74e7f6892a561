"""Micro-batches of exactly the size that is asked for, from a data set that lies in the device's memory."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from batches.augment import Normalise, crop_and_flip
from batches.order import SampleOrder, as_tensor
from batches.plan import positions_of_rank
from data import DataSet


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
            images = crop_and_flip(images, as_tensor(positions, images.device), self.seed)
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
