"""What a run writes and says while it goes on: rows of metrics.csv, lines on the terminal."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optim
import tests
from adadagrad import gradients
from adadagrad.control import Controller
from launch.collectives import on_all_ranks
from runs import texts
from runs.log import RunLog, module_numbers
from training.components import Components


class Reporter:
    """Rows and lines of a run. On all ranks: numbers are means over them, but only the first rank has a log.

    Attributes:
        diverged: a row has shown a loss that was not finite.
        first_not_finite: of the samples at these positions, the first that has a NaN or an infinite number.
    """

    def __init__(self):
        self.log: RunLog | None = None
        self.notices: list[str] = []  # what was said once and for all
        self.early: list[str] | None = []  # what is to be said once there is a log
        self.undecided = ""  # why the last test made no decision
        self.unwritten: tuple[Callable, dict[str, Any]] | None = None  # a row, but for what the device still computes
        self.diverged = False
        self.first_not_finite: Callable[[range], int | None] = lambda positions: None
        self.positions: dict[int, range] = {}  # of the steps whose losses nobody has looked at yet
        self.seen = 0  # steps before the row that is not yet written

    def open(self, parts: Components, measured: Sequence[str], marks: dict[str, Any] | None) -> None:
        """Make or continue the run's folder, on the first rank. Other arguments and errors as of `RunLog`."""
        fabric = parts.fabric

        def make() -> None:
            if fabric.is_global_zero:
                self.log = RunLog(parts.config, fabric.world_size, measured, parts.resumed, marks)

        on_all_ranks(fabric, make)

    def resuming(self, checkpoint: Path, controller: Controller, learning_rate: optim.LearningRate) -> None:
        """Where the run goes on; and where nothing would be learnt there."""
        self.say(f"resuming from {checkpoint}: step {controller.steps:,}, samples {controller.samples:,}")
        if warning := learning_rate.idle_end():
            self.say(warning)

    def introduce(self, parts: Components, notices: Sequence[str]) -> None:
        """The run in a line, and what the user should be told of it once."""
        parameters = sum(parameter.numel() for parameter in parts.module.parameters())
        devices = (parts.fabric.world_size, parts.fabric.device.type)
        self.say(texts.introduction(parts.config, parameters, parts.samples_per_epoch, *devices))
        early, self.early = self.early, None
        for line in [*early, *notices]:
            self.notify(line)

    def took(self, step: int, positions: range) -> None:
        """A step, after so many others, on the samples at these positions."""
        self.positions[step] = positions

    def add(self, statistics: Callable, row: dict[str, Any]) -> None:
        """A row, complete but for what the device still computes: it is written with the next one.

        Args:
            statistics: `Totals.read` has given it.
        """
        self.write()
        self.unwritten = (statistics, row)
        if "val_loss" in row:  # the evaluation has waited for the device anyway
            self.write()
        self.positions = {step: own for step, own in self.positions.items() if step >= self.seen}
        self.seen = row["step"]

    def write(self) -> None:
        """Write the row that is not yet written, if any; waits for the device to come to the end of its step."""
        if not self.unwritten:
            return
        (statistics, row), self.unwritten = self.unwritten, None
        of_training, diverged_at = statistics()
        row |= of_training
        if self.log:
            self.log.write(row)
            self.log.advance(row["samples"] if self.log.config.training_type == "sample" else row["step"])
        if "val_loss" in row:
            self.say(texts.evaluation_text(row))
        if diverged_at is not None:
            self.diverged = True
            if self.log:
                self.say(f"diverged: the loss was not finite at step {diverged_at + 1}: {self._remedy(diverged_at)}")

    def _remedy(self, step: int) -> str:
        sample = self.first_not_finite(self.positions.get(step, range(0)))
        if sample is None:
            return "lower --learning_rate or set --grad_clip"
        return f"sample {sample} of the training set has NaN or infinite numbers: repair it or leave it out"

    def say(self, line: str) -> None:
        if self.log:
            self.log.say(line)

    def notify(self, line: str) -> None:
        """Say it once in the whole run."""
        if self.early is not None:
            self.early.append(line)
        elif line not in self.notices:
            self.notices.append(line)
            self.say(line)

    def explain(self, step: int, decision: tests.Decision | None) -> None:
        """Say why the test made no decision; once, until the reason changes."""
        if decision and decision.reason != self.undecided:
            self.undecided = decision.reason
            if decision.reason:
                self.say(f"step {step}: batch size unchanged: {decision.reason}")

    def mark(self) -> dict[str, Any] | None:
        """Where the log stands, for a checkpoint; None where there is no log."""
        return self.log and self.log.mark()

    def state_dict(self) -> dict[str, Any]:
        return {"notices": self.notices, "undecided": self.undecided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.notices, self.undecided = state["notices"], state["undecided"]


def columns_of(moments: tests.Moments, of_parameters: dict[str, tests.Moments]) -> dict[str, Any]:
    """What was measured on a batch, as a row has it, modules.csv included."""
    return {name: getattr(moments, name) for name in tests.MEASURED} | {
        "modules": module_numbers(gradients.by_module(of_parameters))
    }
