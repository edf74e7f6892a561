"""The time of a step as a line over its batch size, fitted to measured steps."""

import math
from collections import deque
from collections.abc import Sequence

PER_BIN = 8
"""Measured steps that the fit remembers of batches of about one size."""


class StepTime:
    """seconds = α + β · batch_size, fitted robustly to the steps measured last.

    Sizes are binned by factors of √2, so that neither a long stay at one size nor slow growth forgets the others. The
    slope is the weighted median of the slopes between bins (Theil 1950, Sen 1968; weights: how far the two are apart),
    the intercept that of what is left (weights: 1/size), each bin by its medians: neither a few disturbed steps nor a
    bin of them moves the line. With accumulation a step costs whole micro-batches: that is in the times as measured.
    """

    def __init__(self):
        self.bins: dict[int, deque[tuple[float, float]]] = {}

    def add(self, batch_size: float, seconds: float) -> None:
        """A step (or the mean of several) took so long. All ranks must be given the same numbers."""
        own = self.bins.setdefault(round(2 * math.log2(batch_size)), deque(maxlen=PER_BIN))
        own.append((float(batch_size), float(seconds)))

    def fit(self) -> tuple[float, float] | None:
        """α [s], β [s/sample]; None where the sizes do not differ enough to tell (by a half of the smallest)."""
        points = sorted(tuple(_median(values) for values in zip(*own)) for own in self.bins.values())
        return _line_through(points) if points and points[-1][0] >= 1.5 * points[0][0] else None

    def state_dict(self) -> dict:
        return {"bins": [[key, [list(pair) for pair in own]] for key, own in self.bins.items()]}

    def load_state_dict(self, state: dict) -> None:
        self.bins = {key: deque(map(tuple, own), maxlen=PER_BIN) for key, own in state["bins"]}


def _line_through(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Intercept and slope, neither negative; the points by rising size."""
    pairs = [(a, b, s, t) for i, (a, s) in enumerate(points) for b, t in points[i + 1 :]]
    slope = _median([(t - s) / (b - a) for a, b, s, t in pairs], [b - a for a, b, *_ in pairs])
    slope = max(slope, 1e-12)
    return max(_median([t - slope * b for b, t in points], [1 / b for b, _ in points]), 0.0), slope


def _median(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """The value up to which half of the weight lies; the mean of two where it lies between them."""
    ordered = sorted(zip(values, weights or [1.0] * len(values)))
    half, passed = sum(weight for _, weight in ordered) / 2, 0.0
    for i, (value, weight) in enumerate(ordered):
        passed += weight
        if math.isclose(passed, half):
            return (value + ordered[i + 1][0]) / 2
        if passed > half:
            return value
    return ordered[-1][0]
