"""What a run measures of itself: how far it is, training totals since the last log line, the validation metrics."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy


@dataclass
class Progress:
    """How far a run has come, and what it has said once and for all."""

    batch_size: int
    steps: int = 0
    samples: int = 0
    best_step: int | None = None  # the checkpoint with the best validation accuracy
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


class Totals:
    """Loss, accuracy and time since the last log line; kept on the device, so that no step waits for the host."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds_before = 0.0  # of a run that goes on, since its last log line
        self.clear()

    def clear(self) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, correct, samples
        self.not_finite_at = torch.full((), math.inf, dtype=torch.float64, device=self.device)
        self.steps: set[int] = set()
        self.test_time = 0.0
        self.started = time.perf_counter()

    def start_clock(self) -> None:
        """The training begins; what went before, setting up, does not count."""
        self.started = time.perf_counter() - self.seconds_before

    def state_dict(self) -> dict[str, Any]:
        return {
            "sums": self.sums.cpu(),
            "not_finite_at": self.not_finite_at.cpu(),
            "steps": sorted(self.steps),
            "test_time": self.test_time,
            "seconds": time.perf_counter() - self.started,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.not_finite_at.copy_(state["not_finite_at"])
        self.steps, self.test_time = set(state["steps"]), state["test_time"]
        self.seconds_before = state["seconds"]

    def pause(self, seconds: float) -> None:
        """Do not count these seconds."""
        self.started += seconds

    def add(self, losses: Tensor, logits: Tensor, targets: Tensor, step: int) -> None:
        loss = losses.double().sum()
        correct = (logits.argmax(1) == targets).sum()
        self.sums += torch.stack([loss, correct, torch.full_like(loss, len(targets))])
        at = torch.where(torch.isfinite(loss), math.inf, float(step))
        self.not_finite_at = torch.minimum(self.not_finite_at, at)
        self.steps.add(step)

    def read(self) -> tuple[dict[str, float], int | None]:
        """Means over all ranks, and the first step whose loss was not finite; then start anew. Waits for the device."""
        if dist.is_initialized():
            dist.all_reduce(self.sums)
            dist.all_reduce(self.not_finite_at, dist.ReduceOp.MIN)
        loss, correct, samples = self.sums.tolist()
        at = float(self.not_finite_at)
        seconds = time.perf_counter() - self.started
        statistics = {
            "train_loss": loss / samples,
            "train_accuracy": correct / samples,
            "step_time": seconds / len(self.steps),
            "test_time": self.test_time / len(self.steps),
            "samples_per_second": samples / seconds,
        }
        self.clear()
        return statistics, None if math.isinf(at) else int(at)


class Validation:
    """Loss and accuracy over the validation samples, and the best of them so far; sums run over all ranks."""

    def __init__(self, num_classes: int, device: torch.device):
        # By default the metrics look at what they are given: losses that are NaN they leave out, and the host waits.
        unchecked = {"average": "micro", "validate_args": False}
        self.metrics = {
            "val_loss": MeanMetric(nan_strategy="disable").set_dtype(torch.float64).to(device),
            "val_accuracy": MulticlassAccuracy(num_classes, **unchecked).to(device),
        }
        if num_classes >= 100:
            self.metrics["val_top5_accuracy"] = MulticlassAccuracy(num_classes, top_k=5, **unchecked).to(device)
        self.history: list[dict[str, float]] = []

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self.metrics["val_loss"].update(cross_entropy(logits, targets, reduction="none"))
        for name in self.metrics.keys() - {"val_loss"}:
            self.metrics[name].update(logits, targets)

    def compute(self) -> dict[str, float]:
        """The metrics of what was seen since the last call, on all ranks. Waits for the device."""
        evaluation = {name: float(metric.compute()) for name, metric in self.metrics.items()}
        for metric in self.metrics.values():
            metric.reset()
        self.history.append(evaluation)
        return evaluation

    def is_best(self) -> bool:
        """The last accuracy is above all before it."""
        *before, last = (evaluation["val_accuracy"] for evaluation in self.history)
        return last > max(before, default=-math.inf)

    def results(self) -> dict[str, float | None]:
        """Last and best values, as summary.json has them; None where nothing was evaluated."""
        last = self.history[-1] if self.history else {}
        return {
            **{name: last.get(name) for name in self.metrics},
            "best_val_accuracy": max((e["val_accuracy"] for e in self.history), default=None),
            "best_val_loss": min((e["val_loss"] for e in self.history if math.isfinite(e["val_loss"])), default=None),
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
