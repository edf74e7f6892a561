"""Batch-size schedules: the size of the next batch from the present size, the samples so far, and the test's decision.

Arithmetic on integers; nothing is random and nothing knows of devices.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from launch.options import Config
from tests import Decision


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
