"""The time of training: what a step takes on the slowest rank, without what is no training.

Nothing here waits for the device, but for what says so.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from adadagrad.control.step_time import StepTime


class Event:
    """A moment of the device: when all that is queued on it so far is done. On a CPU that is now."""

    def __init__(self, device: torch.device):
        self.at, self.event = time.perf_counter(), None
        if device.type != "cpu":
            self.event = torch.get_device_module(device).Event(enable_timing=True)
            self.event.record()

    def wait(self) -> None:
        """The host waits until it is past."""
        if self.event is not None:
            self.event.synchronize()

    def seconds_since(self, earlier: "Event") -> float:
        """Both are past."""
        return self.at - earlier.at if self.event is None else earlier.event.elapsed_time(self.event) / 1000


@dataclass
class Window:
    """The training between two rows: its steps, and the time between that is no training or went into measuring.

    Args:
        seconds_before, measuring_before: what an earlier process has spent in it, without pauses [s].
    """

    start: Event
    seconds_before: float = 0.0
    measuring_before: float = 0.0
    steps: int = 0
    pauses: list[tuple[Event, Event]] = field(default_factory=list)
    measurements: list[tuple[Event, Event]] = field(default_factory=list)

    def seconds(self, end: Event) -> float:
        """Of training; `end` is past."""
        return self.seconds_before + end.seconds_since(self.start) - _sum(self.pauses)

    def measuring_seconds(self) -> float:
        """Spent by the estimator of the gradients' moments."""
        return self.measuring_before + _sum(self.measurements)


def _sum(pairs: list[tuple[Event, Event]]) -> float:
    return sum(end.seconds_since(start) for start, end in pairs)


class Clock:
    """Times windows of training on every rank, and teaches `step_time` what a step takes on the slowest one.

    The other ranks' times of a window travel with the numbers of the next row (metrics.py), so that no rank waits.

    Args:
        step_time: the fit over batch sizes.
    """

    def __init__(self, device: torch.device, step_time: StepTime):
        self.device, self.step_time = device, step_time
        self.window = Window(Event(device))
        self.is_first = (
            True  # the first step of a process makes things that later ones find: its window teaches nothing
        )
        self.of_last: tuple[float, float] | None = None  # mean batch size and own seconds a step of the window before

    def start(self) -> None:
        """The training begins; what went before, setting up, does not count."""
        self.window.start = Event(self.device)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is inside is no training; its time does not count."""
        start = Event(self.device)
        yield
        self.window.pauses.append((start, Event(self.device)))

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """What is inside is the estimator's own work."""
        start = Event(self.device)
        yield
        self.window.measurements.append((start, Event(self.device)))

    def turn(self) -> "Turned":
        """Close the window and open the next."""
        turned = Turned(self, self.window, Event(self.device), self.of_last, self.is_first)
        self.window, self.is_first = Window(turned.end), False
        return turned

    def state_dict(self) -> dict[str, float]:
        """Plain numbers. Waits for the device."""
        now = Event(self.device)
        now.wait()
        window = self.window
        return {"steps": window.steps, "seconds": window.seconds(now), "measuring": window.measuring_seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.window = Window(Event(self.device), state["seconds"], state["measuring"], state["steps"])


@dataclass(frozen=True)
class Turned:
    """A closed window."""

    clock: Clock
    window: Window
    end: Event
    before: tuple[float, float] | None
    is_first: bool

    @property
    def seconds_before(self) -> float:
        """This rank's time of a step in the window before, 0 where there was none; the other ranks are to have it."""
        return self.before[1] if self.before else 0.0

    def columns(self, samples: float, seconds_before: float) -> dict[str, float]:
        """The times as metrics.csv has them, of the mean step. Waits for the device.

        Args:
            samples: of the window, on all ranks.
            seconds_before: the largest over the ranks.
        """
        self.end.wait()
        steps, seconds = self.window.steps, self.window.seconds(self.end)
        if self.before:
            self.clock.step_time.add(self.before[0], seconds_before)
        if not self.is_first:
            self.clock.of_last = samples / steps, seconds / steps
        return {
            "step_time": seconds / steps,
            "test_time": self.window.measuring_seconds() / steps,
            "samples_per_second": samples / seconds,
        }
