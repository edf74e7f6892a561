"""Statistics averaged over steps: each quantity by itself, divided afterwards."""

import math
from dataclasses import dataclass

from ..tests import Moments, Statistics

LEAST_MEASUREMENTS = 4
"""Measurements within a half-life."""
AVERAGED = ("grad_norm_sq", "variance", "variance_inner_product")
"""V_orth follows from these: of a single noisy batch it may be no number, where its parts are."""


@dataclass
class Smoothing:
    """Exponential averages of V, ‖G‖² and V_ip, debiased; their half-life is counted in samples.

    A quotient of two noisy numbers is biased, and a single batch's ‖G‖² may be negative: numerator and denominator are
    averaged apart, as everyone does who acts on them (McCandlish et al., arXiv:1812.06162, appendix A). Since the
    half-life is counted in samples it means the same at every batch size. It takes in four measurements at least: at
    batches as large as the half-life nothing would be averaged, and size and learning rate go up and down. Averages
    start at 0 and are divided by the weight that has come in so far, so that the first measurement counts in full.
    Nothing that is not finite enters them.

    Args:
        half_life: samples after which a measurement counts half, once `LEAST_MEASUREMENTS` more have come; 0: the last
            measurement alone counts.
        unbiased: take ‖G‖² = ‖ḡ‖² − V/b and leave-one-out products; else the published ‖ḡ‖² and p_i.
    """

    half_life: float = 0.0
    unbiased: bool = False
    weight: float = 0.0
    averages: dict[str, float] | None = None

    def add(self, moments: Moments, samples: int) -> Statistics:
        """Add what a batch has measured; gives the averaged statistics, for a batch of its size.

        Args:
            moments: of the batch.
            samples: that were used since the last call, this batch included.
        """
        measured = moments.statistics(self.unbiased)
        if not measured.is_usable or not self.half_life:
            return measured
        half_lives = min(samples / self.half_life, 1 / LEAST_MEASUREMENTS)
        new = -math.expm1(-math.log(2) * half_lives)
        before, keep = self.averages or {}, 1 - new
        values = {name: value for name in AVERAGED if (value := getattr(measured, name)) is not None}
        self.weight = keep * self.weight + new
        self.averages = {name: keep * before.get(name, 0.0) + new * value for name, value in values.items()}
        averages = (value / self.weight for value in self.averages.values())
        return Statistics.from_averages(moments.batch_size, moments.num_groups, *averages)

    def state_dict(self) -> dict:
        return {"weight": self.weight, "averages": self.averages}

    def load_state_dict(self, state: dict) -> None:
        self.weight, self.averages = state["weight"], state["averages"]
