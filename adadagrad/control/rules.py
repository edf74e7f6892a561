"""How large the next batch is to be: the rules that ask for a size.

A rule is called with the present size, the samples so far and what the step has shown; it gives the size it asks for.
Arithmetic on plain numbers; nothing is random and nothing knows of devices. To add one: a class here, and its options.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from ..tests import Decision, Test
from .learning_rate import CRITICAL


@dataclass(frozen=True)
class Observation:
    """What a step has shown, for the rules.

    Args:
        decision: the test's, None where none was made.
        noise_scale: V/‖G‖² of the averaged statistics [samples], None where it is not known.
        step_time: α [s] and β [s/sample] of the time of a step, None where it is not known.
    """

    decision: Decision | None = None
    noise_scale: float | None = None
    step_time: tuple[float, float] | None = None


RULES: dict[str, type["Rule"]] = {}
"""By name; every class that is made is in it."""


class Rule:
    """What asks for the next batch size.

    Attributes:
        name: of the rule; in the names of folders, too.
        options: the options of main.py that it reads.
        described: those of them that `describe` tells of.
        chosen_by: what asks for it on the command line; default: --ramp_up_type with its name.
        measures: it can ask only after a step that was measured.
        timed: it looks at the steps' times.
        may_shrink: it asks for smaller sizes, too.
        test: the statistical test that it goes by, if any.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    described: ClassVar[tuple[str, ...]] = ()
    chosen_by: ClassVar[str]
    measures: ClassVar[bool] = False
    timed = False
    may_shrink = False
    test: Test | None = None

    def __init_subclass__(cls):
        RULES[cls.name] = cls
        if "chosen_by" not in cls.__dict__:
            cls.chosen_by = f"--ramp_up_type={cls.name}"

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        """
        Args:
            options: of main.py, by name.
            test: that the options name.
            decay: samples so far → learning rate over its peak.
        """
        return cls()

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        """The size it asks for.

        Args:
            batch_size: the present one.
            samples: used so far, those of the present step included.
            observation: what the step has shown.
        """
        raise NotImplementedError

    def describe(self, batch_size: int, max_batch_size: int) -> str:
        """In words, from the first and the largest batch size."""
        return self.name

    def label(self, batch_size: int) -> str:
        """For the name of a folder."""
        return self.name


@dataclass(frozen=True)
class Constant(Rule):
    """The batch stays as it is."""

    name, chosen_by = "constant", "--test=False"
    options = described = ("batch_size",)

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        return batch_size

    def describe(self, batch_size: int, max_batch_size: int) -> str:
        return f"constant {batch_size}"

    def label(self, batch_size: int) -> str:
        return f"constant{batch_size}"


@dataclass(frozen=True)
class Adaptive(Rule):
    """Where the test fails, the size that it asks for, or `factor` times the present one where a factor is given."""

    name = "test"
    options = described = ("test_type",)
    measures = True
    test: Test | None = None
    factor: float | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        return cls(test)

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        if observation.decision is None or observation.decision.passed is not False:
            return batch_size
        asked = observation.decision.next_batch_size if self.factor is None else int(batch_size * self.factor)
        return max(asked, batch_size + 1)

    def describe(self, batch_size: int, max_batch_size: int) -> str:
        return str(self.test)

    def label(self, batch_size: int) -> str:
        return self.test.label


@dataclass(frozen=True)
class AdaptiveByFactor(Adaptive):
    """`Adaptive` with a factor."""

    name = "factor"
    options, described = ("test_type", "ramp_up_factor"), ("test_type",)

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        return cls(test, options["ramp_up_factor"])


@dataclass(frozen=True)
class Stagewise(Rule):
    """`batch_sizes[i]` during stage i; stage i lasts `samples_stages[i]` samples, the last one to the end."""

    name, chosen_by = "stagewise", "--stagewise_ramp_up=True"
    options, described = ("global_batch_sizes", "samples_stages"), ("global_batch_sizes",)
    may_shrink = True
    batch_sizes: Sequence[int] = ()
    samples_stages: Sequence[int] = ()

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        return cls(options["global_batch_sizes"], options["samples_stages"])

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        ends = list(accumulate(self.samples_stages))
        return self.batch_sizes[min(bisect_right(ends, samples), len(self.batch_sizes) - 1)]

    def describe(self, batch_size: int, max_batch_size: int) -> str:
        return f"stagewise {', '.join(map(str, self.batch_sizes))}"

    def label(self, batch_size: int) -> str:
        return "stagewise" + "-".join(map(str, self.batch_sizes))


@dataclass(frozen=True)
class Linear(Rule):
    """Every step adds `increment` samples."""

    name, chosen_by = "linear", "--linear_ramp_up=True"
    options = described = ("linear_ramp_up_increment", "max_batch_size")
    increment: int = 256

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        return cls(options["linear_ramp_up_increment"])

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        return batch_size + self.increment

    def describe(self, batch_size: int, max_batch_size: int) -> str:
        return f"linear to {max_batch_size}, {self.increment} a step"

    def label(self, batch_size: int) -> str:
        return f"linear{self.increment}"


@dataclass(frozen=True)
class Seesaw(Rule):
    """Where the schedule lowers the learning rate by a factor, the batch grows by it (arXiv:2510.14717).

    In its continuous form, b = b₀ · (peak of the learning rate) / (learning rate); with `sqrt` scaling the learning
    rate itself then falls by the factor's square root.

    Args:
        initial_batch_size: b₀ [samples].
        decay: samples so far → learning rate over its peak, in [0, 1]; 1 before the decay begins.
    """

    name, chosen_by = "seesaw", "--seesaw_ramp_up=True"
    options, described = ("batch_size",), ("batch_size", "lr_scaling")
    initial_batch_size: int
    decay: Callable[[int], float]

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        return cls(options["batch_size"], decay)

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        left = self.decay(samples)
        return max(batch_size, round(self.initial_batch_size / left)) if left > 1e-9 else 10**18

    def describe(self, batch_size: int, max_batch_size: int) -> str:
        return f"seesaw from {batch_size}"

    def label(self, batch_size: int) -> str:
        return f"seesaw{batch_size}"


SETTLED = 12
"""Steps of a size that a run has behind it, by its samples, before it takes that size."""


@dataclass(frozen=True)
class Goodput(Rule):
    """The batch with the most progress a second on this hardware.

    A step of b samples takes α + βb seconds and makes progress in proportion to b/(b + C), C the critical batch size,
    `critical` noise scales. The most progress a second is at b* = √(C · α/β), the geometric mean of the critical batch
    size and the hardware's knee P = α/β. The batch moves there where that gains more than `least_gain`; it becomes
    smaller only with `may_shrink`.

    Samples have a price, too: at batches of b a run takes 1 + b/C times the least possible samples. With a price of λ
    seconds a sample the least of (α + βb)(1 + C/b) + λ(b + C) is at √(C·α/(β + λ)), with one λ for the whole run. Where
    C is known beforehand, "at most 1 + W times the least samples" is a λ. Here it is not, and grows about in proportion
    to the samples so far, n of N; then b = ½ W·C·√(N/n) wastes W times the least samples over the run, and each as
    dearly. So b is at most that (what is wasted on the first thousands is little, however small C is there), but not
    less than W·C allows, the bound for a C that stays. Where N is not known, b ≤ W·C. Without W, b ≤ 10 C: a step of
    these makes 10/11 of the progress of the largest there can be, and the estimate of the knee is not to decide over
    more samples than that. Nor does a batch become larger than a twelfth of the samples so far: at its start a run
    changes faster than an average follows, and a noise scale measured exactly then is not that of the next steps.

    Args:
        knee: P [samples], where it is known; default: what the steps' times say.
        least_gain: of progress a second, over the present batch, below which nothing changes.
        may_shrink: move to smaller batches, too.
        critical: the batch of which a step makes half the progress of the largest there can be, in noise scales.
        max_waste: W [of the least possible samples]; default: no bound but 10 C.
        total: N, of the run [samples], where it is known.
    """

    name = "goodput"
    options = ("knee", "may_shrink", "max_waste", "free_start")
    measures = True
    knee: float | None = None
    least_gain: float = 0.05
    may_shrink: bool = False
    critical: float = CRITICAL
    max_waste: float | None = None
    total: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any], test: Test | None, decay: Callable[[int], float]) -> "Rule":
        own = {name: options[name] for name in ("knee", "may_shrink", "critical", "max_waste")}
        return cls(**own, total=options["max_samples"] if options.get("training_type") == "sample" else None)

    @property
    def timed(self) -> bool:
        return self.knee is None

    def step_time(self, measured: tuple[float, float] | None) -> tuple[float, float] | None:
        """α and β by which it decides; by the knee in units of β."""
        return measured if self.knee is None else (self.knee, 1.0)

    def __call__(self, batch_size: int, samples: int, observation: Observation) -> int:
        if observation.noise_scale is None:
            return batch_size
        step_time = self.step_time(observation.step_time)
        if step_time is None:  # one other size tells what sizes cost here
            return 2 * batch_size
        critical = self.critical * observation.noise_scale
        best = min(quickest_batch(critical, step_time), max(round(self._bound(samples) * critical), 1))
        best = min(best, max(samples // SETTLED, batch_size))
        if best < batch_size and not self.may_shrink:
            return batch_size
        gain = progress_rate(best, critical, step_time) / progress_rate(batch_size, critical, step_time)
        return best if gain > 1 + self.least_gain else batch_size

    def _bound(self, samples: int) -> float:
        """Of the batch after so many samples [critical batch sizes]."""
        if self.max_waste is None:
            return 10.0
        return self.max_waste * max(1.0, math.sqrt(self.total / samples) / 2 if self.total else 1.0)


FEWEST_STEPS = 256
"""Of a run by its first batch."""


def free_batch_size(knee: float, total: int | None = None) -> int:
    """Below an eighth of the knee a smaller batch saves at most an eighth of a step's time [samples].

    Args:
        total: samples of the run, where they are known: it is to have some hundred steps, however large the knee is.
    """
    return round(min(knee / 8, total / FEWEST_STEPS if total else math.inf))


def quickest_batch(critical: float, step_time: tuple[float, float]) -> int:
    """b* = √(C · α/β) [samples], at least 1."""
    fixed, per_sample = step_time
    return max(1, round(math.sqrt(critical * fixed / per_sample)))


def progress_rate(batch_size: float, critical: float, step_time: tuple[float, float]) -> float:
    """Progress a second, b/(b + C) / (α + βb), in the units of a step of an infinite batch."""
    fixed, per_sample = step_time
    return batch_size / (batch_size + critical) / (fixed + per_sample * batch_size)
