"""The optimizer comes along when the batch grows: on noisy quadratics with known curvature and noise, the loss is that of
the batch which never grew.

A step of b' is worth r steps of b; losses are compared after as many steps of b as the steps were worth. Where noise
dominates (r = b'/b) that is after equal samples.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import optim
from adadagrad.control import Controller, Family, LearningRateScaling, Stagewise, Transition, carry_over
from adadagrad.tests import Moments, Statistics

B0, B1 = 16, 256
JUMP, GRADUAL = [(0, B0), (300, B1)], [(0, B0), (150, 32), (250, 64), (350, 128), (450, B1)]
MARKS = (500, 700, 900, 1200, 1500, 1800)  # steps of B0


@dataclass(frozen=True)
class Quadratic:
    """f(w) = Σ h (w − w*)² / 2 a copy; per-sample gradients have the variance noise² · h, coordinate by coordinate."""

    noise: float
    start: float = 1.0
    optimum: float = 0.0
    copies: int = 96
    shape: tuple[int, ...] = (24,)

    @property
    def curvature(self) -> Tensor:
        return torch.logspace(0, -1.3, math.prod(self.shape), dtype=torch.float64).view(self.shape)

    @property
    def variance(self) -> Tensor:
        return self.noise**2 * self.curvature


NOISE, SIGNAL = Quadratic(noise=9.0), Quadratic(noise=0.1)


def losses(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    problem: Quadratic,
    sizes: list[tuple[int, int]],
    coupling: str = "full",
    seed: int = 0,
    matrices: bool = False,
) -> list[float]:
    """Mean loss of the copies at the marks; the batch has `sizes`: (steps of B0, from there on this size)."""
    generator = torch.Generator().manual_seed(seed)
    h, variance, copies = problem.curvature, problem.variance, problem.copies
    start = torch.full((copies, *problem.shape), problem.start, dtype=torch.float64)
    weights = [nn.Parameter(part) for part in start] if matrices else [nn.Parameter(start)]
    optimizer = make(weights)
    rate = optimizer.param_groups[0]["lr"]
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    family = carry_over.family(optimizer) if coupling == "full" else None
    scaling = LearningRateScaling("adascale", B0, adaptive_optimizer=not is_sgd, family=family)
    b, done, found, marks = B0, 0.0, [], list(MARKS)
    while marks:
        errors = torch.stack([weight.detach() for weight in weights]).view(copies, *problem.shape) - problem.optimum
        signal = float((h * errors).square().sum()) / copies
        statistics = Statistics(b, b, signal, float(variance.sum()))
        if (size := max(entry for entry in sizes if entry[0] <= done)[1]) != b:
            if (transition := scaling.transition(b, size, statistics)) is not None:
                carry_over.apply(transition, optimizer)
            b = size
        factor, decay = (scaling(b, statistics), scaling.decay(b, statistics)) if b != B0 else (1.0, 1.0)
        if coupling == "none":
            factor = decay = 1.0
        optim.set_learning_rate(optimizer, rate * factor, decay)
        noise = torch.randn(errors.shape, dtype=torch.float64, generator=generator)
        gradients = h * errors + (variance / b).sqrt() * noise
        for weight, gradient in zip(weights, gradients if matrices else [gradients]):
            weight.grad = gradient
        optimizer.step()
        done += (statistics.variance / B0 + signal) / (statistics.variance / b + signal)
        while marks and done >= marks[0] - 1e-6:
            now = torch.stack([weight.detach() for weight in weights]).view(errors.shape) - problem.optimum
            found.append(0.5 * float((h * now.square()).sum()) / copies)
            marks.pop(0)
    return found


def worst_ratio(make, problem: Quadratic, sizes, coupling: str = "full", **kinds) -> tuple[float, list[float]]:
    ratios = [
        grown / never
        for grown, never in zip(
            losses(make, problem, sizes, coupling, seed=1, **kinds), losses(make, problem, [(0, B0)], seed=0, **kinds)
        )
    ]
    return max(max(ratio, 1 / ratio) for ratio in ratios), ratios


if __name__ == "__main__":
    import sys

    OPT = {
        "sgd": lambda w: torch.optim.SGD(w, lr=0.1),
        "momentum": lambda w: torch.optim.SGD(w, lr=0.01, momentum=0.9),
        "adam0.9": lambda w: torch.optim.Adam(w, lr=0.01, betas=(0.9, 0.9)),
        "adam0.95": lambda w: torch.optim.Adam(w, lr=0.01, betas=(0.9, 0.95)),
        "adam0.999": lambda w: torch.optim.Adam(w, lr=0.01, betas=(0.9, 0.999)),
        "adamw": lambda w: torch.optim.AdamW(w, lr=0.01, betas=(0.9, 0.999), weight_decay=0.1),
        "rmsprop": lambda w: torch.optim.RMSprop(w, lr=0.01),
        "rmspropm": lambda w: torch.optim.RMSprop(w, lr=0.001, momentum=0.9),
        "centered": lambda w: torch.optim.RMSprop(w, lr=0.01, centered=True),
        "adagrad": lambda w: torch.optim.Adagrad(w, lr=0.2),
        "adagradnorm": lambda w: optim.AdaGradNorm(w, lr=15.0),
        "nadam": lambda w: torch.optim.NAdam(w, lr=0.01),
        "radam": lambda w: torch.optim.RAdam(w, lr=0.01),
        "muon": lambda w: torch.optim.Muon(w, lr=0.002, weight_decay=0.0),
    }
    for n in sys.argv[1].split(","):
        kw = dict(matrices=True) if n == "muon" else {}
        for pn, pr in (("noise", NOISE), ("signal", SIGNAL)):
            if n == "muon":
                pr = Quadratic(noise=pr.noise, shape=(6, 4), copies=6)
            for sn, sc in (("jump", JUMP), ("gradual", GRADUAL)):
                for c in ("full", "rate", "none"):
                    print(n, pn, sn, c, *(f"{x:.2f}" for x in worst_ratio(OPT[n], pr, sc, c, **kw)[1]), flush=True)
