"""What a run measures of itself: training totals since the last row, and the validation metrics."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric, Metric

from options.errors import UsageError
from training.clock import Clock, Event


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


BLOCK = 64
"""Micro-batches whose numbers are kept until they are added up at once: small operations would double a small step."""


class Totals:
    """Loss, metrics and samples since the last row; kept on the device, so that no step waits for the host.

    Args:
        clock: times the same steps.
        metrics: by name, a function of outputs and targets → a number for each sample (n,).
    """

    def __init__(self, clock: Clock, metrics: dict[str, Callable[[Any, Any], Tensor]]):
        self.clock, self.metrics = clock, metrics
        self.last_step = -1
        self._clear()

    def _clear(self) -> None:
        like = {"dtype": torch.float64, "device": self.clock.device}
        self.sums = torch.zeros(1 + len(self.metrics), **like)  # of the loss and of each metric
        self.first_bad = torch.full((), math.inf, **like)  # the window's first sample whose loss is not finite
        self.bad_step = math.inf  # its step, if an earlier process has seen it
        self.block: list[list[Tensor]] = []  # [losses, *metrics] of the micro-batches not yet in `sums`, (n,) each
        self.samples, self.samples_in_block = 0, 0
        self.clipped: Tensor | None = None  # steps whose gradient was clipped, float64 (); None: none ever is
        self.ends: list[int] = []  # for each step of the window, its samples up to there

    def state_dict(self) -> dict[str, Any]:
        """Plain values; adds nothing up, so that a resumed run adds in the same order. Waits for the device."""
        return {
            "sums": self.sums.cpu(),
            "bad_step": self._step_of()(float(self.first_bad)),
            "block": [numbers.cpu() for numbers in self._joined()],
            "last_step": self.last_step,
            "samples": self.samples,
            "clipped": None if self.clipped is None else self.clipped.cpu(),
            "ends": list(self.ends),
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._clear()
        self.sums.copy_(state["sums"])
        self.bad_step, self.last_step, self.samples = state["bad_step"], state["last_step"], state["samples"]
        self.clipped = None if state["clipped"] is None else state["clipped"].to(self.sums.device)
        if self.bad_step < math.inf:
            self.first_bad.zero_()
        if state["block"]:
            self.block = [[numbers.to(self.sums.device) for numbers in state["block"]]]
            self.samples_in_block = len(state["block"][0])
        self.ends = list(state["ends"])
        self.clock.load_state_dict(state["clock"])

    def add(self, losses: Tensor, outputs: Any, targets: Any, n: int, step: int) -> None:
        """A micro-batch of n samples; their losses (n,), or the mean of these ()."""
        with torch.no_grad():
            numbers = [losses.detach(), *(metric(outputs, targets) for metric in self.metrics.values())]
        if len(self.block) == BLOCK:
            self._add_up()
        self.block.append([own if own.dim() else own.expand(n) for own in numbers])
        self.samples_in_block += n
        self.samples += n
        if step == self.last_step and self.ends:
            self.ends[-1] = self.samples
            return
        self.ends.append(self.samples)
        self.last_step = step
        self.clock.window.steps += 1

    def add_clipped(self, clipped: Tensor | None) -> None:
        """Whether the gradient of the step was clipped, (); it is the same on all ranks."""
        if clipped is not None:
            self.clipped = clipped.double() if self.clipped is None else self.clipped + clipped

    def _joined(self) -> list[Tensor]:
        """The block's losses and metrics, (samples_in_block,) each; none where it is empty."""
        return [torch.cat(numbers) for numbers in zip(*self.block)]

    def _add_up(self) -> None:
        """Bring the block into the sums."""
        if not self.block:
            return
        joined, end = self._joined(), self.samples
        self.sums += torch.stack([numbers.sum(dtype=torch.float64) for numbers in joined])
        samples = torch.arange(end - self.samples_in_block, end, dtype=torch.float64, device=self.sums.device)
        bad = torch.where(torch.isfinite(joined[0]), math.inf, samples)
        self.first_bad = torch.minimum(self.first_bad, bad.min())
        self.block, self.samples_in_block = [], 0

    def _step_of(self) -> Callable[[float], float]:
        """A function: number of a bad sample in the window → its step, of the first one known (infinite: none)."""
        known, first, ends = self.bad_step, self.last_step + 1 - len(self.ends), self.ends
        return lambda sample: known if math.isinf(sample) or known < math.inf else first + bisect_right(ends, sample)

    def read(self) -> Callable[[], tuple[dict[str, float], int | None]]:
        """Close the window and open the next.

        Returns:
            A function that waits for the device and gives the columns of the row, means over all ranks, and the first
            step whose loss was not finite, if any. All ranks call it.
        """
        self._add_up()
        times, step_of = self.clock.turn(), self._step_of()
        rank = dist.get_rank() if dist.is_initialized() else 0
        own_bad, own_samples = self.first_bad, torch.full_like(self.sums[:1], self.samples)
        clipped = own_bad.new_full((), math.nan) if self.clipped is None else self.clipped / len(self.ends)
        reading = Reading(torch.cat([self.sums, clipped[None], own_bad[None], own_samples]))
        self._clear()

        def statistics() -> tuple[dict[str, float], int | None]:
            *sums, clipped, bad, counts = zip(*reading.by_rank())
            samples = sum(counts)
            means = {f"train_{name}": sum(of_ranks) / samples for name, of_ranks in zip(("loss", *self.metrics), sums)}
            means |= {} if math.isnan(clipped[0]) else {"clipped": clipped[0]}
            if min(bad) == math.inf:
                return means | times(samples), None
            return means | times(samples), int(first_step(step_of(bad[rank]), own_bad))

        return statistics


def first_step(own: float, like: Tensor) -> float:
    """The least of all ranks' numbers; each counts its samples by itself, so that steps are what can be compared.

    Args:
        like: on this rank's device.
    """
    if not dist.is_initialized():
        return own
    return min(Reading(like.new_tensor([own])).by_rank())[0]


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
        # A metric that does not say which way is better is taken for an error, as the loss is.
        self.larger_is_better = bool(getattr(self.metrics.get(self.objective), "higher_is_better", False))
        self.history: list[dict[str, float]] = []

    def update(self, outputs: Any, targets: Any) -> None:
        losses = self.loss(outputs, targets)
        self.mean_loss.update(losses if losses.dim() else losses.expand(len(tree_leaves(targets)[0])))
        for metric in self.metrics.values():
            metric.update(outputs, targets)

    def compute(self) -> dict[str, float]:
        """The metrics of what was seen since the last call, on all ranks. Waits for the device."""
        found = {name: metric.compute() for name, metric in {"val_loss": self.mean_loss, **self.metrics}.items()}
        found |= {name: of(float(found["val_loss"])) for name, of in self.of_loss.items()}
        measured = {name: _one_number(name, value) for name, value in found.items()}
        self.forget()
        self.history.append({name: measured[name] for name in self.names})
        return self.history[-1]

    def forget(self) -> None:
        """What was seen since the last `compute`."""
        for metric in (self.mean_loss, *self.metrics.values()):
            metric.reset()

    def is_best(self) -> bool:
        """The last evaluation is better than all before it."""
        sign = 1 if self.larger_is_better else -1
        *before, last = (sign * evaluation[self.objective] for evaluation in self.history)
        return last > max((value for value in before if not math.isnan(value)), default=-math.inf)

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


def _one_number(name: str, value: Any) -> float:
    """
    Raises:
        UsageError: it is none; on all ranks alike.
    """
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UsageError(
            f"--dataset: its metric {name.removeprefix('val_')} gives {given}: give one number (of torchmetrics, by "
            "such as average='macro')"
        ) from None


@torch.no_grad()
def average_over_ranks(buffers: Iterable[Tensor], world_size: int) -> None:
    """Replace floating-point buffers (BatchNorm's running statistics) by their mean over the ranks, in one exchange.

    In float64: averaged once more, they stay as they are.
    """
    buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
    if world_size == 1 or not buffers:
        return
    flat = torch.cat([buffer.flatten().double() for buffer in buffers])
    dist.all_reduce(flat)
    for buffer, part in zip(buffers, (flat / world_size).split([buffer.numel() for buffer in buffers])):
        buffer.copy_(part.view_as(buffer))
