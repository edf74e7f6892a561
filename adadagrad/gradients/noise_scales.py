"""Other noise scales than V/‖G‖², which weight the directions of the gradient otherwise: candidates for what tells the
critical batch size.

Of the samples' gradients g_i, their covariance Σ, its diagonal σ_j², the mean G, and what an optimizer divides by, v̂_j:

| name | scale |
|---|---|
| optimizer | Σ σ_j²/√v̂_j over Σ G_j²/√v̂_j: in the metric in which the optimizer's step is the steepest descent |
| optimizer_squared | Σ σ_j²/v̂_j over Σ G_j²/v̂_j: of the steps themselves, ‖P g‖² with P = 1/√v̂ |
| l1 | (Σ σ_j)² over ‖G‖₁²: for methods that take signs (arXiv:2602.03001) |
| curvature | tr(PHPΣ) over GᵀPHPG, H the Hessian: the critical batch size of a step ηPg on a quadratic at the best η \
(McCandlish et al., arXiv:1812.06162, section 2.2); P = 1 where the optimizer divides by nothing |

‖G‖² is estimated by ‖ḡ‖² minus the noise in it, as everywhere, but for the l1 norm: ‖ḡ‖₁² stands there as it is, so
that this scale cannot be more than about (π/2)·b. tr(PHPΣ) is estimated by one random direction z, whose zᵀPHPz has
this mean: z = Σ ε_i (g_i − ḡ)/√(b−1) with random signs ε_i. H is that of the batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ..control import Family, carry_over
from ..control.smoothing import Smoothing
from ..tests import Statistics
from .estimator import sum_over_ranks
from .isolation import drawing_from, isolated
from .per_sample import BySample
from .samples import Batch, count

SECOND_MOMENTS = ("exp_avg_sq", "square_avg", "sum")
"""What torch's optimizers call their v of a parameter; of the last, a sum, the mean is taken."""
Vector = dict[str, Tensor]
"""By parameter."""


@dataclass(frozen=True)
class Measured:
    """Of one batch: V and ‖G‖² in some metric, for `Smoothing`."""

    batch_size: int
    variance: float
    signal: float

    @property
    def num_groups(self) -> int:
        """Single samples."""
        return self.batch_size

    def statistics(self, unbiased: bool = True) -> Statistics:
        return Statistics(self.batch_size, self.batch_size, self.signal, self.variance)


class NoiseScales:
    """Measures some of them on the micro-batches of a step, beside its training pass, by passes of its own.

    Args:
        names: of `adadagrad.tests.OTHER_SCALES`.
        estimator: gives per-sample gradients.
        optimizer: its second moments are the metric.
        half_life: of the averages [samples], as of `Smoothing`.

    Raises:
        ValueError: `optimizer` or `optimizer_squared`, and the optimizer keeps no second moments.
    """

    def __init__(self, names: tuple[str, ...], estimator: BySample, optimizer: Optimizer, half_life: float):
        self.names, self.estimator, self.optimizer = names, estimator, optimizer
        self.averages = {name: Smoothing(half_life, unbiased=True) for name in names}
        self.samples = 0  # used at the last measurement
        if any(name.startswith("optimizer") for name in names) and not _divides(optimizer):
            raise ValueError(
                f"{type(optimizer).__name__} does not divide each coordinate by a second moment of its own"
            )
        self.forget()

    def forget(self) -> None:
        """What was seen of the present step."""
        self.batches: list[tuple[Callable[[], Batch], Batch, list, Vector]] = []

    def add(self, inputs: Callable[[], Batch], targets: Batch) -> None:
        """A micro-batch of the step, before its training pass.

        Args:
            inputs: makes them.
        """
        self.batches.append((inputs, targets, *self.estimator._before()))

    def measure(self, samples: int, seed: int) -> dict[str, float | None]:
        """The averaged scales [samples] by name; None where they are not known. On all ranks, before the step.

        Args:
            samples: used so far, those of this batch included.
            seed: of the random signs, another one on every rank.
        """
        found = self._of_batch(torch.Generator().manual_seed(seed))
        self.forget()
        passed, self.samples = samples - self.samples, samples
        scales = {}
        for name in self.names:
            known = self.averages[name].add(found[name], passed) if name in found else None
            scales[name] = known.noise_scale if known and known.is_usable else None
        return scales

    def _of_batch(self, generator: torch.Generator) -> dict[str, Measured]:
        total, squares, random, sum_of_signs, n = self._sums(generator)
        mean = {name: own / n for name, own in total.items()}
        variances = {name: ((squares[name] - n * mean[name] ** 2) / (n - 1)).clamp(min=0) for name in mean}
        roots = self._roots()
        found = {}
        for name, power in (("optimizer", 1), ("optimizer_squared", 2)):
            if name in self.names and roots:
                variance = float(
                    sum((v / roots[key] ** power).sum(dtype=torch.float64) for key, v in variances.items())
                )
                norm = sum((m**2 / roots[key] ** power).sum(dtype=torch.float64) for key, m in mean.items())
                found[name] = Measured(n, variance, float(norm) - variance / n)
        if "l1" in self.names:
            deviation = float(sum(v.sqrt().sum(dtype=torch.float64) for v in variances.values()))
            norm = float(sum(m.abs().sum(dtype=torch.float64) for m in mean.values()))
            found["l1"] = Measured(n, deviation**2, norm**2)
        if "curvature" in self.names and (roots or not _divides(self.optimizer)):
            direction = {name: (random[name] - sum_of_signs * mean[name]) / math.sqrt(n - 1) for name in mean}
            noise, signal = (self._curvature(_scaled(own, roots), n) for own in (direction, mean))
            found["curvature"] = Measured(n, noise, signal - noise / n)
        return found

    def _sums(self, generator: torch.Generator) -> tuple[Vector, Vector, Vector, float, int]:
        """Σ g_i, Σ g_i² by coordinate, Σ ε_i g_i, Σ ε_i, and the number of samples; over all ranks."""
        total, squares, random = ({n: torch.zeros_like(p) for n, p in self._parameters().items()} for _ in range(3))
        counts = torch.zeros(2, dtype=torch.float64, device=self.estimator.device)
        for inputs, targets, states, buffers in self.batches:
            with drawing_from(states, self.estimator.device):
                for x, y in self.estimator._chunks(inputs(), targets):
                    gradients = self.estimator.per_sample_gradients(x, y, buffers)
                    signs = 2.0 * torch.randint(2, (count(x),), generator=generator) - 1
                    counts += torch.tensor([count(x), float(signs.sum())], dtype=torch.float64).to(counts.device)
                    for name, own in gradients.items():
                        total[name] += own.sum(0)
                        squares[name] += own.square().sum(0)
                        random[name] += torch.tensordot(signs.to(own), own, 1)
        for vector in (total, squares, random):
            for own in vector.values():
                sum_over_ranks(own)
        n, sum_of_signs = sum_over_ranks(counts).tolist()
        return total, squares, random, sum_of_signs, round(n)

    def _parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.estimator.parameters()

    def _roots(self) -> Vector:
        """√v̂ + ε as the optimizer divides by it; empty where it has not taken a step or divides by nothing."""
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        roots = {}
        for name, parameter in self._parameters().items():
            state, group = self.optimizer.state.get(parameter, {}), groups.get(id(parameter), {})
            key = next((key for key in SECOND_MOMENTS if key in state), None)
            steps = float(state.get("step", 0))
            if key is None or not steps:
                return {}
            weight = 1.0
            if key == "exp_avg_sq":
                weight = 1 - float(group["betas"][1]) ** steps
            elif key == "sum":
                weight = steps
            roots[name] = (state[key] / weight).sqrt() + group.get("eps", 0.0)
        return roots

    def _curvature(self, vector: Vector, n: int) -> float:
        """vᵀHv of the batch's mean loss."""
        product, parameters = 0.0, self._parameters()
        for inputs, targets, states, buffers in self.batches:
            inputs = inputs()
            with (
                drawing_from(states, self.estimator.device),
                isolated(self.estimator.model, buffers),
                sdpa_kernel(SDPBackend.MATH),  # the others have no second derivatives
                torch.enable_grad(),
            ):
                # The gradients are linear in the loss, whatever its reduction over samples is.
                losses = self.estimator.loss(self.estimator._call(inputs), targets)
                scale = 1.0 if self.estimator.adds_up else float(count(inputs))
                own = torch.autograd.grad(losses, list(parameters.values()), create_graph=True, allow_unused=True)
                slope = sum((g * vector[name]).sum() for name, g in zip(parameters, own) if g is not None)
                if not slope.requires_grad:  # a loss that is linear in the parameters
                    continue
                again = torch.autograd.grad(slope, list(parameters.values()), allow_unused=True)
                product += scale * float(
                    sum(
                        (h * vector[name]).sum(dtype=torch.float64)
                        for name, h in zip(parameters, again)
                        if h is not None
                    )
                )
        return float(sum_over_ranks(torch.tensor(product, dtype=torch.float64, device=self.estimator.device))) / n

    def state_dict(self) -> dict:
        """Plain numbers, for a checkpoint."""
        return {"samples": self.samples, "averages": {name: own.state_dict() for name, own in self.averages.items()}}

    def load_state_dict(self, state: dict) -> None:
        self.samples = state["samples"]
        for name, own in self.averages.items():
            if name in state["averages"]:
                own.load_state_dict(state["averages"][name])


def _divides(optimizer: Optimizer) -> bool:
    """By second moments, each coordinate by its own."""
    one_for_all = any("sum_of_squares" in group for group in optimizer.param_groups)  # AdaGrad-Norm
    return carry_over.family(optimizer) in (Family.AVERAGE, Family.SUM) and not one_for_all


def _scaled(vector: Vector, roots: Vector) -> Vector:
    return {name: own / roots[name] if roots else own for name, own in vector.items()}
