"""What a checkpoint holds of a run, saving it, and going back to it on as many ranks as there are then."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import optim
from adadagrad.control import Controller
from adadagrad.gradients.isolation import random_states, set_random_states
from launch import fsdp
from launch.collectives import Agreement, on_all_ranks
from launch.signals import Interrupts
from runs.checkpoint import Checkpoints
from training.components import Components, draw_by_rank
from training.metrics import Totals, Validation
from training.reporter import Reporter

GO_ON, SAVE = 0, 1  # what ranks agree on: the largest wins; SAVE + a signal's number: save and end


class State:
    """All that a run has come to: saved when it is due, and restored.

    Attributes:
        best_step: the checkpoint with the best validation metric; None before the first evaluation.
        unevaluated: the row of the last step, where a signal has cut off its evaluation.
        checkpoints: where it is saved; known once the run has its folder.
    """

    def __init__(
        self, parts: Components, controller: Controller, totals: Totals, validation: Validation, reporter: Reporter
    ):
        self.fabric, self.parts, self.controller = parts.fabric, parts, controller
        self.totals, self.validation, self.reporter = totals, validation, reporter
        self.best_step: int | None = None
        self.unevaluated: dict[str, Any] = {}
        self.requests = Agreement(parts.fabric)

    def open(self, folder: Path | None) -> None:
        """The run's folder, None where this is not the first rank."""
        self.checkpoints = Checkpoints(self.fabric, self.parts.config, folder)

    def save_when_due(self, interrupts: Interrupts, evaluated: bool) -> int:
        """Save where it is due or, on any rank, a signal was received; gives the signal's number, or 0.

        What the ranks' clocks and signals ask for is agreed upon one step late: no rank waits for the others.
        """
        wanted = SAVE if self.checkpoints.due_by_clock() else GO_ON
        agreed, step = self._agreed(interrupts, wanted), self.controller.steps
        if best := evaluated and self.validation.is_best():
            self.best_step = step
        if best or agreed or self.checkpoints.due(step):
            self.save()
        return max(agreed - SAVE, 0)

    def signal(self, interrupts: Interrupts) -> int:
        """The number of a signal that was received on any rank, or 0; one call late, too."""
        return max(self._agreed(interrupts, GO_ON) - SAVE, 0)

    def _agreed(self, interrupts: Interrupts, wanted: int) -> int:
        return self.requests.exchange(SAVE + interrupts.received if interrupts.received else wanted)

    def save(self) -> None:
        """A checkpoint of what is there now; none where the loss has ceased to be finite."""
        self.reporter.write()
        if self.reporter.diverged:
            return
        with self.totals.clock.pause():
            common = {
                "best_step": self.best_step,
                "unevaluated": self.unevaluated,
                "controller": self.controller.state_dict(),
                "history": self.validation.history,
                "said": self.reporter.state_dict(),
                "marks": on_all_ranks(self.fabric, self.reporter.mark),
            }
            own = {
                "random": random_states(self.fabric.device),
                "buffers": {name: buffer.cpu() for name, buffer in self.parts.module.named_buffers()},
                "totals": self.totals.state_dict(),
            }
            self.checkpoints.save(self.controller.steps, self.best_step, {**self._of_fabric(), **common}, own)

    def restore(self, path: Path) -> dict[str, Any]:
        """Go back to what a checkpoint holds, on as many ranks as there are now; gives the log's marks."""
        saved = self._load(path)
        self.best_step, self.unevaluated = saved["best_step"], saved["unevaluated"]
        self.controller.load_state_dict(saved["controller"])
        self.validation.history = saved["history"]
        self.reporter.load_state_dict(saved["said"])
        self._restore_rank(saved["ranks"])
        return saved["marks"]

    def results(self) -> dict[str, Any]:
        """What summary.json says of the training itself."""
        controller, best = self.controller, self.best_step
        if best is not None and not self.checkpoints.path(best).exists():  # in another folder, or removed since
            best = None
        return {
            **self.validation.results(),
            "steps": controller.steps,
            "samples": controller.samples,
            "mean_batch_size": controller.samples / max(controller.steps, 1),
            "final_batch_size": controller.batch_size,
            **controller.findings(),
            "best_checkpoint": best and self.checkpoints.path(best).name,
            "world_size": self.fabric.world_size,
        }

    def _of_fabric(self) -> dict[str, Any]:
        """What Fabric saves and restores by itself: model, optimizer, gradient scaler."""
        parts, precision = self.parts, self.fabric.strategy.precision
        if parts.sharded:
            return {**fsdp.whole_state(parts.module, parts.optimizer), "precision": precision.state_dict()}
        return {"model": parts.model, "optimizer": parts.optimizer, "precision": precision}

    def _load(self, path: Path) -> dict[str, Any]:
        """Model, optimizer and scaler as a checkpoint has them; gives the rest of it."""
        parts = self.parts
        if not parts.sharded:
            rest = self.fabric.load(path, self._of_fabric(), weights_only=True)
            optim.lay_as_parameters(parts.optimizer)
            return rest
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        fsdp.load_whole_state(parts.module, parts.optimizer, saved)
        return saved

    def _restore_rank(self, ranks: Sequence[dict[str, Any]]) -> None:
        """This rank's own part; on another number of ranks what follows for all of them."""
        rank, seed = self.fabric.global_rank, self.parts.config.seed
        if len(ranks) == self.fabric.world_size:
            own = ranks[rank]
            set_random_states(own["random"], self.fabric.device)
        else:
            own = pooled(ranks, rank)
            draw_by_rank(seed + 1 + rank + (self.controller.samples << 32))  # nothing is drawn twice
        buffers = dict(self.parts.module.named_buffers())
        for name, value in own["buffers"].items():
            buffers[name].copy_(value)
        self.totals.load_state_dict(own["totals"])


def pooled(ranks: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """A rank's own part for a continuation on another number of ranks: mean buffers; the first rank counts for all."""
    buffers = {
        name: torch.stack([other["buffers"][name] for other in ranks]).mean(0) if value.is_floating_point() else value
        for name, value in ranks[0]["buffers"].items()
    }
    totals, all_totals = ranks[0]["totals"], [other["totals"] for other in ranks]
    sums = {name: sum(other[name] for other in all_totals) * (rank == 0) for name in ("sums", "block", "samples")}
    not_finite_at = torch.stack([other["not_finite_at"] for other in all_totals]).min()
    return {"buffers": buffers, "totals": {**totals, **sums, "not_finite_at": not_finite_at}}
