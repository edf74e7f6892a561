"""How large the next batch is to be: rules that ask for a size, and the bounds within which a size may change.

A rule is called with the present size, the samples so far and what the step has found; it gives the size it asks for.
`measures` says whether it can ask only after a step that was measured, `timed` whether it looks at the steps' times.
Arithmetic on integers; nothing is random and nothing knows of devices.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..tests import Decision
from .learning_rate import CRITICAL


@dataclass(frozen=True)
class Observation:
    """What a step has found out, for the rules.

    Args:
        decision: the test's, None where none was made.
        noise_scale: V/‖G‖² of the averaged statistics [samples], None where it is not known.
        step_time: α [s] and β [s/sample] of the time of a step, None where it is not known.
    """

    decision: Decision | None = None
    noise_scale: float | None = None
    step_time: tuple[float, float] | None = None


@dataclass(frozen=True)
class Constant:
    """The batch stays as it is."""

    measures = timed = False

    def __call__(self, batch_size: int, samples: int, found: Observation) -> int:
        return batch_size


@dataclass(frozen=True)
class Adaptive:
    """Where the test fails, the size that it asks for, or `factor` times the present one where a factor is given."""

    factor: float | None = None
    measures, timed = True, False

    def __call__(self, batch_size: int, samples: int, found: Observation) -> int:
        if found.decision is None or found.decision.passed is not False:
            return batch_size
        asked = found.decision.next_batch_size if self.factor is None else int(batch_size * self.factor)
        return max(asked, batch_size + 1)


@dataclass(frozen=True)
class Stagewise:
    """`batch_sizes[i]` during stage i; stage i lasts `samples_stages[i]` samples, the last one to the end."""

    batch_sizes: Sequence[int]
    samples_stages: Sequence[int]
    measures = timed = False

    def __call__(self, batch_size: int, samples: int, found: Observation) -> int:
        ends = list(accumulate(self.samples_stages))
        return self.batch_sizes[min(bisect_right(ends, samples), len(self.batch_sizes) - 1)]


@dataclass(frozen=True)
class Linear:
    """Every step adds `increment` samples."""

    increment: int
    measures = timed = False

    def __call__(self, batch_size: int, samples: int, found: Observation) -> int:
        return batch_size + self.increment


@dataclass(frozen=True)
class Seesaw:
    """Where the schedule lowers the learning rate by a factor, the batch grows by it (arXiv:2510.14717).

    In its continuous form, b = b₀ · (peak of the learning rate) / (learning rate); with `sqrt` scaling the learning
    rate itself then falls by the factor's square root.

    Args:
        initial_batch_size: b₀ [samples].
        decay: samples so far → learning rate over its peak, in [0, 1]; 1 before the decay begins.
    """

    initial_batch_size: int
    decay: Callable[[int], float]
    measures = timed = False

    def __call__(self, batch_size: int, samples: int, found: Observation) -> int:
        left = self.decay(samples)
        return max(batch_size, round(self.initial_batch_size / left)) if left > 1e-9 else 10**18


@dataclass(frozen=True)
class Goodput:
    """The batch with the most progress a second on this hardware.

    A step of b samples takes α + βb seconds and makes progress in proportion to b/(b + C), C the critical batch size,
    `critical` noise scales. The most progress a second is at b* = √(C · α/β), the geometric mean of the critical batch
    size and the hardware's knee P = α/β. The batch moves there where that gains more than `least_gain`; it becomes
    smaller only with `may_shrink`. Above `most_critical` · C it does not go: a step of 10 C makes 10/11 of the progress
    of the largest there can be, and the estimate of the knee is not to decide over more samples than that.

    Args:
        knee: P [samples], where it is known; default: what the steps' times say.
        least_gain: of progress a second, over the present batch, below which nothing changes.
        may_shrink: move to smaller batches, too.
        critical: the batch of which a step makes half the progress of the largest there can be, in noise scales.
        most_critical: bound on the batch, in critical batch sizes.
    """

    knee: float | None = None
    least_gain: float = 0.05
    may_shrink: bool = False
    critical: float = CRITICAL
    most_critical: float = 10.0
    measures = True

    @property
    def timed(self) -> bool:
        return self.knee is None

    def step_time(self, found: tuple[float, float] | None) -> tuple[float, float] | None:
        """α and β by which it decides; by the knee in units of β."""
        return found if self.knee is None else (self.knee, 1.0)

    def __call__(self, batch_size: int, samples: int, found: Observation) -> int:
        if found.noise_scale is None:
            return batch_size
        step_time = self.step_time(found.step_time)
        if step_time is None:  # one other size tells what sizes cost here
            return 2 * batch_size
        critical = self.critical * found.noise_scale
        best = min(quickest_batch(critical, step_time), max(round(self.most_critical * critical), 1))
        if best < batch_size and not self.may_shrink:
            return batch_size
        gain = progress_rate(best, critical, step_time) / progress_rate(batch_size, critical, step_time)
        return best if gain > 1 + self.least_gain else batch_size


def quickest_batch(critical: float, step_time: tuple[float, float]) -> int:
    """b* = √(C · α/β) [samples], at least 1."""
    fixed, per_sample = step_time
    return max(1, round(math.sqrt(critical * fixed / per_sample)))


def progress_rate(batch_size: float, critical: float, step_time: tuple[float, float]) -> float:
    """Progress a second, b/(b + C) / (α + βb), in the units of a step of an infinite batch."""
    fixed, per_sample = step_time
    return batch_size / (batch_size + critical) / (fixed + per_sample * batch_size)


@dataclass
class Limits:
    """The bounds within which a rule's wish comes true, and how far it has come.

    Args:
        max_batch_size: largest size [samples].
        max_growth: largest factor at a time.
        interval: least number of steps between two changes.
        patience: the rule has to ask for more so many times in a row.
        multiple: sizes are rounded up to a multiple of it; the largest size stands above this.
        may_shrink: smaller sizes are taken, too.
    """

    max_batch_size: int | None = None
    max_growth: float = math.inf
    interval: int = 1
    patience: int = 1
    multiple: int = 1
    may_shrink: bool = False
    asked: int = 0  # times in a row that the rule has asked for another size
    since_change: int | None = None  # steps; None before the first change

    def __call__(self, batch_size: int, wanted: int, could_ask: bool = True) -> int:
        """The size of the next batch.

        Args:
            batch_size: of the present one.
            wanted: by the rule.
            could_ask: False where the rule needed a measurement that this step did not have: no row is broken by it.
        """
        if self.since_change is not None:
            self.since_change += 1
        if could_ask:
            self.asked = self.asked + 1 if wanted != batch_size else 0
        waited = self.since_change is None or self.since_change >= self.interval
        if wanted == batch_size or self.asked < self.patience or not waited:
            return batch_size
        size = self._bounded(batch_size, wanted)
        if size != batch_size:
            self.asked, self.since_change = 0, 0
        return size

    def _bounded(self, batch_size: int, wanted: int) -> int:
        size = -(-wanted // self.multiple) * self.multiple
        if size > batch_size * self.max_growth:  # the largest multiple below; where there is none, the batch stays
            size = int(batch_size * self.max_growth) // self.multiple * self.multiple
        if self.max_batch_size is not None:
            size = min(size, self.max_batch_size)
        if wanted > batch_size:
            return max(size, batch_size)
        return max(min(size, batch_size), 1) if self.may_shrink else batch_size

    def state_dict(self) -> dict:
        return {"asked": self.asked, "since_change": self.since_change}

    def load_state_dict(self, state: dict) -> None:
        self.asked, self.since_change = state["asked"], state["since_change"]
