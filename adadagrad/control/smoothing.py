"""Statistics averaged over steps: each quantity by itself, divided afterwards."""

import math
from dataclasses import dataclass

from ..tests import Moments, Statistics

LEAST_MEASUREMENTS = 4
"""Measurements within a half-life."""
OF_ALL = 1 / 4
"""The largest half-life, in samples so far: a young run changes about as fast as it ages."""
KEPT = 1 - 1 / 64
"""Of the estimates of 2/d so far, with each further one."""
AVERAGED = ("grad_norm_sq", "variance", "variance_inner_product")
"""V_orth follows from these: of a single noisy batch it may be no number, where its parts are."""


@dataclass
class Smoothing:
    """Exponential averages of V, ‖G‖² and V_ip, debiased; their half-life is counted in samples.

    A quotient of two noisy numbers is biased, and a single batch's ‖G‖² may be negative: numerator and denominator are
    averaged apart, as everyone does who acts on them (McCandlish et al., arXiv:1812.06162, appendix A). Since the
    half-life is counted in samples it means the same at every batch size. It is at most a quarter of the samples so
    far: ‖G‖² falls a hundredfold within the first thousands, and an average over all of them is still the first ones
    when these are long forgotten. It takes in four measurements at least: at batches as large as the half-life nothing
    would be averaged, and size and learning rate go up and down. Averages start at 0 and are divided by the weight that
    has come in so far, so that the first measurement counts in full. Nothing that is not finite enters them.

    How well ‖G‖² is known comes from the scatter of the measurements themselves. That of one batch has the variance
    (2/d)·u with u = (V/b)·(V/b + 2‖G‖²) and an effective number of dimensions d (of Gaussian gradients, 2 tr(Σ²)/b² +
    4 GᵀΣG/b). 2/d is estimated from the differences between neighbouring measurements, so that what ‖G‖² itself does
    over the run is not taken for noise (von Neumann 1941); the average's variance follows with the weights as they are.

    Args:
        half_life: samples after which a measurement counts half, once they are a quarter of all and
            `LEAST_MEASUREMENTS` more have come; 0: the last measurement alone counts.
        unbiased: take ‖G‖² = ‖ḡ‖² − V/b and leave-one-out products; else the published ‖ḡ‖² and p_i.
    """

    half_life: float = 0.0
    unbiased: bool = False
    samples: int = 0  # so far
    weight: float = 0.0
    averages: dict[str, float] | None = None
    variance_of_sum: float = 0.0  # Σ w² u, of the sum that `averages` holds
    scatter: tuple[float, float] = (0.0, 0.0)  # sum and weight of the estimates of 2/d
    last: tuple[float, float] | None = None  # ‖G‖² and u of the last measurement

    def add(self, moments: Moments, samples: int) -> Statistics:
        """Add what a batch has measured; gives the averaged statistics, for a batch of its size.

        Args:
            moments: of the batch.
            samples: that were used since the last call, this batch included.
        """
        self.samples += samples
        measured = moments.statistics(self.unbiased)
        if not measured.is_usable or not self.half_life:
            return measured
        half_life = min(self.half_life, OF_ALL * self.samples)
        half_lives = min(samples / half_life, 1 / LEAST_MEASUREMENTS)
        new = -math.expm1(-math.log(2) * half_lives)
        before, keep = self.averages or {}, 1 - new
        values = {name: value for name in AVERAGED if (value := getattr(measured, name)) is not None}
        self.weight = keep * self.weight + new
        self.averages = {name: keep * before.get(name, 0.0) + new * value for name, value in values.items()}
        averages = {name: value / self.weight for name, value in self.averages.items()}
        margin = self._margin(measured, averages["grad_norm_sq"], new) if self.unbiased else None
        return Statistics.from_averages(moments.batch_size, moments.num_groups, **averages, margin=margin)

    def _margin(self, measured: Statistics, signal: float, new: float) -> float | None:
        """Half of the 90 % interval of the averaged ‖G‖²; None before there are two differences."""
        noise = measured.variance / measured.batch_size
        u = noise * (noise + 2 * max(signal, 0.0))
        if not math.isfinite(u):  # numbers too large for their squares: not known, and nothing of it is kept
            return None
        self.variance_of_sum = (1 - new) ** 2 * self.variance_of_sum + new**2 * u
        if self.last and self.last[1] + u > 0:
            difference = measured.grad_norm_sq - self.last[0]
            found = difference * difference / (self.last[1] + u)
            if math.isfinite(found):
                self.scatter = tuple(KEPT * old + add for old, add in zip(self.scatter, (found, 1.0)))
        self.last = (measured.grad_norm_sq, u)
        total, count = self.scatter
        if count < 1.5:
            return None
        # Differences share measurements: n of them have 2n/3 degrees of freedom.
        return _quantile(2 / 3 * count) * math.sqrt(total / count * self.variance_of_sum) / self.weight

    def state_dict(self) -> dict:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        for name in ("weight", "averages", "variance_of_sum"):
            setattr(self, name, state[name])
        self.samples = state.get("samples", 10**18)  # of an earlier checkpoint: old enough
        self.scatter, self.last = tuple(state["scatter"]), state["last"] and tuple(state["last"])


def _quantile(degrees: float) -> float:
    """Of Student's t at 95 %, by the expansion of Cornish and Fisher; a little below it where degrees are few."""
    return 1.645 + 1.524 / degrees + 1.42 / degrees**2 + 0.98 / degrees**3
