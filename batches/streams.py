"""The stream of a data set: by number where its samples are at hand, else by worker processes."""

import torch
from torch.utils.data import TensorDataset

from adadagrad.order import EvenlySpread, SampleOrder
from batches.augment import Normalise
from batches.in_memory import InMemoryStream
from batches.loading import LoadedStream
from data import DataSet


def build(
    data_set: DataSet,
    seed: int,
    shuffle: bool,
    device: torch.device,
    dtype: torch.dtype,
    num_workers: int = 0,
    memory_format: torch.memory_format = torch.contiguous_format,
    validation_samples: int | None = None,
) -> InMemoryStream | LoadedStream:
    """The stream of a data set: by number where its samples are at hand, else by worker processes.

    Args:
        dtype: of the inputs, where they are images or floating-point numbers.
        memory_format: of the images.
        validation_samples: of the validation set so many, spread evenly over it; default: all.
    """
    normalise = Normalise(data_set, device, dtype, memory_format)
    # The numbers of samples are where samples are chosen by them: on the device, or by the host.
    train_on, val_on = (
        device if isinstance(samples, TensorDataset) and data_set.at_hand else "cpu"
        for samples in (data_set.train, data_set.val)
    )
    available = len(data_set.val)
    orders = (
        SampleOrder(len(data_set.train), seed, shuffle, train_on),
        EvenlySpread(available, validation_samples or available, val_on),
    )
    if data_set.at_hand:
        return InMemoryStream(data_set, orders, seed, device, normalise)
    return LoadedStream(data_set, orders, seed, device, normalise, num_workers)
