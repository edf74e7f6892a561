"""The time of training, without what is no training.

Nothing here waits for the device, but for what says so.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


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
    """Times windows of training."""

    def __init__(self, device: torch.device):
        self.device = device
        self.window = Window(Event(device))

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

    def turn(self) -> Callable[[float], dict[str, float]]:
        """Close the window and open the next.

        Returns:
            A function that waits for the device and gives, from the window's samples on all ranks, the times as
            metrics.csv has them, of the mean step.
        """
        window, end = self.window, Event(self.device)
        self.window = Window(end)

        def columns(samples: float) -> dict[str, float]:
            end.wait()
            steps, seconds = window.steps, window.seconds(end)
            return {
                "step_time": seconds / steps,
                "test_time": window.measuring_seconds() / steps,
                "samples_per_second": samples / seconds,
            }

        return columns

    def state_dict(self) -> dict[str, float]:
        """Plain numbers. Waits for the device."""
        now = Event(self.device)
        now.wait()
        window = self.window
        return {"steps": window.steps, "seconds": window.seconds(now), "measuring": window.measuring_seconds()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.window = Window(Event(self.device), state["seconds"], state["measuring"], state["steps"])
