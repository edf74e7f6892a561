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

from launch import options

# The words first, torch after them: --help and what is refused are answered at once.
CONFIG = options.parse_or_exit() if __name__ == "__main__" else None

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
from torch import Tensor
from torch.utils._pytree import tree_map

import batches
import data
import gradients
import models
import optim
import rehearsal
import tests
from launch import processes, sharding
from launch.interrupts import Interrupts
from launch.options import REFUSED, Config, RunError, UsageError, import_object
from launch.processes import naming_long_work, together
from runs import checkpoint
from runs import log as texts
from runs.log import RunLog
from runs.metrics import Progress, Totals, Validation, average_over_ranks, sum_over_samples

EXIT_STATUS = {"finished": 0, "failed": 1, "refused": REFUSED, "diverged": 3, "interrupted": os.EX_TEMPFAIL}
TIME_IS_UP = 85
"""Exit status after SIGUSR1, by which batch systems announce the end of a job's time: it is to be started again."""
GO_ON, SAVE = 0, 1  # what ranks agree on after a step: the largest wins, and the number of a signal is larger


class Trainer:
    """One run: what the loop needs, and the loop."""

    def __init__(self, fabric: Fabric, config: Config, interrupts: Interrupts):
        self.fabric, self.interrupts = fabric, interrupts
        config, self.resumed = checkpoint.resumption(fabric, config)
        text_options = {name: getattr(config, name) for name in ("sequence_length", "vocab_size")}
        with naming_long_work(fabric, f"reading {config.dataset} in {config.data_dir}"):
            together(fabric, lambda: fabric.is_global_zero and data.prepare(config.dataset, config.data_dir))
            data_set = together(fabric, lambda: data.load(config.dataset, config.data_dir, **text_options))
        self.loss = together(fabric, lambda: import_object("loss", config.loss) if config.loss else data_set.loss)
        self.samples_per_epoch, self.validation_samples = len(data_set.train), len(data_set.val)
        self.largest_micro_batch = data_set.largest_micro_batch
        requested_precision = os.environ.get("LT_PRECISION", config.precision)
        self.config = config = together(
            fabric, lambda: processes.resolve(config, fabric, len(data_set.train), data_set.defaults)
        )
        together(fabric, lambda: self.resumed and checkpoint.refuse_differences(config, self.resumed))
        fabric.seed_everything(config.seed, verbose=False)  # the same weights on every rank
        shape, outputs = data_set.input_shape, data_set.num_outputs
        example = None if data_set.num_classes else data_set.example
        self.module = together(fabric, lambda: models.build(config.model, shape, outputs, config.model_args, example))
        self.min_micro_batch_size = models.smallest_micro_batch(self.module, shape, example)
        self.couples_samples = gradients.couples_samples(self.module)
        self.test_gradients = config.test_gradients
        if self.couples_samples and config.monitor_interval and not config.test and config.test_gradients == "auto":
            self.test_gradients = "micro_batch"  # of the training pass; ghost would make a pass of its own
        least = self.min_micro_batch_size
        together(fabric, lambda: processes.refuse_single_samples(config, fabric.world_size, least))
        together(fabric, lambda: processes.refuse_a_single_worker(config, fabric.world_size))
        self.sharded = config.strategy == "fsdp"
        if self.sharded:
            together(fabric, self.refuse_sharding)
        torch.manual_seed(config.seed + 1 + fabric.global_rank)  # dropout differs between ranks
        with out_of_memory_means("the model", "take a smaller --model"):
            self.module = fabric.strategy.precision.convert_module(self.module).to(fabric.device)
            memory_format = torch.contiguous_format  # which shards need
            if not self.sharded:
                memory_format = models.choose_memory_format(self.module, shape)
        dtype, workers = next(self.module.parameters()).dtype, (config.num_workers, config.batch_ahead)
        arguments = (config.seed, config.shuffle, fabric.device, dtype, *workers, memory_format)
        with out_of_memory_means("the data set", "take one that is read while training goes on (docs/extending.md)"):
            self.stream = batches.build(data_set, *arguments)
        if not data_set.num_classes or config.loss:
            together(fabric, self.refuse_loss)
        self.progress = Progress(config.batch_size)
        self.log: RunLog | None = None
        # Before the parameters are shared out, if they are: single samples are compared on the whole module.
        with naming_long_work(fabric, "checking the test's statistics on a few samples"):
            self.estimator, told = together(fabric, self.set_up_estimator)
        with out_of_memory_means("the model", "take a smaller --model"):
            self.model = fabric.setup_module(torch.compile(self.module) if config.compile else self.module)
        # After the module has come to its device: Adagrad, for one, makes its state at once, where its parameters are.
        optimizer = together(fabric, lambda: optim.build(self.module.parameters(), config))
        self.optimizer = fabric.setup_optimizers(optimizer)
        if config.strategy == "ddp":
            with naming_long_work(fabric, "looking for parameters that the loss does not use"):
                together(fabric, self.refuse_unused_parameters)
        together(fabric, lambda: processes.refuse_unequal_numbers(config, self.module))
        self.learning_rate = optim.LearningRate(config, config.max_samples)
        self.controller = batches.controller(config, self.learning_rate.decay, optim.is_adaptive(optimizer))
        self.totals = Totals(fabric.device, data_set.train_metrics)
        self.validation = Validation(self.loss, data_set.metrics, fabric.device)
        self.unwritten: tuple[Callable, dict[str, Any]] | None = None  # a row, but for what the device still computes
        self.diverged = False
        self.agreement = processes.Agreement(fabric)
        self.stop_signal = 0
        notices = []
        if not (data_set.at_hand or config.num_workers):
            notices.append("--num_workers=0: the training process itself reads the samples, and waits for them")
        if fabric.device.type == "cpu" and requested_precision.startswith("16"):
            notices.append(f"precision is {config.precision}: {requested_precision} needs a GPU")
        if self.test_gradients != config.test_gradients:
            notices.append(
                f"the model has BatchNorm: the monitor takes test_gradients=micro_batch, which cuts every measured "
                f"batch into {config.test_groups} micro-batches, each normalised by itself"
            )
        if config.compile:
            notices.append("--compile: the first steps wait for the compiler, minutes for a large network")
        with naming_long_work(fabric, "measuring which size of micro-batches is quickest"):
            size, evaluation_size, told_of_size = rehearsal.rehearse(self)
        self.config = config = replace(config, max_micro_batch_size=size, eval_micro_batch_size=evaluation_size)
        marks = self.restore(self.resumed) if self.resumed else None
        self.log = together(fabric, lambda: self.open_log(marks))
        self.checkpoints = checkpoint.Checkpoints(fabric, config, self.log and self.log.folder)
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        self.say(texts.introduction(config, parameters, self.samples_per_epoch, fabric.world_size, fabric.device.type))
        for line in (*notices, *told, *told_of_size):
            self.notify(line)

    def open_log(self, marks: dict[str, Any] | None) -> RunLog | None:
        if not self.fabric.is_global_zero:
            return None
        measured = [*(f"train_{name}" for name in self.totals.metrics), *self.validation.names]
        log = RunLog(self.config, self.fabric.world_size, measured, self.resumed, marks)
        if self.resumed:
            log.say(f"resuming from {self.resumed}: step {self.progress.steps:,}, samples {self.progress.samples:,}")
            if warning := self.learning_rate.idle_end():
                log.say(warning)
        return log

    def refuse_unused_parameters(self) -> None:
        with self.fabric.autocast():
            models.refuse_unused_parameters(self.module, self.mean_loss, *self.stream.read(range(2)), self.config)

    def refuse_sharding(self) -> None:
        c = self.config
        sharding.blocks(self.module, c.shard_modules)
        sharding.refuse_what_needs_whole_tensors(self.module, c.optimizer, c.precision, c.compile)

    def refuse_loss(self) -> None:
        with self.fabric.autocast():
            models.refuse_loss(self.module, self.loss, *self.stream.read(range(2)), self.config)

    def mean_loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss that is differentiated, in the default dtype as in the training pass."""
        dtype = torch.get_default_dtype()
        return self.loss(tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, outputs), targets).mean()

    def set_up_estimator(self) -> tuple[gradients.Estimator | None, list[str]]:
        """Where the statistics come from, and what the user should be told of them."""
        c, test = self.config, batches.test(self.config)
        if not (c.test or c.monitor_interval):
            return None, []
        self.module.train()
        try:
            estimator, told = gradients.build(
                self.test_gradients,
                self.module,
                self.mean_loss,
                bool(test and test.needs_inner_products),
                c.max_test_micro_batch_size,
                probe=self.stream.read(range(min(gradients.PROBE, self.samples_per_epoch))),
                autocast=self.fabric.autocast,
                in_training_pass=not c.compile,
                num_groups=c.test_groups,
                notify=self.notify,
            )
        except ValueError as error:  # on all ranks alike
            raise UsageError(f"--test_gradients: {c.model}: {error}") from None
        if c.monitor_modules and not estimator.tells_parameters_apart:
            raise UsageError(
                "--monitor_modules: the statistics of this run come from a pass of the test's own, which does not tell "
                "parameters apart: take --test_gradients=micro_batch"
            )
        estimator.by_parameter = c.monitor_modules
        if self.sharded and not estimator.works_on_shards:
            raise UsageError(
                f"--strategy=fsdp: the statistics of {c.model} need whole tensors here: take --test_gradients=worker "
                "with the norm test, or --strategy=ddp"
            )
        return estimator, told

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
        if moments:
            self.explain(self.controller.observe(moments))
        self.progress.batch_size = self.controller.step().batch_size
        row = {
            "batch_size": plan.batch_size,
            "micro_batch_size": plan.micro_batch_size,
            "gradient_accumulation_steps": plan.steps,
            "lr_factor": lr_factor,
        }
        if moments:
            names = (
                "variance",
                "variance_inner_product",
                "variance_orthogonality",
                "grad_norm_sq",
                "batch_noise_scale",
            )
            row |= {name: getattr(moments, name) for name in names} | {"noise_scale": self.controller.noise_scale}
            row["modules"] = texts.module_numbers(gradients.by_module(self.estimator.of_parameters))
        return row

    def finished(self) -> bool:
        if self.config.training_type == "iter":
            return self.progress.steps >= self.config.max_iters
        return self.progress.samples >= self.config.max_samples

    def plan(self, testing: bool) -> batches.Plan:
        c, progress = self.config, self.progress
        steps = c.gradient_accumulation_steps
        if testing and self.test_gradients == "micro_batch":  # a variance between micro-batches needs enough of them
            steps = max(steps, -(-c.test_groups // self.fabric.world_size))
        return batches.cut(
            progress.samples,
            progress.batch_size,
            self.fabric.world_size,
            c.max_micro_batch_size,
            steps,
            self.min_micro_batch_size,
            even=self.couples_samples or self.sharded,
        )

    def test_is_due(self) -> bool:
        """Every `test_interval` steps until the batch has its largest size, and whenever something else asks for it."""
        c, steps = self.config, self.progress.steps
        read_at_the_end = c.may_shrink or c.lr_scaling == "adascale"
        tested = c.test and (self.progress.batch_size < c.max_batch_size or read_at_the_end)
        return (tested and steps % c.test_interval == 0) or (c.monitor_interval and steps % c.monitor_interval == 0)

    def train_step(self, plan: batches.Plan, testing: bool) -> tests.Moments | None:
        """One optimizer step on one global batch; the moments of its gradients where they are tested."""
        fabric, progress = self.fabric, self.progress
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(progress.samples, progress.steps, self.controller.lr_factor)
        self.model.train()
        micro_batches = plan.micro_batches(fabric.global_rank)
        # DDP averages over ranks: together this is the mean over the global batch, however it was cut.
        loss_scale = fabric.world_size / plan.batch_size
        for i, batch in enumerate(self.stream.raw(micro_batches), start=1):
            self.pass_micro_batch(
                batch,
                len(micro_batches[i - 1]),
                loss_scale,
                testing,
                whole=len(micro_batches) == 1,
                last=i == len(micro_batches),
            )
        moments = self.test_moments() if testing else None
        if self.config.grad_clip:
            # A gradient that is not finite is the scaler's business (it skips the step) or shows in the next loss.
            clip = {"max_norm": self.config.grad_clip, "error_if_nonfinite": False}
            fabric.clip_gradients(self.model, self.optimizer, **clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.steps += 1
        progress.samples += plan.batch_size
        return moments

    def pass_micro_batch(
        self, batch: batches.stream.Batch, n: int, loss_scale: float, testing: bool, whole: bool, last: bool
    ) -> None:
        """Forward and backward pass; what it computes is gone before the next one begins.

        Args:
            batch: inputs and targets of n samples, not normalised.
            whole: there is no other micro-batch in this step.
            last: gradients are exchanged.
        """
        fabric, (inputs, targets) = self.fabric, self.stream.normalise.batch(batch)
        with (
            out_of_memory_means("a micro-batch", f"lower --max_micro_batch_size (this one has {n} samples)"),
            fabric.no_backward_sync(self.model, enabled=not last),
            self.observing(testing, batch[0], inputs, targets, loss_scale, whole),
        ):
            outputs = self.model(inputs)
            losses = self.loss(outputs, targets)
            fabric.backward(sum_over_samples(losses, n) * loss_scale)
        self.totals.add(losses.detach(), outputs, targets, n, self.progress.steps)

    @contextlib.contextmanager
    def observing(self, testing: bool, raw: Any, inputs: Any, targets: Any, loss_scale: float, whole: bool):
        """The training pass on a micro-batch, watched by the estimator where the step is tested."""
        if not testing:
            yield
            return
        with contextlib.ExitStack() as observation:
            with self.totals.test(), out_of_memory_means(*IN_THE_TEST):
                again = partial(self.stream.normalise, raw) if batches.smaller(raw, inputs) else None
                observation.enter_context(self.estimator.observe(inputs, targets, loss_scale, whole, again))
            yield

    def test_moments(self) -> tests.Moments:
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        # (get_scale would wait for the device.)
        scale = scaler.scale(torch.ones((), dtype=torch.float32, device=self.fabric.device)) if scaler else 1.0
        with self.totals.test(), out_of_memory_means(*IN_THE_TEST):
            return self.estimator.moments(scale)

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
            interval = self.config.eval_samples or self.samples_per_epoch
            due = progress.samples // interval > (progress.samples - batch_size) // interval
        return due or self.finished()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and metrics over all validation samples, each used once whatever the number of ranks.

        Empty where a signal cuts it off, on any rank: launchers do not wait for the end of a long evaluation.
        """
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        with self.totals.pause():
            own_buffers = [buffer.clone() for buffer in self.module.buffers()]
            average_over_ranks(self.module.buffers(), world_size)
            self.model.eval()
            micro_batch_size = self.config.eval_micro_batch_size
            last = self.stream.read(range(1)) if self.sharded else None
            rounds = -(-self.validation_samples // (micro_batch_size * world_size))  # the last one is not every rank's
            micro_batches = self.stream.validation(rank, world_size, micro_batch_size)
            with (
                out_of_memory_means("a validation micro-batch", "lower --eval_micro_batch_size"),
                sharding.forward_only(self.module),
            ):
                for _, batch in itertools.zip_longest(range(rounds), micro_batches):
                    self.stop_signal = processes.largest_over_ranks(self.fabric, self.interrupts.received)
                    if self.stop_signal:  # all is to be as it was before
                        for buffer, own in zip(self.module.buffers(), own_buffers):
                            buffer.copy_(own)
                        return {}
                    if batch:
                        last = batch
                        self.validation.update(self.model(batch[0]), batch[1])
                    elif self.sharded:  # the others gather the layers: with this rank, or not at all
                        self.model(last[0])
            return self.validation.compute()

    def log_step(self, row: dict[str, Any], evaluation: dict[str, float]) -> None:
        """Complete the row of a step but for what the device still computes, and write the row before it."""
        progress = self.progress
        self.write_row()
        self.unwritten = (
            self.totals.read(),
            row
            | {
                "step": progress.steps,
                "samples": progress.samples,
                "epoch": progress.samples / self.samples_per_epoch,
                "lr": self.optimizer.param_groups[0]["lr"],
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
            self.controller.step_time.observe(*timed)
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
        agreed = self.agreement.exchange(wanted)
        if best := bool(evaluation) and self.validation.is_best():
            progress.best_step = progress.steps
        if best or agreed or self.checkpoints.due(progress.steps):
            self.save()
        return agreed if agreed > SAVE else 0

    def state(self) -> dict[str, Any]:
        """What Fabric saves and restores by itself."""
        precision = self.fabric.strategy.precision  # with the gradient scaler, if any
        if self.sharded:
            return {**sharding.whole_state(self.module, self.optimizer.optimizer), "precision": precision.state_dict()}
        return {"model": self.model, "optimizer": self.optimizer, "precision": precision}

    def save(self) -> None:
        """A checkpoint of what is there now; none where the loss has ceased to be finite."""
        self.write_row()
        if self.diverged:
            return
        with self.totals.pause():
            marks = together(self.fabric, lambda: self.log and self.log.mark())
            common = {"progress": asdict(self.progress), "history": self.validation.history, "marks": marks}
            common["controller"] = self.controller.state_dict()
            state = {**self.state(), **common}
            own = checkpoint.state_of_rank(self.module, self.totals, self.fabric.device)
            self.checkpoints.save(self.progress.steps, self.progress.best_step, state, own)

    def load(self, path: Path) -> dict[str, Any]:
        """Model, optimizer and scaler as a checkpoint has them; gives the rest of it."""
        if not self.sharded:
            rest = self.fabric.load(path, self.state(), weights_only=True)
            optim.lay_as_parameters(self.optimizer.optimizer)
            return rest
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        sharding.load_whole_state(self.module, self.optimizer.optimizer, saved)
        return saved

    def restore(self, path: Path) -> dict[str, Any]:
        """Go back to what a checkpoint holds, on as many ranks as there are now; gives the log's marks."""
        rest = self.load(path)
        self.progress, self.validation.history = Progress(**rest["progress"]), rest["history"]
        self.controller.load_state_dict(rest["controller"])
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        new_seed = self.config.seed + 1 + rank + (self.progress.samples << 32)  # nothing is drawn twice
        checkpoint.restore_rank(rest["ranks"], rank, world_size, self.module, self.totals, self.fabric.device, new_seed)
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
        weights = self.module.state_dict()
        if self.sharded and status == "finished":
            weights = sharding.whole_weights(self.module)
        together(self.fabric, lambda: self.log and self.log.conclude(status, self.results(), weights, self.stop_signal))

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
        }


IN_THE_TEST = (
    "the test",
    "lower --max_test_micro_batch_size or --max_micro_batch_size (or take --test_gradients=micro_batch)",
)


@contextlib.contextmanager
def out_of_memory_means(where: str, remedy: str):
    """Raises: RunError where the device's memory does not suffice for what is inside."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not gradients.is_out_of_memory(error):
            raise
        raise RunError(f"out of memory on the device in {where}: {remedy}") from None


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
        status = run(CONFIG or options.parse(arguments))
    except UsageError as error:
        processes.report(error)
        status = EXIT_STATUS["refused"]
    except KeyboardInterrupt:  # before the training begins: there is nothing to save
        status = 128 + signal.SIGINT
    except Exception as error:
        processes.report(error)
        status = EXIT_STATUS["failed"]
    return processes.leave(status)


if __name__ == "__main__":
    sys.exit(main())
