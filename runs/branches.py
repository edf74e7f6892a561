"""Branches of a run: read again, compared on the same samples, and the critical batch size that they show.

From a checkpoint the run goes on with several sizes, once for each repeat with an order of samples of its own, which
all sizes share. What is compared is therefore paired: a repeat gives one difference, and their scatter its error.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from adadagrad.tests import Statistics
from options.errors import UsageError
from runs.checkpoint import problem_of, run_folder_of, steps_of
from runs.results import read_metrics

FOLDER = "critical"
"""In a run's folder, of its branches."""
CONFIDENCE = 0.9
"""Of all intervals, two-sided."""
DEGREE = 3
"""Of the polynomial that a loss is of the samples, over the length of a branch."""


@dataclass(frozen=True)
class Start:
    """A checkpoint to branch off.

    Attributes:
        options: of the run, as they were in effect.
        step, samples, batch_size: where it stands.
        noise_scale: V/‖G‖² as it was known there [samples], its 90 % interval beside it; None where it was not known.
    """

    path: Path
    options: dict[str, Any]
    step: int
    samples: int
    batch_size: int
    noise_scale: float | None
    noise_scale_interval: tuple[float, float] | None

    @classmethod
    def read(cls, path: Path) -> "Start":
        """
        Raises:
            UsageError: it is no intact checkpoint.
        """
        if problem := problem_of(path):
            raise UsageError(f"{path} {problem}: name another one")
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        controller = saved["controller"]
        known = controller["reported"] or controller["statistics"]
        known = Statistics(**known) if known else None
        return cls(
            path,
            saved["options"],
            *(controller[name] for name in ("steps", "samples", "batch_size")),
            known and known.noise_scale,
            known and known.noise_scale_interval,
        )

    @property
    def folder(self) -> Path:
        """Of its branches."""
        return run_folder_of(self.path.absolute()) / FOLDER / self.path.stem


def starts(places: Sequence[Path]) -> list[Start]:
    """The checkpoints that these are or, of a run's folder, that it has, in the order of their steps.

    Raises:
        UsageError: there is none, or one is not whole.
    """
    paths = []
    for place in places:
        if place.is_file():
            paths.append(place)
            continue
        found = steps_of(run_folder_of(place) / "checkpoints")
        if not found:
            raise UsageError(f"{place} has no checkpoint: give a run's folder, or one of its checkpoints")
        paths += (found[step] for step in sorted(found))
    return [Start.read(path) for path in paths]


@dataclass(frozen=True)
class Branch:
    """One of them.

    Args:
        factor: on the batch size of the checkpoint.
        gain: exponent of the gain by which its rate follows.
        samples: that it goes on for.
        repeat: 0, 1, …; each has an order of samples of its own.
    """

    start: Start
    factor: float
    gain: float
    samples: int
    repeat: int

    @property
    def name(self) -> str:
        return f"x{self.factor:g}_gain{self.gain:g}_samples{self.samples}_repeat{self.repeat}"

    @property
    def folder(self) -> Path:
        return self.start.folder / self.name

    @property
    def batch_size(self) -> int:
        return round(self.factor * self.start.batch_size)

    @property
    def status(self) -> str:
        """finished, interrupted, diverged; unfinished: begun; missing: not begun."""
        file = self.folder / "summary.json"
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["status"]
        return "unfinished" if self.folder.exists() else "missing"

    def losses(self, column: str) -> list[tuple[float, float]]:
        """(samples since the checkpoint, loss): of each evaluation, or of the training between two rows; one that
        diverged has none."""
        if self.status != "finished":
            return []
        metrics = read_metrics(self.folder, ("samples", column))
        points, before = [], 0.0
        for samples, loss in zip(metrics["samples"], metrics[column]):
            begins_here = column != "train_loss" or before >= self.start.samples
            if samples > self.start.samples and loss is not None and begins_here:
                points.append((samples - self.start.samples, loss))
            before = samples
        return points


def final_loss(points: Sequence[tuple[float, float]], column: str) -> float:
    """That by which branches are compared: the last evaluation, or the mean training loss of the second half."""
    if not points:
        return math.inf
    if column != "train_loss":
        return points[-1][1]
    half = points[-1][0] / 2
    weights = np.diff([0.0, *(samples for samples, _ in points)])
    kept = [(loss, weight) for (samples, loss), weight in zip(points, weights) if samples - weight >= half]
    kept = kept or [(points[-1][1], 1.0)]
    return float(np.average([loss for loss, _ in kept], weights=[weight for _, weight in kept]))


@dataclass(frozen=True)
class Known:
    """A mean over repeats and its two-sided 90 % interval; infinite where one repeat has diverged, or is alone."""

    mean: float
    low: float
    high: float
    standard_error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Known":
        if not all(map(math.isfinite, values)):
            return cls(math.inf, math.inf, math.inf, 0.0)
        mean = fmean(values)
        if len(values) < 2:
            return cls(mean, -math.inf, math.inf, math.inf)
        from scipy.stats import t  # it takes its time

        error = stdev(values) / math.sqrt(len(values))
        reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
        return cls(mean, mean - reach, mean + reach, error)


def excesses(losses: Mapping[float, Sequence[float]]) -> dict[float, Known]:
    """By how much the loss of each factor is above that of the smallest one, as a share of it.

    Args:
        losses: by factor, one a repeat; the repeats are the same ones.
    """
    reference = losses[min(losses)]
    return {
        factor: Known.of([(loss - own) / own for loss, own in zip(of_factor, reference)])
        for factor, of_factor in sorted(losses.items())
    }


def largest_within(found: Mapping[float, Known], tolerance: float) -> dict[str, float]:
    """The largest factor up to which the excess stays within the tolerance: by its mean (`factor`), surely (`low`:
    the interval's upper end does) and possibly (`high`: its lower end does). The smallest factor always counts."""

    def last(within) -> float:
        largest = min(found)
        for factor in sorted(found)[1:]:
            if not within(found[factor]):
                break
            largest = factor
        return largest

    return {
        "factor": last(lambda excess: excess.mean <= tolerance),
        "low": last(lambda excess: excess.high <= tolerance),
        "high": last(lambda excess: excess.low <= tolerance),
    }


def is_known(found: Mapping[float, Known], tolerance: float) -> bool:
    """Of every factor it is sure on which side of the tolerance it is."""
    others = [found[factor] for factor in sorted(found)[1:]]
    return all(excess.high <= tolerance or excess.low > tolerance for excess in others)


def inverse_critical_size(curves: Mapping[int, Sequence[tuple[float, float]]]) -> float:
    """1/C of the fit [1/samples]: with it, n samples by batches of b are worth n/(1 + b/C) whatever b.

    That is 1 + b/C times as many samples to an equal loss (McCandlish et al., arXiv:1812.06162), at all the losses that
    the curves have: all points lie on one curve, here a polynomial, and C is where they lie closest to it.

    Args:
        curves: by batch size, (samples, loss).
    """
    sizes = np.concatenate([np.full(len(points), b, float) for b, points in curves.items()])
    samples, losses = np.array([point for points in curves.values() for point in points], float).T

    def misfit(inverse: float) -> float:
        worth = samples / (1 + sizes * inverse)
        basis = np.vander(worth / worth.max(), DEGREE + 1)
        return float(np.square(losses - basis @ np.linalg.lstsq(basis, losses, rcond=None)[0]).sum())

    smallest, largest = min(curves), max(curves)
    grid = np.array([0.0, *np.geomspace(0.01 / largest, 100 / smallest, 80)])
    at = int(np.argmin([misfit(inverse) for inverse in grid]))
    if at == 0 or at == len(grid) - 1:
        return float(grid[at])
    from scipy.optimize import minimize_scalar

    ends = (float(grid[at - 1]), float(grid[at + 1]))
    return float(minimize_scalar(misfit, bounds=ends, method="bounded", options={"xatol": 1e-4 * ends[1]}).x)


def critical_size(by_repeat: Sequence[Mapping[int, Sequence[tuple[float, float]]]]) -> dict[str, float | None]:
    """C of the fit [samples] and its interval, by the scatter of 1/C over the repeats; None: infinite, or not known.

    Left out are sizes that have diverged, or as good as that (to twice the losses of the smallest size), and those with
    fewer points than the fit needs.
    """
    usable = [
        {b: points for b, points in curves.items() if len(points) > DEGREE and points[-1][1] <= 2 * largest}
        for curves in by_repeat
        for largest in [max((loss for _, loss in curves[min(curves)]), default=math.inf)]
    ]
    if not usable or any(len(curves) < 2 for curves in usable):
        return {"critical": None, "low": None, "high": None}
    inverse = Known.of([inverse_critical_size(curves) for curves in usable])
    ends = {"critical": inverse.mean, "low": inverse.high, "high": inverse.low}
    return {name: 1 / value if 0 < value < math.inf else None for name, value in ends.items()}


def compare(branches: Sequence[Branch], column: str, tolerance: float) -> dict[str, Any]:
    """What the branches of one checkpoint show, as critical.json has it.

    Args:
        branches: the repeats that all of them have ended are compared; of several gains the one with the least loss.
        column: the loss: val_loss or train_loss.
        tolerance: on the excess of the loss [share of that of the smallest factor].
    """
    start = branches[0].start
    ended = {(b.factor, b.gain, b.repeat): b for b in branches if b.status in ("finished", "diverged")}
    tried = {(b.factor, b.gain) for b in branches}
    repeats = [r for r in sorted({b.repeat for b in branches}) if all((*one, r) in ended for one in tried)]
    if not repeats:
        return {}
    curves = {key: branch.losses(column) for key, branch in ended.items()}
    of_each = {one: [final_loss(curves[(*one, r)], column) for r in repeats] for one in tried}
    gains: dict[float, float] = {}  # by factor, the one with the least loss: as a rate that is tuned
    for factor, gain in sorted(tried, key=lambda one: fmean(of_each[one])):
        gains.setdefault(factor, gain)
    factors = sorted(gains)
    losses = {factor: of_each[factor, gains[factor]] for factor in factors}
    excess = excesses(losses)
    sizes = {factor: ended[factor, gains[factor], repeats[0]].batch_size for factor in factors}
    fit = critical_size([{sizes[k]: curves[k, gains[k], r] for k in factors} for r in repeats])
    within = largest_within(excess, tolerance)
    known, interval = start.noise_scale, start.noise_scale_interval or (None, None)
    return {
        "step": start.step,
        "samples": start.samples,
        "batch_size": start.batch_size,
        "noise_scale": known,
        "noise_scale_low": interval[0],
        "noise_scale_high": finite(interval[1]),
        "branch_samples": branches[0].samples,
        "loss": column,
        "tolerance": tolerance,
        "factors": [
            {
                "factor": factor,
                "batch_size": sizes[factor],
                "gain": gains[factor],
                "loss": finite(fmean(losses[factor])),
                **{f"excess_{name}": finite(value) for name, value in asdict(excess[factor]).items()},
                "repeats": len(repeats),
            }
            for factor in factors
        ],
        "is_known": is_known(excess, tolerance),
        "within_tolerance": {name: round(factor * start.batch_size) for name, factor in within.items()},
        "largest_tried": sizes[factors[-1]],
        "fit": fit,
        "ratio": fit["critical"] / known if fit["high"] and known else None,
        "ratio_within": within["factor"] * start.batch_size / known if known else None,
    }


def finite(number: float | None) -> float | None:
    """JSON has no infinity."""
    return number if number is not None and math.isfinite(number) else None
