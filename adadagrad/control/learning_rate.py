"""The learning rate follows the batch size: factors relative to the initial batch."""

import math
from dataclasses import dataclass

from ..tests import Statistics

CRITICAL = 2.0
"""Critical batch size over noise scale V/‖G‖². They are the same where the curvature is the same in all directions
(McCandlish et al., section 2.2); where it is not, steps have left little of the gradient in the steep directions, in
which the noise remains, and the critical batch size is larger: 1 to 4 noise scales on the problems of docs/results.md,
by the samples that constant batches needed to a target."""


@dataclass(frozen=True)
class LearningRateScaling:
    """The factor on the learning rate at batch size b, relative to the initial b₀.

    `none` 1; `sqrt` √(b/b₀); `linear` b/b₀; `adascale` the gain r = (V/b₀ + ‖G‖²) / (V/b + ‖G‖²) of AdaScale (Johnson
    et al., ICML 2020), between 1 and b/b₀: close to b/b₀ where noise dominates, to 1 where it does not; `critical` the
    ratio of the best rates at b and at b₀, (1 + C/b₀) / (1 + C/b) (McCandlish et al., arXiv:1812.06162, section 2.2),
    C the critical batch size: the same gain where that is the noise scale V/‖G‖², here `CRITICAL` times as much. For
    optimizers that divide by the gradient's size (Adam, AdaGrad) the gain's square root. Where the estimate of ‖G‖² is
    not positive, noise dominates.

    Args:
        rule: none, sqrt, linear, adascale or critical.
        initial_batch_size: b₀ [samples].
        adaptive_optimizer: the optimizer divides by the gradient's size.
    """

    rule: str
    initial_batch_size: int
    adaptive_optimizer: bool = False

    @property
    def measures(self) -> bool:
        """The factor depends on the statistics."""
        return self.rule in ("adascale", "critical")

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
        if self.rule == "none" or statistics is None:
            return 1.0
        variance, signal = statistics.variance, max(statistics.grad_norm_sq, 0.0)
        if self.rule == "critical":
            variance *= CRITICAL
        if not variance + signal > 0:
            return 1.0
        gain = (variance / self.initial_batch_size + signal) / (variance / batch_size + signal)
        return math.sqrt(gain) if self.adaptive_optimizer else gain
