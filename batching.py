"""How large a batch is, and how it is cut: batch-size schedules, and global batch → ranks × micro-batches.

Everything here is arithmetic on integers; nothing is random and nothing knows of devices.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from config import Config
from tests import Decision


def positions_of_rank(start: int, stop: int, rank: int, world_size: int) -> range:
    """The positions p in [start, stop) with p mod world_size = rank."""
    return range(start + (rank - start) % world_size, stop, world_size)


@dataclass(frozen=True)
class Plan:
    """One global batch: positions [start, start + batch_size) of the sample order, in `steps` micro-batches a rank.

    Ranks and micro-batches differ by at most one sample, and the batch is exactly as large as was asked.
    """

    start: int
    batch_size: int
    world_size: int
    steps: int
    min_micro_batch_size: int = 1

    def micro_batches(self, rank: int) -> list[range]:
        """The positions of each of this rank's micro-batches; none is too small (so a rank may have one step fewer)."""
        own = positions_of_rank(self.start, self.start + self.batch_size, rank, self.world_size)
        steps = self._steps_of(len(own))
        cuts = [len(own) * i // steps for i in range(steps + 1)]
        return [own[a:b] for a, b in zip(cuts, cuts[1:])]

    @property
    def micro_batch_size(self) -> int:
        """Samples in the largest micro-batch of any rank."""
        shares = (self.batch_size // self.world_size, _ceil_div(self.batch_size, self.world_size))
        return max(_ceil_div(share, self._steps_of(share)) for share in shares)

    def _steps_of(self, share: int) -> int:
        """Into how many micro-batches a rank cuts its share of so many samples."""
        return min(self.steps, max(1, share // self.min_micro_batch_size))


def plan(
    start: int,
    batch_size: int,
    world_size: int,
    max_micro_batch_size: int,
    min_steps: int = 1,
    min_micro_batch_size: int = 1,
) -> Plan:
    """Cut a global batch into as few micro-batches as `max_micro_batch_size` (per device) and `min_steps` allow.

    Where the batch is too small for `min_steps` micro-batches of at least `min_micro_batch_size` on every rank, there
    are fewer.

    Raises:
        ValueError: the batch is smaller than the number of ranks.
    """
    if batch_size < world_size:
        raise ValueError(f"a batch of {batch_size} cannot be shared by {world_size} ranks")
    largest_share = _ceil_div(batch_size, world_size)
    steps = max(min_steps, _ceil_div(largest_share, max_micro_batch_size))
    most = max(1, largest_share // min_micro_batch_size)
    return Plan(start, batch_size, world_size, min(steps, most), min_micro_batch_size)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# Batch-size schedules: the size of the next batch from the present size, the samples so far, and the test's decision.


@dataclass(frozen=True)
class Constant:
    """The batch stays as it is."""

    def __call__(self, batch_size: int, samples: int, decision: Decision | None = None) -> int:
        return batch_size


@dataclass(frozen=True)
class Adaptive:
    """Grows where the test fails: to the size the test asks for, or by `factor` where one is given. Never shrinks."""

    max_batch_size: int
    factor: float | None = None

    def __call__(self, batch_size: int, samples: int, decision: Decision | None = None) -> int:
        if decision is None or decision.passed is not False:
            return batch_size
        asked = decision.next_batch_size if self.factor is None else int(batch_size * self.factor)
        return max(batch_size, min(max(asked, batch_size + 1), self.max_batch_size))


@dataclass(frozen=True)
class Stagewise:
    """`batch_sizes[i]` during stage i; stage i lasts `samples_stages[i]` samples, the last one to the end."""

    batch_sizes: Sequence[int]
    samples_stages: Sequence[int]

    def __call__(self, batch_size: int, samples: int, decision: Decision | None = None) -> int:
        ends = list(accumulate(self.samples_stages))
        return self.batch_sizes[min(bisect_right(ends, samples), len(self.batch_sizes) - 1)]


@dataclass(frozen=True)
class Linear:
    """Every step adds `increment` samples, up to `max_batch_size`."""

    max_batch_size: int
    increment: int

    def __call__(self, batch_size: int, samples: int, decision: Decision | None = None) -> int:
        return max(batch_size, min(batch_size + self.increment, self.max_batch_size))


def schedule(config: Config) -> Constant | Adaptive | Stagewise | Linear:
    """How the next batch's size follows from the present one."""
    if config.test:
        factor = config.ramp_up_factor if config.ramp_up_type == "factor" else None
        return Adaptive(config.max_batch_size, factor)
    if config.stagewise_ramp_up:
        return Stagewise(config.global_batch_sizes, config.samples_stages)
    if config.linear_ramp_up:
        return Linear(config.max_batch_size, config.linear_ramp_up_increment)
    return Constant()
