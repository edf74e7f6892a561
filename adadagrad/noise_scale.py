"""The gradient noise scale in loops that cannot be watched: from norms that are there anyway, from Adam's own state."""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from .control.carry_over import parts
from .gradients.estimator import norm_sq, own_part
from .tests import Moments


@dataclass(frozen=True)
class NoiseScale:
    """V and ‖G‖², and their quotient (McCandlish et al., arXiv:1812.06162).

    One batch's are noisy: average both over many, each by itself, and divide afterwards (`Smoothing` does; so does a
    `Controller` that is given the `moments`).

    Args:
        variance: V, the trace of the covariance of single samples' gradients.
        grad_norm_sq: ‖G‖², unbiased: of one batch it may be negative.
        batch_size: b, of the batches that they come from [samples].
        num_groups: gradients that were compared.
    """

    variance: float
    grad_norm_sq: float
    batch_size: int
    num_groups: int

    @property
    def value(self) -> float | None:
        """V/‖G‖² [samples]; None where ‖G‖² is not positive or a number not finite."""
        found = self.variance / self.grad_norm_sq if self.grad_norm_sq > 0 else math.nan
        return found if math.isfinite(found) else None

    @property
    def moments(self) -> Moments:
        """Of one batch that shows the same, for `Smoothing.add` and `Controller.update`."""
        norm = self.grad_norm_sq + self.variance / self.batch_size
        total = (self.num_groups - 1) * self.variance + self.batch_size * norm
        return Moments(self.batch_size, self.num_groups, norm, total)

    @classmethod
    def from_micro_batches(
        cls, micro_norm_sq: float, micro_batch_size: int, grad_norm_sq: float, batch_size: int
    ) -> "NoiseScale":
        """From gradients before and after they are averaged: E‖ḡ_n‖² = ‖G‖² + V/n for any n.

        Args:
            micro_norm_sq: ‖ḡ_k‖², the mean over the micro-batches (of all processes).
            micro_batch_size: their size [samples].
            grad_norm_sq: ‖ḡ‖² of the whole batch, before clipping.
            batch_size: its size [samples].

        Raises:
            ValueError: the batch is no larger than a micro-batch.
        """
        if batch_size <= micro_batch_size:
            raise ValueError(
                f"a batch of {batch_size} in micro-batches of {micro_batch_size}: two or more are compared"
            )
        variance = (micro_norm_sq - grad_norm_sq) / (1 / micro_batch_size - 1 / batch_size)
        signal = (batch_size * grad_norm_sq - micro_batch_size * micro_norm_sq) / (batch_size - micro_batch_size)
        return cls(variance, signal, batch_size, batch_size // micro_batch_size)

    @classmethod
    def from_adam(
        cls, optimizer: torch.optim.Optimizer, batch_size: int, group: dist.ProcessGroup | None = None
    ) -> "NoiseScale | None":
        """From the averages m and v of Adam (AdamW, NAdam, …), without any hook.

        With gradients G + noise of variance σ²/b, E m̂² = G² + ρσ²/b and E v̂ = G² + σ²/b, where ρ is the sum of the
        squares of m's weights, (1 − β₁)/(1 + β₁) once m is settled. So σ²/b = (v̂ − m̂²)/(1 − ρ), G² = (m̂² − ρv̂)/(1 − ρ),
        summed over all parameters. It supposes that G hardly moves while v looks back, and that the batch was
        `batch_size` all the time; L2 penalties count as gradient. docs/integrations.md has where it holds.

        Args:
            optimizer: with `exp_avg`, `exp_avg_sq`, `step` in its state; of shards, each process has its own.
            batch_size: of the steps that v looks back on [samples].
            group: processes over which the parameters are spread beside DTensor's own (stages of a pipeline).
                With it or with shards, all processes call.

        Returns:
            None where it cannot be known: v is too young (`SETTLED` of its windows), ‖G‖² is not positive, or the
            noise of a batch is below the gradient itself (b above the noise scale): then v − m² is what G has moved.
        """
        noise, signal, age = _by_adam(optimizer, group)
        if not (age > SETTLED - 1e-9 and 0 < signal <= noise < math.inf):
            return None
        return cls(noise * batch_size, signal, batch_size, batch_size)


SETTLED = 1.0
"""Steps that v has averaged, in its own windows 1/(1 − β₂)."""


def _by_adam(optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None = None) -> tuple[float, float, float]:
    """σ²/b, ‖G‖² as they come out, and v's age in its windows (the youngest's); on shards, of all processes."""
    kinds: dict[Any, list[tuple[Tensor, Tensor, float]]] = defaultdict(list)
    age = math.inf
    for part in parts(optimizer):
        for own in part.param_groups:
            for parameter in own["params"]:
                state = part.state.get(parameter, {})
                if "exp_avg_sq" in state and "exp_avg" in state:
                    step, (first, second) = float(state["step"]), map(float, own["betas"])
                    kinds[_spread(parameter)].append((*_debiased(state, step, first, second),))
                    age = min(age, step * min(1 - second, (1 - first) / 2))
    if not kinds:
        return math.nan, math.nan, 0.0
    total = sum(_summed(spread, numbers) for spread, numbers in kinds.items())
    if group is not None:
        dist.all_reduce(total, group=group)
    noise, signal = total.tolist()
    return noise, signal, age


def _debiased(state: dict[str, Tensor], step: float, first: float, second: float) -> tuple[Tensor, Tensor, float]:
    """Σ m̂² and Σ v̂ of a parameter's own part, float64 (), and ρ after so many steps."""
    mean, squares = own_part(state["exp_avg"]), own_part(state["exp_avg_sq"])
    seen = 1 - first**step
    rho = (1 - first) / (1 + first) * (1 + first**step) / seen
    return norm_sq([mean]) / seen**2, squares.sum(dtype=torch.float64) / (1 - second**step), rho


def _spread(parameter: Tensor) -> Any:
    """The meshes' dimensions over which its parts are spread."""
    if not isinstance(parameter, DTensor):
        return ()
    dims = enumerate(parameter.placements)
    return tuple(parameter.device_mesh.get_group(dim) for dim, place in dims if isinstance(place, Shard))


def _summed(spread: Iterable[dist.ProcessGroup], numbers: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """σ²/b and ‖G‖² of these parameters, float64 (2,)."""
    noise = sum((squares - mean) / (1 - rho) for mean, squares, rho in numbers)
    signal = sum((mean - rho * squares) / (1 - rho) for mean, squares, rho in numbers)
    total = torch.stack([noise, signal])
    for own in spread:
        dist.all_reduce(total, group=own)
    return total
