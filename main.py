"""Train with a batch size that adapts to the noise of the gradient (arXiv:2402.11215).

One process or several on this machine:
    python main.py --model=cnn --dataset=mnist --devices=2 --accelerator=cpu
    fabric run main.py --devices=4 --model=resnet18 --dataset=cifar10 --test_type=norm --eta=0.5
    torchrun --nproc_per_node=4 main.py …
On a cluster:
    srun --kill-on-bad-exit=1 python main.py …

Exit status: 0 finished, 1 failed, 2 refused (bad options or data), 3 diverged, 75 interrupted by SIGTERM, SIGINT or
SIGHUP, 85 by SIGUSR1 (time is up: start it again), both after a checkpoint was saved (--resume=auto goes on), 130 ended
at once by a second SIGINT.
"""

from launch import entry

# Options are parsed before torch is imported, so that --help and errors of options are immediate.
CONFIG = entry.parse_or_exit() if __name__ == "__main__" else None

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric import Fabric

import batches
import optim
import tests
from adadagrad.control import carry_over
from launch import ending, processes
from launch.signals import Interrupts
from options import command_line
from options.errors import REFUSED, UsageError
from options.schema import Config
from training import tuner
from training.clock import Clock
from training.components import Components, OutOfMemory
from training.metrics import Totals, Validation
from training.reporter import Reporter, columns_of
from training.state import State

EXIT_STATUS = {"finished": 0, "failed": 1, "refused": REFUSED, "diverged": 3, "interrupted": os.EX_TEMPFAIL}
TIME_IS_UP = 85
"""Exit status after SIGUSR1, by which batch systems announce the end of a job's time: it is to be started again."""
NOTHING = contextlib.nullcontext()


class Trainer:
    """One run: its components, how far it has come, and the loop."""

    def __init__(self, fabric: Fabric, config: Config, interrupts: Interrupts):
        self.fabric, self.interrupts, self.stop_signal = fabric, interrupts, 0
        self.reporter = Reporter()
        self.parts = parts = Components(fabric, config, self.reporter.notify)
        with processes.naming_long_work(fabric, "measuring how long steps of different sizes take"):
            measured, lines = tuner.tune(parts)
        self.measured_options = [name for name in measured if getattr(config, name) != measured[name]]
        self.config = parts.config = replace(parts.config, **measured)
        self.learning_rate = optim.LearningRate(parts.config, parts.config.max_samples)
        self.controller = tests.controller(
            parts.config, self.learning_rate.decay, parts.is_adaptive, parts.family, parts.least_batch_size
        )
        if not parts.resumed and (change := self.controller.initial_transition):
            carry_over.apply(change, parts.optimizer)
        self.clock = Clock(fabric.device)
        self.totals = Totals(self.clock, parts.train_metrics)
        self.validation = Validation(parts.loss, parts.metrics, fabric.device)
        self.state = State(parts, self.controller, self.totals, self.validation, self.reporter)
        self.reporter.first_not_finite = parts.stream.not_finite
        marks = self.state.restore(parts.resumed) if parts.resumed else None
        measured = [*(f"train_{name}" for name in self.totals.metrics), *self.validation.names]
        self.reporter.open(parts, measured, marks)
        self.state.open(self.reporter.log and self.reporter.log.folder)
        if parts.resumed:
            self.reporter.resuming(parts.resumed, self.controller, self.learning_rate)
        self.reporter.introduce(parts, [*parts.notices, *lines])

    def fit(self) -> str:
        """Train to the end; returns the run's status."""
        state = self.state
        self.clock.start()
        while state.unevaluated or not self.finished():
            row, state.unevaluated = state.unevaluated or self.step(), {}
            evaluation = self.evaluate() if self.evaluation_is_due(row["batch_size"]) else {}
            if evaluation is None:  # made up for when the run goes on
                state.unevaluated = row
                state.save()
                return self.interrupted()
            if evaluation or "variance" in row or self.controller.steps % self.config.log_interval == 0:
                self.log_step(row, evaluation)
            self.stop_signal = state.save_when_due(self.interrupts, bool(evaluation))
            if self.reporter.diverged:
                return "diverged"
            if self.stop_signal and not self.finished():
                return self.interrupted()
        return "finished"

    def interrupted(self) -> str:
        self.interrupts.stopped = True
        return "interrupted"

    def finished(self) -> bool:
        if self.config.training_type == "iter":
            return self.controller.steps >= self.config.max_iters
        return self.controller.samples >= self.config.max_samples

    def step(self) -> dict[str, Any]:
        """Take a step, measuring its gradients where that is due; test them, decide on the next batch's size.

        Returns:
            What the step's row says of its batch.
        """
        decisive = self.decision_is_due()
        measured = decisive or self.monitoring_is_due()
        plan, lr_factor = self.parts.plan(self.controller, measured), self.controller.lr_factor
        learning_rate = self.learning_rate(plan.start, self.controller.steps, lr_factor)
        optim.set_learning_rate(self.parts.optimizer, learning_rate, self.controller.decay_factor)
        self.reporter.took(self.controller.steps, range(plan.start, plan.start + plan.batch_size))
        moments = self.train_step(plan, measured)
        # Here the paper's test is made (adadagrad/tests.py), where the rule has one, and the next batch gets its size.
        decided_by = moments if decisive else None
        update = self.controller.update(decided_by, plan.batch_size, moments, decisive and self.parts.estimator.flag)
        if update.transition:
            carry_over.apply(update.transition, self.parts.optimizer)
        self.reporter.explain(self.controller.steps, update.decision)
        row = {
            "batch_size": plan.batch_size,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.steps,
            "lr_factor": lr_factor,
            "lr": learning_rate,
        }
        if moments:
            row |= columns_of(moments, self.parts.estimator.of_parameters)
            row |= self.controller.known_noise() | self.parts.other_noise_scales
        return row

    def decision_is_due(self) -> bool:
        """The next step is measured, and what it finds decides: on the batch size, on the learning rate."""
        interval = self.config.test_interval if self.config.test else self.config.monitor_interval
        if not self.controller.needs_moments:
            return False
        return self.controller.is_due(None if interval == "auto" else interval, self.parts.estimator.price)

    def monitoring_is_due(self) -> bool:
        """The next step is measured, and what it finds is reported."""
        interval = self.config.monitor_interval
        return bool(interval) and self.controller.steps % interval == 0

    def train_step(self, plan: batches.Plan, measured: bool) -> tests.Moments | None:
        """One optimizer step on one global batch; the moments of its gradients where they are measured."""
        parts = self.parts
        micro_batches = plan.micro_batches(self.fabric.global_rank)
        # DDP averages over ranks: together this is the mean over the global batch, however it was cut.
        loss_scale = self.fabric.world_size / plan.batch_size
        for i, batch in enumerate(parts.stream.raw(micro_batches), start=1):
            n, whole, last = len(micro_batches[i - 1]), len(micro_batches) == 1, i == len(micro_batches)
            self.pass_micro_batch(batch, n, loss_scale, measured, whole, last)
        moments = None
        if measured:
            with self.clock.measuring():
                moments = parts.moments()
                parts.measure_other_noise_scales(plan.start + plan.batch_size, self.controller.steps)
        self.totals.add_clipped(parts.step())
        if parts.average:
            parts.average.update(plan.batch_size)
        return moments

    def pass_micro_batch(
        self, raw: batches.Batch, n: int, loss_scale: float, measured: bool, whole: bool, last: bool
    ) -> None:
        """Forward and backward pass; what it computes is gone before the next one begins.

        Args:
            raw: inputs and targets of n samples, not normalised.
            measured: the estimator observes the pass.
            whole: there is no other micro-batch in this step.
            last: gradients are exchanged.
        """
        parts = self.parts
        inputs, targets = parts.stream.normalise.batch(raw)
        with (
            OutOfMemory("a micro-batch", "lower --max_micro_batch_size (this one has {} samples)", n),
            NOTHING if last else self.fabric.no_backward_sync(parts.model),
            parts.observing(raw[0], inputs, targets, loss_scale, whole, self.clock) if measured else NOTHING,
        ):
            outputs = parts.forward(inputs)
            losses = parts.loss(outputs, targets)
            parts.backward(losses, n, loss_scale)
        self.totals.add(losses, outputs, targets, n, self.controller.steps)

    def evaluation_is_due(self, batch_size: int) -> bool:
        """After a step on a batch of this size."""
        if self.config.eval_interval:
            due = self.controller.steps % self.config.eval_interval == 0
        else:
            interval, samples = self.config.eval_samples or self.parts.samples_per_epoch, self.controller.samples
            due = samples // interval > (samples - batch_size) // interval
        return due or self.finished()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float] | None:
        """Loss and metrics over all validation samples, each used once whatever the number of ranks.

        None where a signal cuts it off, on any rank: launchers do not wait for the end of a long evaluation.
        """
        with self.clock.pause(), self.parts.evaluating():
            for batch, counts in self.parts.validation_rounds():
                if counts:
                    self.validation.update(self.parts.forward(batch[0]), batch[1])
                elif batch:
                    self.parts.forward(batch[0])
                self.stop_signal = self.state.signal(self.interrupts)
                if self.stop_signal:
                    return None
            return self.validation.compute()

    def log_step(self, row: dict[str, Any], evaluation: dict[str, float]) -> None:
        """A row of metrics.csv: of the last step, of the training since the row before, and of an evaluation."""
        samples = self.controller.samples
        row |= {
            "step": self.controller.steps,
            "samples": samples,
            "epoch": samples / self.parts.samples_per_epoch,
            "next_batch_size": self.controller.batch_size,
            "world_size": self.fabric.world_size,
        }
        self.reporter.add(self.totals.read(), row | evaluation)


def run(config: Config) -> int:
    """Train as the options say; returns the exit status.

    Raises:
        UsageError: the options cannot be met.
        RunError: the run cannot go on.
    """
    processes.set_up_devices(config)
    fabric = processes.start_fabric(config)
    interrupts = Interrupts()
    with processes.default_dtype(fabric):
        trainer = Trainer(fabric, config, interrupts)
        with interrupts:  # until here there is nothing to save: a signal ends the program at once
            status = trainer.fit()
            trainer.state.conclude(status, trainer.stop_signal, trainer.measured_options)
    if status == "interrupted" and trainer.stop_signal == signal.SIGUSR1:
        return TIME_IS_UP
    return EXIT_STATUS[status]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on these arguments (default: `sys.argv`, read already); returns the exit status."""
    processes.quieten_libraries()
    try:
        status = run(CONFIG or command_line.parse(arguments))
    except UsageError as error:
        ending.report(error)
        status = EXIT_STATUS["refused"]
    except KeyboardInterrupt:  # before the training begins: there is nothing to save
        status = 128 + signal.SIGINT
    except Exception as error:
        ending.report(error)
        status = EXIT_STATUS["failed"]
    return ending.leave(status)


if __name__ == "__main__":
    sys.exit(main())
