"""The one object that a training loop holds: test, statistics, growth, step time, learning-rate factor."""

from dataclasses import dataclass

from ..tests import Decision, Moments, Statistics, Test
from .learning_rate import CRITICAL, LearningRateScaling
from .limits import Limits
from .rules import Adaptive, Goodput, Observation, Rule, quickest_batch
from .smoothing import Smoothing
from .step_time import StepTime
from .transition import Transition


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
        unbiased: decide by ‖ḡ‖² − V/b and leave-one-out products (docs/statistics.md), not the published form.
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
        self.samples, self.samples_measured = 0, 0
        self.statistics: Statistics | None = None  # of the last measurement, unbiased and averaged

    def update(self, moments: Moments | None = None, samples: int | None = None) -> Update:
        """What follows from the step that was taken.

        Args:
            moments: of the step's batch; None where it was not measured.
            samples: that the step really used, where a loop ends a batch early.
        """
        self.samples += samples or (moments.batch_size if moments else self.batch_size)
        decision = self._measure(moments) if moments else None
        step_time = self.step_time.fit() if moments and self.rule.timed else None
        observation = Observation(decision, self.noise_scale if moments else None, step_time)
        wanted = self.rule(self.batch_size, self.samples, observation)
        before = self.batch_size
        self.batch_size = self.limits(before, wanted, moments is not None or not self.rule.measures)
        transition = self.scaling.transition(before, self.batch_size, self.statistics)
        return Update(self.batch_size, self.lr_factor, decision, transition)

    def _measure(self, moments: Moments) -> Decision | None:
        """Add a batch to the averages; gives the test's decision on them, where there is a test."""
        passed = self.samples - self.samples_measured
        self.samples_measured = self.samples
        decided_by = self.decided_by.add(moments, passed)
        unbiased = decided_by if self.of_noise is self.decided_by else self.of_noise.add(moments, passed)
        self.statistics = unbiased if unbiased.is_usable else self.statistics
        return self.rule.test(decided_by) if self.rule.test else None

    @property
    def lr_factor(self) -> float:
        """On the learning rate of a step of the present batch size."""
        return self.scaling(self.batch_size, self.statistics)

    @property
    def decay_factor(self) -> float:
        """On a decoupled weight decay, of a step of the present batch size."""
        return self.scaling.decay(self.batch_size, self.statistics)

    @property
    def noise_scale(self) -> float | None:
        """V/‖G‖² of the averaged, unbiased statistics [samples]; None where ‖G‖² is not positive or not known."""
        return self.statistics.noise_scale if self.statistics else None

    @property
    def knee(self) -> float | None:
        """P = α/β [samples]: the batch whose samples take as long as the fixed part of a step; None where not known."""
        fit = self._step_time()
        return fit[0] / fit[1] if fit else None

    def _step_time(self) -> tuple[float, float] | None:
        """As measured, or as the rule was told."""
        measured = self.step_time.fit()
        return self.rule.step_time(measured) if isinstance(self.rule, Goodput) else measured

    def findings(self) -> dict[str, float | None]:
        """What the run has found out of its gradients and its hardware [samples each]; None where it is not known."""
        known = self.noise_scale is not None and self.knee is not None
        critical = self.rule.critical if isinstance(self.rule, Goodput) else CRITICAL
        return {
            "noise_scale": self.noise_scale,
            "knee": self.knee,
            "quickest_batch_size": quickest_batch(critical * self.noise_scale, self._step_time()) if known else None,
        }

    def state_dict(self) -> dict:
        """Plain numbers, lists and dicts, for a checkpoint."""
        statistics = self.statistics
        return {
            "batch_size": self.batch_size,
            "samples": self.samples,
            "samples_measured": self.samples_measured,
            "statistics": None if statistics is None else vars(statistics),
            "decided_by": self.decided_by.state_dict(),
            "of_noise": self.of_noise.state_dict(),
            "limits": self.limits.state_dict(),
            "step_time": self.step_time.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("batch_size", "samples", "samples_measured"):
            setattr(self, name, state[name])
        self.statistics = None if state["statistics"] is None else Statistics(**state["statistics"])
        for name in ("decided_by", "of_noise", "limits", "step_time"):
            getattr(self, name).load_state_dict(state[name])
