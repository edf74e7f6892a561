"""The one object that a training loop holds: test, statistics, growth, step time, learning-rate factor."""

import math
from dataclasses import dataclass, replace

from ..tests import Decision, Moments, Statistics, Test
from .learning_rate import CRITICAL, LearningRateScaling
from .limits import Limits
from .rules import Adaptive, Constant, Goodput, Observation, Rule, quickest_batch
from .smoothing import Smoothing
from .step_time import StepTime
from .transition import Family, Transition, ratio_of_squares


@dataclass(frozen=True)
class Update:
    """What follows from a step.

    Args:
        batch_size: of the next batch [samples].
        lr_factor: on the learning rate of the next step.
        decision: the test's, None where none was made.
        transition: what the optimizer's state has to follow (carry_over.apply), None where it has not.
    """

    batch_size: int
    lr_factor: float
    decision: Decision | None
    transition: Transition | None = None


OFTEN, SELDOM = 8, 16
"""Steps between two measurements: while the noise scale is not known well, and afterwards."""
SHARE = 0.05
"""Of a run's time that measurements may take."""
NUMBERS = ("batch_size", "steps", "measurements", "samples", "samples_measured", "samples_watched")
STATISTICS = ("statistics", "reported")
PARTS = ("decided_by", "of_noise", "watched", "limits", "step_time")


class Controller:
    """Says after every step how large the next batch is and by what the learning rate is multiplied.

        controller = Controller(batch_size=16, test=NormTest(eta=2.0), smoothing=5_000, unbiased=True)
        for each step:
            update = controller.update(moments)       # once a step, on all ranks alike; None: it was not measured
            update.batch_size, update.lr_factor

    All of its state is in `state_dict()`, plain numbers; given the same measurements it says the same on all ranks.

    Args:
        batch_size: b₀, of the first batch [samples].
        test: the size that it asks for is taken where it fails: short for rule=Adaptive(test).
        rule: what asks for a size (rules.py).
        limits: on changes of the batch size; default: none.
        unbiased: decide by ‖ḡ‖² − V/b and leave-one-out products (docs/decisions.md), not the published form.
        smoothing: half-life of the averages [samples]; 0: the last batch alone.
        scaling: the learning-rate factor; default: 1.
    """

    def __init__(
        self,
        batch_size: int,
        test: Test | None = None,
        rule: Rule | None = None,
        limits: Limits | None = None,
        unbiased: bool = False,
        smoothing: float = 0.0,
        scaling: LearningRateScaling | None = None,
    ):
        self.batch_size = batch_size
        self.rule, self.limits = rule or Adaptive(test), limits or Limits()
        self.scaling = scaling or LearningRateScaling("none", batch_size)
        self.step_time = StepTime()
        self.decided_by = Smoothing(smoothing, unbiased)
        self.of_noise = self.decided_by if unbiased else Smoothing(smoothing, unbiased=True)
        self.watched = Smoothing(smoothing, unbiased=True)  # of all measurements; nothing is decided by them
        self.steps, self.measurements = 0, 0
        self.samples, self.samples_measured, self.samples_watched = 0, 0, 0
        self.statistics: Statistics | None = None  # unbiased and averaged, of the last measurement to decide by
        self.reported: Statistics | None = None  # likewise, of the last measurement
        self._factors_at: tuple[int, Statistics | None, tuple[float, float]] | None = None
        self.held: tuple[float, float] | None = None  # of a branch: the factors on rate and decay, for good

    def update(
        self,
        moments: Moments | None = None,
        samples: int | None = None,
        watched: Moments | None = None,
        clipped_in_a_row: bool = False,
    ) -> Update:
        """What follows from the step that was taken.

        Args:
            moments: of the step's batch; None where it was not measured.
            samples: that the step really used, where a loop ends a batch early.
            watched: of the step's batch, where it was measured only to be reported.
            clipped_in_a_row: steps are as long as the curvature allows (`Clipping.in_a_row`); for good.
        """
        if clipped_in_a_row:
            self._end_floor()
        measured = moments or watched
        self.samples += samples or (measured.batch_size if measured else self.batch_size)
        if measured:
            self._report(measured)
        self.steps += 1
        decision = self._measure(moments) if moments else None
        step_time = self.step_time.fit() if moments and self.rule.timed else None
        known = self._known if moments else None
        noise_scale = known.noise_scale if known else None
        observation = Observation(decision, noise_scale, step_time)
        wanted = self.rule(self.batch_size, self.samples, observation)
        before = self.batch_size
        self.batch_size = self.limits(before, wanted, moments is not None or not self.rule.measures)
        transition = None
        if self.batch_size != before:
            transition = self.scaling.transition(before, self.batch_size, self._known)
        return Update(self.batch_size, self.lr_factor, decision, transition)

    def _end_floor(self) -> None:
        self.scaling, self._factors_at = replace(self.scaling, floor=False), None

    @property
    def initial_transition(self) -> Transition | None:
        """What the optimizer's values follow before the first step: they were chosen for b₀ of `scaling`, and the first
        batch may be another (a free start)."""
        return self.scaling.transition(self.scaling.initial_batch_size, self.batch_size, None)

    def take(self, batch_size: int) -> Transition | None:
        """Make the present batch one of so many samples, whatever was asked for; gives what the optimizer's state has
        to follow, as `Update.transition`."""
        before, self.batch_size = self.batch_size, batch_size
        return self.scaling.transition(before, batch_size, self._known)

    def _measure(self, moments: Moments) -> Decision | None:
        """Add a batch to the averages; gives the test's decision on them, where there is a test."""
        passed = self.samples - self.samples_measured
        self.samples_measured, self.measurements = self.samples, self.measurements + 1
        decided_by = self.decided_by.add(moments, passed)
        unbiased = decided_by if self.of_noise is self.decided_by else self.of_noise.add(moments, passed)
        self.statistics = unbiased if unbiased.is_usable else self.statistics
        return self.rule.test(decided_by.safe) if self.rule.test else None

    def branch(
        self, factor: float, family: Family | None, adaptive_optimizer: bool, exponent: float = 1.0
    ) -> Transition:
        """The batch has κ = `factor` times its size from here on, and rate and decay follow this once.

        With the gain r = κ^exponent, and not one that counts with some critical size: whether a larger batch costs
        samples is what a branch is to show, and over a short stretch its loss would show that size again. ρ is by the
        noise scale as it was measured last, or κ, as where noise dominates.

        Args:
            factor: on the present size.
            family: of the optimizer; None where it is not known: then its rate alone follows.
            adaptive_optimizer: the optimizer divides by the gradient's size.
            exponent: of the gain; 1: as where noise dominates.

        Returns:
            What the optimizer's state has to follow (carry_over.apply).
        """
        before, after = self.batch_size, max(1, round(factor * self.batch_size))
        known = self.statistics or self.reported or Statistics(before, before, 0.0, 1.0)
        squares = ratio_of_squares(known.variance, known.grad_norm_sq, before, after)
        initial = self.scaling.initial_batch_size if self.scaling.family else before  # β₂ is of this size
        change = Transition(before, after, initial, (after / before) ** exponent, squares)
        rate = change.rate(family) if family else math.sqrt(change.gain) if adaptive_optimizer else change.gain
        decay = change.decay(family) if family else 1.0
        self.held = self.lr_factor * rate, self.decay_factor * decay
        self.rule, self.batch_size = Constant(), after
        return change

    @property
    def _known(self) -> Statistics | None:
        """What growth and learning rate may go by: ‖G‖² at the safe end of its interval, once there is one."""
        if self.statistics is None or (self.of_noise.half_life and self.statistics.margin is None):
            return None
        return self.statistics.safe

    def is_due(self, interval: int | None, price: float = 0.4) -> bool:
        """Whether the next step is to be measured.

        Args:
            interval: every so many steps; None: at every step until the noise scale is known to a half, as far as
                these are at most 16 steps and an eighth of all, then at every sixteenth; and, but for the 16, in no
                more steps than take a twentieth of the run's time.
            price: what a measured step takes beyond a plain one, in plain steps (`Estimator.price`).
        """
        if interval is not None:
            return self.steps % interval == 0
        affordable = math.ceil(price / SHARE)
        if self.statistics is not None and self.statistics.is_narrow:
            return self.steps % max(SELDOM, affordable) == 0
        return self.measurements < SELDOM + self.steps // max(OFTEN, affordable)

    def _report(self, moments: Moments) -> None:
        passed, self.samples_watched = self.samples - self.samples_watched, self.samples
        statistics = self.watched.add(moments, passed)
        self.reported = statistics if statistics.is_usable else self.reported

    @property
    def needs_moments(self) -> bool:
        """A measurement can still change something: the learning rate, or a batch that is not yet at its largest."""
        if self.held:
            return False
        limits = self.limits
        is_largest = limits.max_batch_size is not None and self.batch_size >= limits.max_batch_size
        return self.scaling.measures or (self.rule.measures and (limits.may_shrink or not is_largest))

    @property
    def lr_factor(self) -> float:
        """On the learning rate of a step of the present batch size."""
        return self._factors()[0]

    @property
    def decay_factor(self) -> float:
        """On a decoupled weight decay, of a step of the present batch size."""
        return self._factors()[1]

    def _factors(self) -> tuple[float, float]:
        """On learning rate and decay; most steps have the batch size and the statistics of the step before."""
        if self.held:
            return self.held
        at = self._factors_at
        if at is None or at[0] != self.batch_size or at[1] is not self.statistics:
            known = self._known
            factors = self.scaling(self.batch_size, known), self.scaling.decay(self.batch_size, known)
            self._factors_at = at = self.batch_size, self.statistics, factors
        return at[2]

    @property
    def noise_scale(self) -> float | None:
        """V/‖G‖² of the averaged, unbiased statistics [samples]; None where ‖G‖² is not positive or not known."""
        return self.reported.noise_scale if self.reported else None

    def known_noise(self) -> dict[str, float | None]:
        """`noise_scale`, and the ends of its two-sided 90 % interval [samples]; None where they are not known."""
        low, high = (self.reported.noise_scale_interval if self.reported else None) or (None, None)
        high = None if high == math.inf else high
        return {"noise_scale": self.noise_scale, "noise_scale_low": low, "noise_scale_high": high}

    @property
    def knee(self) -> float | None:
        """P = α/β [samples]: the batch whose samples take as long as the fixed part of a step; None where not known."""
        fit = self._step_time()
        return fit[0] / fit[1] if fit else None

    def _step_time(self) -> tuple[float, float] | None:
        """As measured, or by the knee that the rule was given."""
        measured = self.step_time.fit()
        return self.rule.step_time(measured) if isinstance(self.rule, Goodput) else measured

    def findings(self) -> dict[str, float | None]:
        """What the run has found out of its gradients and its hardware [samples each]; None where it is not known."""
        known = self.noise_scale is not None and self.knee is not None
        critical = self.rule.critical if isinstance(self.rule, Goodput) else self.scaling.critical
        return {
            **self.known_noise(),
            "knee": self.knee,
            "quickest_batch_size": quickest_batch(critical * self.noise_scale, self._step_time()) if known else None,
        }

    def state_dict(self) -> dict:
        """Plain numbers, lists and dicts, for a checkpoint."""
        return {
            **{name: getattr(self, name) for name in NUMBERS},
            **{name: own and vars(own) for name in STATISTICS for own in [getattr(self, name)]},
            **{name: getattr(self, name).state_dict() for name in PARTS},
            "held": self.held and list(self.held),
            "floor": self.scaling.floor,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in NUMBERS:
            setattr(self, name, state[name])
        for name in STATISTICS:
            setattr(self, name, state[name] and Statistics(**state[name]))
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        held = state.get("held")  # earlier checkpoints have none
        self.held = held and tuple(held)
        if not state.get("floor", True):
            self._end_floor()


STEADY = {"smoothing": 5_000.0, "max_growth": 4.0, "max_waste": 1.0}
"""Of the default recipe."""


def steady(
    batch_size: int,
    max_batch_size: int | None = None,
    adaptive_optimizer: bool = False,
    family: Family | None = None,
    critical: float = CRITICAL,
) -> Controller:
    """The program's default recipe: the batch with the most progress a second, and a learning rate that follows.

    Args:
        batch_size: b₀, of the first batch, for which the learning rate was chosen [samples].
        max_batch_size: largest size [samples]; None: no bound.
        adaptive_optimizer: the optimizer divides by the gradient's size.
        family: of an optimizer whose state follows, too (carry_over.py).
        critical: critical batch size over noise scale.
    """
    return Controller(
        batch_size,
        rule=Goodput(critical=critical, max_waste=STEADY["max_waste"]),
        limits=Limits(max_batch_size, STEADY["max_growth"]),
        unbiased=True,
        smoothing=STEADY["smoothing"],
        scaling=LearningRateScaling("critical", batch_size, adaptive_optimizer, family, critical),
    )
