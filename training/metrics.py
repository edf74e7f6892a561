"""What a run measures of itself: how far it is, training totals since the last log line, the validation metrics."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric, Metric


@dataclass
class Progress:
    """How far a run has come, and what it has said once and for all."""

    batch_size: int
    steps: int = 0
    samples: int = 0
    best_step: int | None = None  # the checkpoint with the best validation metric
    undecided: str = ""  # why the last test decided nothing
    notices: list[str] = field(default_factory=list)
    cut_off: dict[str, Any] = field(default_factory=dict)  # what `step` gave, where a signal cut the evaluation off

    def results(self) -> dict[str, float]:
        """As summary.json has it."""
        return {
            "steps": self.steps,
            "samples": self.samples,
            "mean_batch_size": self.samples / max(self.steps, 1),
            "final_batch_size": self.batch_size,
        }


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


class Reading:
    """Numbers on their way from the devices of all ranks to the host, which goes on until it needs them.

    Args:
        numbers: float64 (n,), on this rank's device.
    """

    def __init__(self, numbers: Tensor):
        rows = [numbers]
        if dist.is_initialized():
            rows = [torch.empty_like(numbers) for _ in range(dist.get_world_size())]
            dist.all_gather(rows, numbers)
        self.rows = torch.stack(rows).to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self.arrival = Event(numbers.device)

    def by_rank(self) -> list[list[float]]:
        """The numbers of every rank. The host waits for them."""
        self.arrival.wait()
        return self.rows.tolist()


@dataclass
class Window:
    """A stretch of training between two marks: what it holds besides training, and how many steps."""

    start: Event
    seconds_before: float = 0.0  # in an earlier process, without its pauses
    test_seconds_before: float = 0.0
    pauses: list[tuple[Event, Event]] = field(default_factory=list)
    tests: list[tuple[Event, Event]] = field(default_factory=list)
    steps: set[int] = field(default_factory=set)

    def seconds(self, end: Event) -> float:
        """Of training; `end` is past."""
        return self.seconds_before + end.seconds_since(self.start) - _sum(self.pauses)

    def test_seconds(self) -> float:
        return self.test_seconds_before + _sum(self.tests)


def _sum(pairs: list[tuple[Event, Event]]) -> float:
    return sum(end.seconds_since(start) for start, end in pairs)


def sum_over_samples(losses: Tensor, n: int) -> Tensor:
    """Σ ℓ_i of n samples, (): from their losses (n,) or the mean of these ()."""
    return losses.sum() if losses.dim() else losses * n


class Totals:
    """Loss, metrics and time since the last row; kept on the device, so that no step waits for the host.

    Args:
        metrics: by name, a function of outputs and targets → a number for each sample (n,).
    """

    def __init__(self, device: torch.device, metrics: dict[str, Callable[[Any, Any], Tensor]]):
        self.device, self.metrics = device, metrics
        self.span = Window(Event(device))
        self.timed: tuple[float, float] | None = (
            None  # mean batch size and seconds a step of the last span that is past
        )
        self.is_first = True
        self._clear()

    def _clear(self) -> None:
        # loss, metrics, samples
        self.sums = torch.zeros(2 + len(self.metrics), dtype=torch.float64, device=self.device)
        self.not_finite_at = torch.full((), math.inf, dtype=torch.float64, device=self.device)

    def start_clock(self) -> None:
        """The training begins; what went before, setting up, does not count."""
        self.span.start = Event(self.device)

    def state_dict(self) -> dict[str, Any]:
        now = Event(self.device)
        now.wait()
        return {
            "sums": self.sums.cpu(),
            "not_finite_at": self.not_finite_at.cpu(),
            "steps": sorted(self.span.steps),
            "test_time": self.span.test_seconds(),
            "seconds": self.span.seconds(now),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.not_finite_at.copy_(state["not_finite_at"])
        self.span = Window(Event(self.device), state["seconds"], state["test_time"], steps=set(state["steps"]))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is inside is no training; its time does not count."""
        start = Event(self.device)
        yield
        self.span.pauses.append((start, Event(self.device)))

    @contextlib.contextmanager
    def test(self) -> Iterator[None]:
        """What is inside is the test's own work."""
        start = Event(self.device)
        yield
        self.span.tests.append((start, Event(self.device)))

    @torch.no_grad()
    def add(self, losses: Tensor, outputs: Any, targets: Any, n: int, step: int) -> None:
        """A micro-batch of n samples; their losses (n,), or the mean of these ()."""
        loss = sum_over_samples(losses.double(), n)
        measured = [metric(outputs, targets).sum() for metric in self.metrics.values()]
        self.sums += torch.stack([loss, *measured, torch.full_like(loss, n)])
        at = torch.where(torch.isfinite(loss), math.inf, float(step))
        self.not_finite_at = torch.minimum(self.not_finite_at, at)
        self.span.steps.add(step)

    def read(self) -> Callable[[], tuple[dict[str, float], int | None, tuple[float, float] | None]]:
        """Start anew. What is given back waits for the device and says what the time since the last call was like:
        means over all ranks; the first step whose loss was not finite; and, of the stretch before that one, as the
        times of other ranks come with the next numbers, the mean batch size and the slowest rank's seconds a step."""
        before, size = self.timed or (math.nan, 0.0), self.timed and self.timed[0]
        numbers = torch.cat([self.sums, self.not_finite_at[None], torch.full_like(self.sums[:1], before[1])])
        reading, span, end = Reading(numbers), self.span, Event(self.device)
        is_first, self.is_first = self.is_first, False
        self.span = Window(end)
        self._clear()

        def statistics() -> tuple[dict[str, float], int | None, tuple[float, float] | None]:
            *sums, counts, not_finite, seconds_before = zip(*reading.by_rank())
            end.wait()
            seconds, samples, at = span.seconds(end), sum(counts), min(not_finite)
            if not is_first:  # the first step of a process makes things that later ones find
                self.timed = samples / len(span.steps), seconds / len(span.steps)
            means = {f"train_{name}": sum(of_ranks) / samples for name, of_ranks in zip(("loss", *self.metrics), sums)}
            return (
                {
                    **means,
                    "step_time": seconds / len(span.steps),
                    "test_time": span.test_seconds() / len(span.steps),
                    "samples_per_second": samples / seconds,
                },
                None if math.isinf(at) else int(at),
                (size, max(seconds_before)) if size else None,
            )

        return statistics


class Validation:
    """Loss and metrics over the validation samples, and the best of them so far; sums run over all ranks.

    Args:
        loss: (outputs, targets) → the samples' losses (n,), or their mean ().
        metrics: by name, a Metric of outputs and targets, or a function of the mean loss. The first decides which
            evaluation is the best; where there is none, the loss does.
    """

    def __init__(
        self,
        loss: Callable[[Any, Any], Tensor],
        metrics: dict[str, Metric | Callable[[float], float]],
        device: torch.device,
    ):
        self.loss = loss
        # By default it would leave out losses that are NaN.
        self.mean_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(device)
        named = {f"val_{name}": metric for name, metric in metrics.items()}
        self.metrics = {name: metric.to(device) for name, metric in named.items() if isinstance(metric, Metric)}
        self.of_loss = {name: function for name, function in named.items() if name not in self.metrics}
        self.names = ("val_loss", *named)
        self.objective = next(iter(named), "val_loss")
        first = self.metrics.get(self.objective)
        self.larger_is_better = first is not None and first.higher_is_better is not False
        self.history: list[dict[str, float]] = []

    def update(self, outputs: Any, targets: Any) -> None:
        losses = self.loss(outputs, targets)
        self.mean_loss.update(losses if losses.dim() else losses.expand(len(tree_leaves(targets)[0])))
        for metric in self.metrics.values():
            metric.update(outputs, targets)

    def compute(self) -> dict[str, float]:
        """The metrics of what was seen since the last call, on all ranks. Waits for the device."""
        measured = {
            name: float(metric.compute()) for name, metric in {"val_loss": self.mean_loss, **self.metrics}.items()
        }
        measured |= {name: of(measured["val_loss"]) for name, of in self.of_loss.items()}
        self.forget()
        self.history.append({name: measured[name] for name in self.names})
        return self.history[-1]

    def forget(self) -> None:
        """What was seen since the last `compute`."""
        for metric in (self.mean_loss, *self.metrics.values()):
            metric.reset()

    def is_best(self) -> bool:
        """The last evaluation is better than all before it."""
        *before, last = (evaluation[self.objective] for evaluation in self.history)
        if self.larger_is_better:
            return last > max(before, default=-math.inf)
        return last < min((value for value in before if not math.isnan(value)), default=math.inf)

    def results(self) -> dict[str, Any]:
        """Last and best values, as summary.json has them; None where nothing was evaluated."""
        last = self.history[-1] if self.history else {}
        values = [e[self.objective] for e in self.history if math.isfinite(e[self.objective])]
        return {
            **{name: last.get(name) for name in self.names},
            f"best_{self.objective}": (max if self.larger_is_better else min)(values, default=None),
            "best_val_loss": min((e["val_loss"] for e in self.history if math.isfinite(e["val_loss"])), default=None),
            "objective": self.objective,
            "larger_is_better": self.larger_is_better,
        }


@torch.no_grad()
def average_over_ranks(buffers: Iterable[Tensor], world_size: int) -> None:
    """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the ranks, in one exchange."""
    buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
    if world_size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    for buffer, part in zip(buffers, (flat / world_size).split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part.view_as(buffer))
