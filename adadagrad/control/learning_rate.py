"""The learning rate follows the batch size: factors relative to the initial batch."""

import math
from dataclasses import dataclass, replace

from ..tests import Statistics
from .transition import Family, Transition, ratio_of_squares

CRITICAL = 8.0
"""Critical batch size over noise scale V/‖G‖². They are the same where the curvature is the same in all directions
(McCandlish et al., section 2.2); where it is not, steps have left little of the gradient in the steep directions, in
which the noise remains, and the critical batch size is larger (docs/critical.md). By the samples that constant batches
need to a target it is 5 to 10 noise scales on MNIST; 8 was found there (docs/log.md)."""

MEASURED = ("adascale", "critical")
"""Rules that read the statistics."""


@dataclass(frozen=True)
class LearningRateScaling:
    """The factor on the learning rate at batch size b, relative to the initial b₀.

    `none` 1; `sqrt` √(b/b₀); `linear` b/b₀; `adascale` the gain r = (V/b₀ + ‖G‖²) / (V/b + ‖G‖²) of AdaScale (Johnson
    et al., ICML 2020), between 1 and b/b₀: close to b/b₀ where noise dominates, to 1 where it does not; `critical` the
    ratio of the best rates at b and at b₀, (1 + C/b₀) / (1 + C/b) (McCandlish et al., arXiv:1812.06162, section 2.2),
    C the critical batch size: the same gain where that is the noise scale V/‖G‖², here `critical` times as much. For
    optimizers that divide by the gradient's size (Adam, AdaGrad) the gain's square root. Where the estimate of ‖G‖² is
    not positive, noise dominates.

    A rate that is right for a whole run at b₀ is so by the noise of its later steps; how much longer a step could be
    among the first, where C is small, it does not say. So steps along the gradient count with a C of b at least, by
    which the gain is no less than (1 + b/b₀)/2, half of the linear rule's. That supposes that the curvature allows such
    steps: `floor=False` where it has turned out not to (`Clipping.in_a_row`).

    Args:
        rule: none, sqrt, linear, adascale or critical.
        initial_batch_size: b₀ [samples].
        adaptive_optimizer: the optimizer divides by the gradient's size.
        family: of an optimizer whose state follows, too, where the rule reads the statistics: then the factor is that
            of `Transition.rate`; None: the rate alone follows.
        critical: the critical batch size that `critical` counts with, in noise scales.
        floor: steps along the gradient count with a C of b at least.
    """

    rule: str
    initial_batch_size: int
    adaptive_optimizer: bool = False
    family: Family | None = None
    critical: float = CRITICAL
    floor: bool = True

    @property
    def measures(self) -> bool:
        """The factor depends on the statistics."""
        return self.rule in MEASURED

    def __call__(self, batch_size: int, statistics: Statistics | None) -> float:
        """
        Args:
            batch_size: of the step that is to be taken.
            statistics: unbiased and averaged; None where nothing was measured yet.
        """
        ratio = batch_size / self.initial_batch_size
        if self.rule == "sqrt":
            return math.sqrt(ratio)
        if self.rule == "linear":
            return ratio
        change = self._change(self.initial_batch_size, batch_size, statistics)
        if change is None:
            return 1.0
        if self.family:
            return change.rate(self.family)
        return math.sqrt(change.gain) if self.adaptive_optimizer else change.gain

    def decay(self, batch_size: int, statistics: Statistics | None) -> float:
        """The factor on a decoupled weight decay, relative to the initial one; 1 where the rate alone follows."""
        change = self._change(self.initial_batch_size, batch_size, statistics)
        return change.decay(self.family) if change and self.family else 1.0

    def transition(self, before: int, after: int, statistics: Statistics | None) -> Transition | None:
        """What the optimizer's state has to follow; None where it has not.

        Where nothing is known of the noise yet, that is what follows from the sizes alone: a half-life in samples, the
        number of squares in a sum.
        """
        if not self.family or self.rule not in MEASURED or before == after:
            return None
        change = self._change(before, after, statistics)
        return change or Transition(before, after, self.initial_batch_size, gain=1.0, squares=1.0)

    def _change(self, before: int, after: int, statistics: Statistics | None) -> Transition | None:
        if self.rule not in MEASURED or statistics is None:
            return None
        critical = self.critical if self.rule == "critical" else 1.0
        change = Transition.of(statistics, before, after, self.initial_batch_size, critical)
        if self.rule == "adascale" or not self._steps_along_the_gradient:
            return change
        return replace(change, gain=self._gain(after, statistics) / self._gain(before, statistics))

    @property
    def _steps_along_the_gradient(self) -> bool:
        return self.family is Family.GRADIENT or not (self.family or self.adaptive_optimizer)

    def _gain(self, batch_size: int, statistics: Statistics) -> float:
        """Of b over b₀, by a C of b at least while there is a floor."""
        least = batch_size * max(statistics.grad_norm_sq, 0.0) if self.floor else 0.0
        noise = max(self.critical * statistics.variance, least)
        return ratio_of_squares(noise, statistics.grad_norm_sq, self.initial_batch_size, batch_size)
