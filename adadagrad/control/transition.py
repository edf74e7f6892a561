"""The batch size changes from b to b': what that makes of the optimizer's rate, state and decay (docs/transition.md).

Three numbers say it all: κ = b'/b; the gain r, the ratio of the best steps, so that a step of b' is worth r steps of b;
and ρ = E[g²] at b over E[g²] at b', by which the squares of the gradients become smaller. What has to be multiplied
depends on what an optimizer does with a gradient: its `Family`. Pure arithmetic.
"""

import math
from dataclasses import dataclass
from enum import Enum

from ..tests import Statistics


class Family(str, Enum):
    """What an optimizer does with the gradient, which says what follows from a change of the batch size."""

    GRADIENT = "gradient"
    """steps along it: SGD with or without momentum"""
    AVERAGE = "average of squares"
    """divides it by the root of a moving average of its squares: Adam and its kin, RMSprop, Adafactor"""
    SUM = "sum of squares"
    """divides it by the root of the sum of all its squares: AdaGrad, AdaGrad-Norm"""
    SIGN = "sign"
    """takes its sign, or that of its singular values: Lion, Muon"""


FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("SGD", "ASGD"), Family.GRADIENT),
    **dict.fromkeys(("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Adafactor"), Family.AVERAGE),
    **dict.fromkeys(("Adagrad", "AdaGradNorm"), Family.SUM),
    **dict.fromkeys(("Muon", "Lion"), Family.SIGN),
}
"""By the name of an optimizer's class, or of one that it is derived from."""


DECOUPLED = {"AdamW", "Adafactor", "Muon", "Lion"}
"""Classes whose weight decay is no part of the gradient, beside groups that say so (`decoupled_weight_decay`)."""


def ratio_of_squares(variance: float, signal: float, before: int, after: int) -> float:
    """(V/b + ‖G‖²) / (V/b' + ‖G‖²), between 1 and b'/b: how much smaller E‖ḡ‖² is at b' than at b.

    1 where both numbers are 0; where the estimate of ‖G‖² is negative, noise dominates.
    """
    signal = max(signal, 0.0)
    return (variance / before + signal) / (variance / after + signal) if variance + signal > 0 else 1.0


@dataclass(frozen=True)
class Transition:
    """A change of the batch size, b → b'.

    Args:
        before: b [samples].
        after: b' [samples].
        initial: b₀, of the first batch, for which the optimizer's values were chosen [samples].
        gain: r, the ratio of the best steps at b' and b.
        squares: ρ, the ratio of E[g²] at b and b'.
    """

    before: int
    after: int
    initial: int
    gain: float
    squares: float

    @classmethod
    def of(cls, statistics: Statistics, before: int, after: int, initial: int, critical: float) -> "Transition":
        """
        Args:
            statistics: unbiased and averaged.
            critical: critical batch size over noise scale, which the gain is to count with.
        """
        variance, signal = statistics.variance, statistics.grad_norm_sq
        gain = ratio_of_squares(critical * variance, signal, before, after)
        return cls(before, after, initial, gain, ratio_of_squares(variance, signal, before, after))

    @property
    def growth(self) -> float:
        """κ = b'/b."""
        return self.after / self.before

    def step(self, family: Family) -> float:
        """How many times as much a step does: r; of an optimizer that divides by √E[g²] at most √(κρ).

        Its rate then grows with √κ at most, as where noise dominates (Malladi et al., NeurIPS 2022). r counts with a
        critical batch size of several noise scales, ρ with one: r/√ρ alone would be more than that.
        """
        if family in (Family.AVERAGE, Family.SIGN):
            return min(self.gain, math.sqrt(self.growth * self.squares))
        return self.gain

    def rate(self, family: Family) -> float:
        """What the learning rate is multiplied by, once the state has followed.

        A step is to do `step` times as much for the same gradient. An optimizer that divides by √E[g²] makes it √ρ
        times as long by itself; a sum of squares that has followed does all of it.
        """
        if family is Family.GRADIENT:
            return self.step(family)
        return 1.0 if family is Family.SUM else self.step(family) / math.sqrt(self.squares)

    def decay(self, family: Family) -> float:
        """What a decoupled weight decay is multiplied by: it, too, is to do `step` times as much in a step.

        It decays them by rate times coefficient; an L2 penalty follows without this, being part of the gradient.
        """
        return self.step(family) / self.rate(family)

    def states(self, family: Family) -> dict[str, float]:
        """Factors on what the optimizer keeps of each parameter, by the names that torch's classes give it.

        Momentum is made smaller by √r: then its noise is that of the new batch, while a step that is r times as long
        would carry the old one r times as far. (r as `step` has it.)
        """
        momentum = 1 / math.sqrt(self.step(family))
        if family is Family.SUM:
            return {"sum": 1 / (self.growth * self.squares)}
        if family is not Family.AVERAGE:
            return {"momentum_buffer": momentum, "exp_avg": momentum}
        squares = dict.fromkeys(
            ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "row_var", "col_var", "variance"), 1 / self.squares
        )
        of_divided = momentum * math.sqrt(self.squares)  # RMSprop's: gradients that were divided already
        return squares | {"exp_inf": 1 / math.sqrt(self.squares), "exp_avg": momentum, "momentum_buffer": of_divided}

    def eps(self, family: Family) -> float:
        """Factor on the ε beside the root of a second moment."""
        factor = {Family.AVERAGE: self.squares, Family.SUM: self.growth * self.squares}.get(family, 1.0)
        return 1 / math.sqrt(factor)

    def second_beta(self, initial: float) -> float:
        """The coefficient of a moving average of squares that keeps its half-life in samples.

        β₂^(b'/b₀) (Marek et al., arXiv:2507.07101), between 0.95 (or β₂, where that is lower) and 0.9999 (or β₂).

        Args:
            initial: β₂ at b₀.
        """
        if not 0 < initial < 1:
            return initial
        return min(max(initial ** (self.after / self.initial), min(0.95, initial)), max(0.9999, initial))
