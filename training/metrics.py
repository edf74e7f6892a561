"""What a run measures of itself: training totals since the last row, and the validation metrics."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric, Metric

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


def weights_of(losses: Tensor, n: int, scale: float) -> Tensor:
    """The gradient of scale · Σ ℓ_i by the losses, where the backward pass starts: a few operations less than the sum.

    Args:
        losses: of n samples (n,), or their mean ().
    """
    weights = torch.full_like(losses, scale)
    return weights if losses.dim() else weights * n


BLOCK = 64
"""Steps whose sums are kept apart; then they are added up at once: small operations would double a small step."""


class Totals:
    """Loss, metrics and samples since the last row; kept on the device, so that no step waits for the host.

    Args:
        clock: times the same steps.
        metrics: by name, a function of outputs and targets → a number for each sample (n,).
    """

    def __init__(self, clock: Clock, metrics: dict[str, Callable[[Any, Any], Tensor]]):
        self.clock, self.metrics = clock, metrics
        self._clear()

    def _clear(self) -> None:
        like = {"dtype": torch.float64, "device": self.clock.device}
        self.sums = torch.zeros(1 + len(self.metrics), **like)  # of the loss and of each metric
        self.not_finite_at = torch.full((), math.inf, **like)  # the first step whose loss was not finite
        self.block: list[list[Tensor]] = []  # [loss, *metrics] of the steps not yet in `sums`, float64 () each
        self.last_step, self.samples = -1, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values; adds nothing up, so that a resumed run adds in the same order. Waits for the device."""
        return {
            "sums": self.sums.cpu(),
            "not_finite_at": self.not_finite_at.cpu(),
            "block": self._stacked().cpu(),
            "last_step": self.last_step,
            "samples": self.samples,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.not_finite_at.copy_(state["not_finite_at"])
        self.block = [list(step) for step in state["block"].to(self.sums.device)]
        self.last_step, self.samples = state["last_step"], state["samples"]
        self.clock.load_state_dict(state["clock"])

    def add(self, losses: Tensor, outputs: Any, targets: Any, n: int, step: int) -> None:
        """A micro-batch of n samples; their losses (n,), or the mean of these ()."""
        with torch.no_grad():
            sums = [losses.sum(dtype=torch.float64) if losses.dim() else losses.double() * n]
            sums += [metric(outputs, targets).sum(dtype=torch.float64) for metric in self.metrics.values()]
        self.samples += n
        if step == self.last_step:
            self.block[-1] = [before + own for before, own in zip(self.block[-1], sums)]
            return
        if len(self.block) == BLOCK:
            self._add_up()
        self.block.append(sums)
        self.last_step = step
        self.clock.window.steps += 1

    def _stacked(self) -> Tensor:
        """The block as float64 (steps, 1 + metrics)."""
        flat = [number for step in self.block for number in step]
        return torch.stack(flat).view(len(self.block), -1) if flat else self.sums.new_zeros(0, len(self.sums))

    def _add_up(self) -> None:
        """Bring the block into the sums."""
        if not self.block:
            return
        of_steps, end = self._stacked(), self.last_step + 1
        steps = torch.arange(end - len(self.block), end, dtype=torch.float64, device=self.sums.device)
        self.sums += of_steps.sum(0)
        bad = torch.where(torch.isfinite(of_steps[:, 0]), math.inf, steps)
        self.not_finite_at = torch.minimum(self.not_finite_at, bad.min())
        self.block = []

    def read(self) -> Callable[[], tuple[dict[str, float], int | None]]:
        """Close the window and open the next.

        Returns:
            A function that waits for the device and gives the columns of the row, means over all ranks, and the first
            step whose loss was not finite, if any.
        """
        self._add_up()
        times = self.clock.turn()
        own = torch.full_like(self.sums[:1], self.samples)
        reading = Reading(torch.cat([self.sums, self.not_finite_at[None], own]))
        self._clear()

        def statistics() -> tuple[dict[str, float], int | None]:
            *sums, not_finite, counts = zip(*reading.by_rank())
            samples, at = sum(counts), min(not_finite)
            means = {f"train_{name}": sum(of_ranks) / samples for name, of_ranks in zip(("loss", *self.metrics), sums)}
            return means | times(samples), None if math.isinf(at) else int(at)

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
        measured = {
            name: float(metric.compute()) for name, metric in {"val_loss": self.mean_loss, **self.metrics}.items()
        }
        measured |= {name: float(of(measured["val_loss"])) for name, of in self.of_loss.items()}
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
