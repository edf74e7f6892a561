"""Which sample stands at which position: position p = 0, 1, 2, … of a run is sample `perm(seed, epoch)[p % N]` of epoch
p // N. A batch is a range of positions, so every sample is used exactly once an epoch whatever the batch sizes were, on
any number of ranks. What is drawn at random for a sample depends on its position alone.

    order = SampleOrder(len(dataset), seed=0, shuffle=True)
    own = positions(cursor, batch_size, rank, world_size)      # this rank's share of the batch at this cursor
    numbers = order.samples(own)                               # of the samples in the data set
    cursor += batch_size                                       # all the state there is

Ranks that come and go change who takes which positions, not which samples make the batch.
"""

from functools import lru_cache

import torch
from torch import Tensor


def positions(cursor: int, batch_size: int, rank: int, world_size: int) -> range:
    """A rank's share of the batch at positions [cursor, cursor + batch_size): those with p mod world_size = rank.

    Over the ranks, each position once; shares differ by at most one sample.

    Args:
        cursor: samples of the run before this batch.
        batch_size: of the global batch [samples].
    """
    return range(cursor + (rank - cursor) % world_size, cursor + batch_size, world_size)


class SampleOrder:
    """Which sample stands at which position: a new permutation every epoch, the same for every world size."""

    def __init__(self, num_samples: int, seed: int, shuffle: bool, device: torch.device | str = "cpu"):
        self.num_samples, self.device = num_samples, device

        def permutation(epoch: int) -> Tensor:
            if not shuffle:
                return torch.arange(num_samples, dtype=torch.int32, device=device)
            generator = torch.Generator().manual_seed(int(position_hash(torch.tensor(epoch), seed + 1)))
            return torch.randperm(num_samples, generator=generator, dtype=torch.int32).to(device, non_blocking=True)

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
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).long()


class EvenlySpread:
    """So many of the samples that there are, spread evenly: a folder of images is sorted by class, a text by file."""

    def __init__(self, available: int, taken: int, device: torch.device | str = "cpu"):
        self.available, self.taken, self.device = available, taken, device

    def samples(self, positions: range) -> Tensor:
        """The samples at these positions in [0, taken): int64 (len(positions),)."""
        return as_tensor(positions, self.device) * self.available // self.taken


Orders = tuple[SampleOrder, EvenlySpread]
"""Of the training samples, and of those that an evaluation takes."""


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


def as_tensor(positions: range, device: torch.device | str = "cpu") -> Tensor:
    """int64 (len(positions),)."""
    return torch.arange(positions.start, positions.stop, positions.step, device=device)
