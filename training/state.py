"""What a checkpoint holds of a run, saving it, and going back to it on as many ranks as there are then."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import optim
from adadagrad.control import Controller, carry_over
from adadagrad.gradients.isolation import random_states, set_random_states
from launch import fsdp
from launch.collectives import Agreement, on_all_ranks
from launch.processes import device_name
from launch.signals import Interrupts
from options.errors import RunError, UsageError, in_one_line
from runs.checkpoint import Checkpoints
from runs.texts import AVERAGE, PLAIN
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
                "estimator": self.parts.estimator.state_dict() if self.parts.estimator else None,
                "history": self.validation.history,
                "noise_scales": self.parts.noise_scales and self.parts.noise_scales.state_dict(),
                "clipping": self.parts.clipping and self.parts.clipping.state_dict(),
                "average": self.parts.average and self.parts.average.state_dict(),
                "said": self.reporter.state_dict(),
                "marks": on_all_ranks(self.fabric, self.reporter.mark),
            }
            own = {
                "random": random_states(self.fabric.device),
                "buffers": {name: buffer.cpu() for name, buffer in self._buffers().items()},
                "totals": self.totals.state_dict(),
            }
            self.checkpoints.save(self.controller.steps, self.best_step, {**self._of_fabric(), **common}, own)

    def restore(self, path: Path) -> dict[str, Any]:
        """Go back to what a checkpoint holds, on as many ranks as there are now; gives the log's marks."""
        saved = self._load(path)
        self.best_step, self.unevaluated = saved["best_step"], saved["unevaluated"]
        self.controller.load_state_dict(saved["controller"])
        self.validation.history = saved["history"]
        if self.parts.noise_scales and saved.get("noise_scales"):  # earlier checkpoints have none
            self.parts.noise_scales.load_state_dict(saved["noise_scales"])
        if self.parts.clipping and saved.get("clipping"):  # earlier checkpoints have none
            self.parts.clipping.load_state_dict(saved["clipping"])
        if self.parts.average and saved.get("average"):  # a branch may have one of its own
            self.parts.average.load_state_dict(saved["average"])
        self.reporter.load_state_dict(saved["said"])
        if self.parts.estimator and saved.get("estimator"):
            self.parts.estimator.load_state_dict(saved["estimator"])
        self._restore_rank(saved["ranks"])
        if self.parts.branches_off:
            self._branch_off()
        return saved["marks"]

    def _branch_off(self) -> None:
        """Other sizes from this checkpoint on, as for any growth.

        Raises:
            UsageError: there cannot be batches of this size.
        """
        parts, controller = self.parts, self.controller
        before, factor = controller.batch_size, parts.config.branch
        change = controller.branch(factor, parts.family, parts.is_adaptive, parts.config.branch_gain)
        carry_over.apply(change, parts.optimizer)
        if parts.clipping:
            parts.clipping.mean /= math.sqrt(change.squares)  # norms follow the batch, too
        size = controller.batch_size
        if not parts.least_batch_size <= size <= parts.samples_per_epoch:
            raise UsageError(
                f"--branch={factor:g}: batches of {before} become {size}, and {parts.least_batch_size} to "
                f"{parts.samples_per_epoch} samples can be had: take another factor"
            )
        parts.notices.append(f"a branch: batches of {size:,} samples from here on, {factor:g} times {before:,}")

    def conclude(self, status: str, stop_signal: int, measured_options: Sequence[str]) -> None:
        """The end of the run, on all ranks: the last checkpoint and what the log writes, all of it that can be written.

        Args:
            stop_signal: that has ended it, or 0.
            measured_options: whose values were measured.

        Raises:
            RunError, UsageError: something could not.
        """
        log, problem = self.reporter.log, None
        try:
            if status == "finished" and self.checkpoints.saved_step != self.controller.steps:
                self.save()
        except (RunError, UsageError) as error:  # on all ranks alike
            problem = error
        weights = {}
        try:
            weights = self._weights(status == "finished")
        except Exception as error:  # a user's get_extra_state raises what it likes
            words = f"the weights of --model={self.parts.config.model} cannot be had: {in_one_line(error)}"
            problem = problem or RunError(words)
        found = {
            "device": device_name(self.fabric.device),
            "measured_options": measured_options,
            "evaluated_weights": AVERAGE if self.parts.average else PLAIN,
        }
        on_all_ranks(self.fabric, lambda: log and log.conclude(status, self.results() | found, weights, stop_signal))
        if problem:
            raise problem

    def _weights(self, whole: bool) -> dict[str, dict[str, Tensor]]:
        """By the names of their files; of shards only where `whole`, as ranks exchange them."""
        parts = self.parts
        optim.set_training(parts.optimizer, False)
        state = partial(fsdp.whole_weights, parts.module) if parts.sharded and whole else parts.module.state_dict
        plain = state()
        if not parts.average:
            return {PLAIN: plain}
        with parts.average.in_place():
            average = {name: value.clone() for name, value in state().items()}
        return {PLAIN: plain, AVERAGE: average}

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

    def _buffers(self) -> dict[str, Tensor]:
        """What ranks have each for themselves: the model's buffers, and their averages."""
        average = self.parts.average
        of_average = {f"average {i}": own for i, own in enumerate(average.buffers)} if average else {}
        return {**dict(self.parts.module.named_buffers()), **of_average}

    def _restore_rank(self, ranks: Sequence[dict[str, Any]]) -> None:
        """This rank's own part; on another number of ranks what follows for all of them."""
        rank, seed = self.fabric.global_rank, self.parts.config.seed
        if len(ranks) == self.fabric.world_size:
            own = ranks[rank]
            set_random_states(own["random"], self.fabric.device)
        else:
            own = pooled(ranks, rank)
            draw_by_rank(seed + 1 + rank + (self.controller.samples << 32))  # nothing is drawn twice
        buffers = self._buffers()
        for name in buffers.keys() & own["buffers"].keys():  # a branch has no average, nor earlier checkpoints
            buffers[name].copy_(own["buffers"][name])
        self.totals.load_state_dict(own["totals"])


def pooled(ranks: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
    """A rank's own part for a continuation on another number of ranks: mean buffers; the first rank counts for all."""
    buffers = {
        name: torch.stack([other["buffers"][name] for other in ranks]).mean(0) if value.is_floating_point() else value
        for name, value in ranks[0]["buffers"].items()
    }
    totals = [other["totals"] for other in ranks]
    counts = rank == 0
    samples = counts * sum(own["samples"] for own in totals)
    added_up = {
        "sums": counts * sum(sum_of_all(own) for own in totals),
        "block": [],
        "samples": samples,
        "ends": [samples] * len(totals[0]["ends"]),
        "bad_step": min(own["bad_step"] for own in totals),
    }
    return {"buffers": buffers, "totals": totals[0] | added_up}


def sum_of_all(totals: dict[str, Any]) -> Tensor:
    """A rank's sums, with those of its block."""
    block = [numbers.sum(dtype=torch.float64) for numbers in totals["block"]]
    return totals["sums"] + torch.stack(block) if block else totals["sums"]
