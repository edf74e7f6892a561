"""Train with a batch size that grows when the gradient's statistics ask for it (arXiv:2402.11215).

One process or several on this machine:
    python main.py --model=cnn --dataset=mnist --devices=2 --accelerator=cpu
    fabric run main.py --devices=4 --model=resnet18 --dataset=cifar10 --test_type=norm --eta=0.5
    torchrun --nproc_per_node=4 main.py …
On a cluster:
    srun --kill-on-bad-exit=1 python main.py …

Exit status: 0 finished, 1 failed, 2 refused (bad options or data), 3 diverged, 75 interrupted by SIGTERM or SIGINT, 85
by SIGUSR1 (time is up: start it again), both after a checkpoint was saved (--resume=auto goes on), 130 ended at once by
a second SIGINT.
"""

from launch import entry

# The words first, torch after them: --help and what is refused are answered at once.
CONFIG = entry.parse_or_exit() if __name__ == "__main__" else None

import contextlib
import itertools
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

import batches
import optim
import tests
from adadagrad import gradients
from launch import ending, fsdp, processes
from launch.collectives import Agreement, largest_over_ranks, on_all_ranks
from launch.signals import Interrupts
from options import command_line
from options.errors import REFUSED, UsageError
from options.schema import MEASURED_SCALINGS, Config
from runs import checkpoint
from runs import log as texts
from runs.log import RunLog
from training import tuner
from training.components import IN_THE_TEST, Components, out_of_memory_means
from training.metrics import Progress, Totals, Validation, average_over_ranks, sum_over_samples
from training.state import restore_rank, state_of_rank

EXIT_STATUS = {"finished": 0, "failed": 1, "refused": REFUSED, "diverged": 3, "interrupted": os.EX_TEMPFAIL}
TIME_IS_UP = 85
"""Exit status after SIGUSR1, by which batch systems announce the end of a job's time: it is to be started again."""
GO_ON, SAVE = 0, 1  # what ranks agree on after a step: the largest wins, and the number of a signal is larger


class Trainer:
    """One run: its parts, what it has come to, and the loop."""

    def __init__(self, fabric: Fabric, config: Config, interrupts: Interrupts):
        self.fabric, self.interrupts = fabric, interrupts
        self.progress = Progress(config.batch_size)
        self.log: RunLog | None = None
        self.measured_options = [name for name in tuner.MEASURED if getattr(config, name) == "auto"]
        self.parts = parts = Components(fabric, config, self.notify)
        self.progress.batch_size = parts.config.batch_size
        self.learning_rate = optim.LearningRate(parts.config, parts.config.max_samples)
        self.controller = tests.controller(parts.config, self.learning_rate.decay, parts.is_adaptive)
        self.totals = Totals(fabric.device, parts.train_metrics)
        self.validation = Validation(parts.loss, parts.metrics, fabric.device)
        self.unwritten: tuple[Callable, dict[str, Any]] | None = None  # a row, but for what the device still computes
        self.diverged = False
        self.signals = Agreement(fabric)
        self.stop_signal = 0
        with processes.naming_long_work(fabric, "measuring which size of micro-batches is quickest"):
            size, evaluation_size, told = tuner.rehearse(parts, self.controller.step_time)
        parts.config = replace(parts.config, max_micro_batch_size=size, eval_micro_batch_size=evaluation_size)
        self.config = parts.config
        marks = self.restore(parts.resumed) if parts.resumed else None
        self.log = on_all_ranks(fabric, lambda: self.open_log(marks))
        self.checkpoints = checkpoint.Checkpoints(fabric, self.config, self.log and self.log.folder)
        self.introduce([*parts.notices, *told])

    def introduce(self, notices: Sequence[str]) -> None:
        parameters = sum(parameter.numel() for parameter in self.parts.module.parameters())
        samples, devices = self.parts.samples_per_epoch, (self.fabric.world_size, self.fabric.device.type)
        self.say(texts.introduction(self.config, parameters, samples, *devices))
        for line in notices:
            self.notify(line)

    def open_log(self, marks: dict[str, Any] | None) -> RunLog | None:
        parts = self.parts
        if not self.fabric.is_global_zero:
            return None
        measured = [*(f"train_{name}" for name in self.totals.metrics), *self.validation.names]
        log = RunLog(self.config, self.fabric.world_size, measured, parts.resumed, marks)
        if parts.resumed:
            log.say(f"resuming from {parts.resumed}: step {self.progress.steps:,}, samples {self.progress.samples:,}")
            if warning := self.learning_rate.idle_end():
                log.say(warning)
        return log

    def fit(self) -> str:
        """Train to the end; returns the run's status."""
        progress = self.progress
        self.totals.start_clock()
        while progress.cut_off or not self.finished():
            row, progress.cut_off = progress.cut_off or self.step(), {}
            due = self.evaluation_is_due(row["batch_size"])
            evaluation = self.evaluate() if due else {}
            if cut_off := due and not evaluation:
                progress.cut_off = row
                self.save()
            elif evaluation or progress.steps % self.config.log_interval == 0:
                self.log_step(row, evaluation)
            self.stop_signal = self.stop_signal if cut_off else self.save_when_due(evaluation)
            if self.diverged:
                return "diverged"
            if self.stop_signal and (cut_off or not self.finished()):
                return self.interrupted()
        if self.checkpoints.saved_step != progress.steps:
            self.save()
        return "finished"

    def interrupted(self) -> str:
        self.interrupts.stopped = True
        return "interrupted"

    def step(self) -> dict[str, Any]:
        """One step and the next batch's size; gives what the step's row says of its batch and its test."""
        testing = self.test_is_due()
        plan = self.plan(testing)
        lr_factor = self.controller.lr_factor
        moments = self.train_step(plan, testing)
        update = self.controller.update(moments)
        self.explain(update.decision)
        self.progress.batch_size = update.batch_size
        row = {
            "batch_size": plan.batch_size,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.steps,
            "lr_factor": lr_factor,
        }
        if moments:
            row |= {name: getattr(moments, name) for name in tests.MEASURED}
            row["noise_scale"] = self.controller.noise_scale
            row["modules"] = texts.module_numbers(gradients.by_module(self.parts.estimator.of_parameters))
        return row

    def finished(self) -> bool:
        if self.config.training_type == "iter":
            return self.progress.steps >= self.config.max_iters
        return self.progress.samples >= self.config.max_samples

    def plan(self, testing: bool) -> batches.Plan:
        c, progress, parts = self.config, self.progress, self.parts
        steps = c.gradient_accumulation_steps
        if testing and parts.test_gradients == "micro_batch":  # a variance between micro-batches needs enough of them
            steps = max(steps, -(-c.test_groups // self.fabric.world_size))
        return batches.cut(
            progress.samples,
            progress.batch_size,
            self.fabric.world_size,
            c.max_micro_batch_size,
            steps,
            parts.min_micro_batch_size,
            even=parts.couples_samples or parts.sharded,
        )

    def test_is_due(self) -> bool:
        """Every `test_interval` steps until the batch has its largest size, and whenever something else asks for it."""
        c, steps = self.config, self.progress.steps
        read_at_the_end = c.may_shrink or c.lr_scaling in MEASURED_SCALINGS
        tested = c.test and (self.progress.batch_size < c.max_batch_size or read_at_the_end)
        return (tested and steps % c.test_interval == 0) or (c.monitor_interval and steps % c.monitor_interval == 0)

    def train_step(self, plan: batches.Plan, testing: bool) -> tests.Moments | None:
        """One optimizer step on one global batch; the moments of its gradients where they are tested."""
        fabric, progress, parts = self.fabric, self.progress, self.parts
        for group in parts.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress.samples, progress.steps, self.controller.lr_factor)
        parts.model.train()
        micro_batches = plan.micro_batches(fabric.global_rank)
        # DDP averages over ranks: together this is the mean over the global batch, however it was cut.
        loss_scale = fabric.world_size / plan.batch_size
        for i, batch in enumerate(parts.stream.raw(micro_batches), start=1):
            self.pass_micro_batch(
                batch,
                len(micro_batches[i - 1]),
                loss_scale,
                testing,
                whole=len(micro_batches) == 1,
                last=i == len(micro_batches),
            )
        moments = None
        if testing:
            with self.totals.test():
                moments = parts.moments()
        if self.config.grad_clip:
            # A gradient that is not finite is the scaler's business (it skips the step) or shows in the next loss.
            clip = {"max_norm": self.config.grad_clip, "error_if_nonfinite": False}
            fabric.clip_gradients(parts.model, parts.optimizer, **clip)
        parts.optimizer.step()
        parts.optimizer.zero_grad(set_to_none=True)
        progress.steps += 1
        progress.samples += plan.batch_size
        return moments

    def pass_micro_batch(
        self, batch: batches.Batch, n: int, loss_scale: float, testing: bool, whole: bool, last: bool
    ) -> None:
        """Forward and backward pass; what it computes is gone before the next one begins.

        Args:
            batch: inputs and targets of n samples, not normalised.
            whole: there is no other micro-batch in this step.
            last: gradients are exchanged.
        """
        parts = self.parts
        fabric, (inputs, targets) = self.fabric, parts.stream.normalise.batch(batch)
        with (
            out_of_memory_means("a micro-batch", f"lower --max_micro_batch_size (this one has {n} samples)"),
            fabric.no_backward_sync(parts.model, enabled=not last),
            self.observing(testing, batch[0], inputs, targets, loss_scale, whole),
        ):
            outputs = parts.model(inputs)
            losses = parts.loss(outputs, targets)
            fabric.backward(sum_over_samples(losses, n) * loss_scale)
        self.totals.add(losses.detach(), outputs, targets, n, self.progress.steps)

    @contextlib.contextmanager
    def observing(self, testing: bool, raw: Any, inputs: Any, targets: Any, loss_scale: float, whole: bool):
        """The training pass on a micro-batch, watched by the estimator where the step is tested."""
        parts = self.parts
        if not testing:
            yield
            return
        with contextlib.ExitStack() as observation:
            with self.totals.test(), out_of_memory_means(*IN_THE_TEST):
                again = partial(parts.stream.normalise, raw) if batches.smaller(raw, inputs) else None
                observation.enter_context(parts.estimator.observe(inputs, targets, loss_scale, whole, again))
            yield

    def explain(self, decision: tests.Decision | None) -> None:
        """Say why nothing could be decided; once, until the reason changes."""
        if decision and decision.reason != self.progress.undecided:
            self.progress.undecided = decision.reason
            if decision.reason:
                self.say(
                    f"step {self.progress.steps}: the test decides nothing, the batch size stays: {decision.reason}"
                )

    def evaluation_is_due(self, batch_size: int) -> bool:
        """After a step on a batch of this size."""
        progress = self.progress
        if self.config.eval_interval:
            due = progress.steps % self.config.eval_interval == 0
        else:
            interval = self.config.eval_samples or self.parts.samples_per_epoch
            due = progress.samples // interval > (progress.samples - batch_size) // interval
        return due or self.finished()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics over all validation samples, each used once whatever the number of ranks.

        Empty where a signal cuts it off, on any rank: launchers do not wait for the end of a long evaluation.
        """
        parts = self.parts
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        with self.totals.pause():
            own_buffers = [buffer.clone() for buffer in parts.module.buffers()]
            average_over_ranks(parts.module.buffers(), world_size)
            parts.model.eval()
            micro_batch_size = self.config.eval_micro_batch_size
            last = parts.stream.read(range(1)) if parts.sharded else None
            rounds = -(-parts.validation_samples // (micro_batch_size * world_size))  # the last one is not every rank's
            micro_batches = parts.stream.validation(rank, world_size, micro_batch_size)
            with (
                out_of_memory_means("a validation micro-batch", "lower --eval_micro_batch_size"),
                fsdp.forward_only(parts.module),
            ):
                for _, batch in itertools.zip_longest(range(rounds), micro_batches):
                    self.stop_signal = largest_over_ranks(self.fabric, self.interrupts.received)
                    if self.stop_signal:  # all is to be as it was before
                        for buffer, own in zip(parts.module.buffers(), own_buffers):
                            buffer.copy_(own)
                        return {}
                    if batch:
                        last = batch
                        self.validation.update(parts.model(batch[0]), batch[1])
                    elif parts.sharded:  # the others gather the layers: with this rank, or not at all
                        parts.model(last[0])
            return self.validation.compute()

    def log_step(self, row: dict[str, Any], evaluation: dict[str, float]) -> None:
        """Complete the row of a step but for what the device still computes, and write the row before it."""
        progress, parts = self.progress, self.parts
        self.write_row()
        self.unwritten = (
            self.totals.read(),
            row
            | {
                "step": progress.steps,
                "samples": progress.samples,
                "epoch": progress.samples / parts.samples_per_epoch,
                "lr": parts.optimizer.param_groups[0]["lr"],
                "next_batch_size": progress.batch_size,
                "world_size": self.fabric.world_size,
                **evaluation,
            },
        )
        if evaluation:  # it has waited for the device anyway
            self.write_row()

    def write_row(self) -> None:
        """Write the row that is not yet written, if any; waits for the device to come to the end of its step."""
        if not self.unwritten:
            return
        (statistics, row), self.unwritten = self.unwritten, None
        of_training, diverged_at, timed = statistics()
        if timed:
            self.controller.step_time.add(*timed)
        row |= of_training
        if self.log:
            self.log.write(row)
            self.log.advance(row["samples"] if self.config.training_type == "sample" else row["step"])
        if "val_loss" in row:
            self.say(texts.evaluation_text(row))
        if diverged_at is not None:
            self.diverged = True
            self.say(
                f"diverged: the loss was not finite at step {diverged_at + 1}: lower --learning_rate or set --grad_clip"
            )

    def save_when_due(self, evaluation: dict[str, float]) -> int:
        """Save a checkpoint where it is due or, on any rank, a signal was received; gives the signal's number, or 0.

        What the ranks' clocks and signals ask for is agreed upon one step late: no rank waits for the others.
        """
        progress = self.progress
        wanted = self.interrupts.received or (SAVE if self.checkpoints.due_by_clock() else GO_ON)
        agreed = self.signals.exchange(wanted)
        if best := bool(evaluation) and self.validation.is_best():
            progress.best_step = progress.steps
        if best or agreed or self.checkpoints.due(progress.steps):
            self.save()
        return agreed if agreed > SAVE else 0

    def state(self) -> dict[str, Any]:
        """What Fabric saves and restores by itself."""
        parts = self.parts
        precision = self.fabric.strategy.precision  # with the gradient scaler, if any
        if parts.sharded:
            return {
                **fsdp.whole_state(parts.module, parts.optimizer.optimizer),
                "precision": precision.state_dict(),
            }
        return {"model": parts.model, "optimizer": parts.optimizer, "precision": precision}

    def save(self) -> None:
        """A checkpoint of what is there now; none where the loss has ceased to be finite."""
        self.write_row()
        if self.diverged:
            return
        with self.totals.pause():
            marks = on_all_ranks(self.fabric, lambda: self.log and self.log.mark())
            common = {"progress": asdict(self.progress), "history": self.validation.history, "marks": marks}
            common["controller"] = self.controller.state_dict()
            state = {**self.state(), **common}
            own = state_of_rank(self.parts.module, self.totals, self.fabric.device)
            self.checkpoints.save(self.progress.steps, self.progress.best_step, state, own)

    def load(self, path: Path) -> dict[str, Any]:
        """Model, optimizer and scaler as a checkpoint has them; gives the rest of it."""
        parts = self.parts
        if not parts.sharded:
            rest = self.fabric.load(path, self.state(), weights_only=True)
            optim.lay_as_parameters(parts.optimizer.optimizer)
            return rest
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        fsdp.load_whole_state(parts.module, parts.optimizer.optimizer, saved)
        return saved

    def restore(self, path: Path) -> dict[str, Any]:
        """Go back to what a checkpoint holds, on as many ranks as there are now; gives the log's marks."""
        rest = self.load(path)
        self.progress, self.validation.history = Progress(**rest["progress"]), rest["history"]
        self.controller.load_state_dict(rest["controller"])
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        new_seed = self.config.seed + 1 + rank + (self.progress.samples << 32)  # nothing is drawn twice
        restore_rank(rest["ranks"], rank, world_size, self.parts.module, self.totals, self.fabric.device, new_seed)
        return rest["marks"]

    def say(self, line: str) -> None:
        if self.log:
            self.log.say(line)

    def notify(self, line: str) -> None:
        """Say it once in the whole run."""
        if line not in self.progress.notices:
            self.progress.notices.append(line)
            self.say(line)

    def conclude(self, status: str) -> None:
        """The end of the run, on all ranks."""
        parts = self.parts
        weights = parts.module.state_dict()
        if parts.sharded and status == "finished":
            weights = fsdp.whole_weights(parts.module)
        conclude = lambda: self.log and self.log.conclude(status, self.results(), weights, self.stop_signal)  # noqa: E731
        on_all_ranks(self.fabric, conclude)

    def results(self) -> dict:
        """What summary.json says of the training itself."""
        progress = self.progress
        return {
            **self.validation.results(),
            **progress.results(),
            **self.controller.findings(),
            "best_checkpoint": progress.best_step and self.checkpoints.path(progress.best_step).name,
            "world_size": self.fabric.world_size,
            "device": processes.device_name(self.fabric.device),
            "measured_options": self.measured_options,
        }


def run(config: Config) -> int:
    """Train as the options say; returns the exit status.

    Raises:
        UsageError: the options cannot be met.
        RunError: the run cannot go on.
    """
    processes.set_up_devices(config)
    fabric = processes.start_fabric(config)
    if fabric._precision.precision == "64-true":
        torch.set_default_dtype(torch.float64)  # else Fabric hands the model's outputs back in float32
    interrupts = Interrupts()
    trainer = Trainer(fabric, config, interrupts)
    with interrupts:  # until here there is nothing to save: a signal ends the program at once
        status = trainer.fit()
        trainer.conclude(status)
    if status == "interrupted" and trainer.stop_signal == signal.SIGUSR1:
        return TIME_IS_UP
    return EXIT_STATUS[status]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program on these arguments (default: `sys.argv`, read already); returns the exit status."""
    for name in ("lightning.fabric", "lightning.fabric.utilities.rank_zero", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*torch.jit.script")  # of torch's own forward-mode formulas
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
