"""Before the first step: what a run is made of, in the order in which the parts need each other.

What does not fit together is refused here, on all ranks alike, as early as it can be known.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from torch.utils._pytree import tree_map

import batches
import data
import models
import optim
import tests
from adadagrad import Clipping, WeightAverage, gradients
from adadagrad.control import Controller, carry_over
from adadagrad.control.learning_rate import MEASURED
from adadagrad.gradients.noise_scales import NoiseScales
from launch import fsdp
from launch.collectives import on_all_ranks
from launch.processes import naming_long_work
from options import effective
from options.errors import RunError, UsageError
from options.names import import_object
from options.schema import Config
from runs import checkpoint
from training.clock import Clock
from training.metrics import average_over_ranks

LARGEST_IN_EVALUATION = 1024
"""Samples of a micro-batch; where training takes fewer at once, evaluations do, too."""


class Components:
    """What one process of a run works with.

    Attributes:
        config: the options as they take effect.
        resumed: the checkpoint that the run goes on from, if any.
        branches_off: it begins there, as a branch of the run that has written it.
        loss: of outputs and targets, as data set or user have it.
        metrics, train_metrics: of the data set.
        samples_per_epoch, validation_samples: how many there are of training, and how many an evaluation takes.
        largest_micro_batch: of which it is worth trying whether it is quicker; None: any.
        module: the network as the user knows it; its parameters may be shards.
        called: the same as `forward` calls it: compiled, its gradients averaged over ranks.
        model: that in Fabric's wrapper.
        parameters: of the module; a step drops their gradients.
        precision: Fabric's plugin, which casts and scales.
        optimizer: torch's own; its step is `step`.
        average: of the weights, where there is to be one.
        clipping: of the gradients, where they are to be clipped.
        min_micro_batch_size: samples that a training pass needs.
        least_batch_size: samples of the smallest batch, over all ranks, that can be trained on and measured.
        couples_samples: one sample's outputs depend on the others (BatchNorm).
        test_gradients: where the statistics come from, as asked for or, unless it is the published rule that asks, as
            BatchNorm needs it.
        estimator: gives them; None: nobody asks for any.
        noise_scales: measures those of --monitor_metrics; None: nobody asks for any.
        notices: what the user should be told once.

    Raises:
        UsageError: the options do not fit the data, the network or the devices.
        RunError: the device's memory does not suffice.
    """

    def __init__(self, fabric: Fabric, config: Config, notify: Callable[[str], None]):
        """
        Args:
            notify: takes what the estimator finds out later.
        """
        self.fabric = fabric
        self.notices: list[str] = []
        self.average: WeightAverage | None = None
        self.clipping = Clipping(config.grad_clip, fabric.device) if config.grad_clip else None
        self.other_noise_scales: dict[str, float | None] = {}  # by their columns, of the last measured step
        self._filled = lru_cache(maxsize=4)(torch.full)  # most micro-batches are as large as the one before
        data_set = self._read_data(config)
        self._build_module(data_set)
        self._place_on_device(data_set)
        # Before the parameters are sharded, if they are: single samples are compared on the whole module.
        with naming_long_work(fabric, "checking the test's statistics on a few samples"):
            self.estimator = on_all_ranks(fabric, lambda: self._build_estimator(notify))
        self._build_optimizer()
        self.noise_scales = on_all_ranks(fabric, self._build_noise_scales) if self.config.monitor_metrics else None

    def _read_data(self, config: Config) -> data.DataSet:
        """The data set, and what the options come to with it."""
        fabric, requested_precision = self.fabric, os.environ.get("LT_PRECISION", config.precision)
        config, self.resumed = checkpoint.resumption(fabric, config)
        with naming_long_work(fabric, f"reading {config.dataset} in {config.data_dir}"):
            # Nodes may have disks of their own, or one in common: then the others find the files there.
            for its_turn in (fabric.is_global_zero, fabric.local_rank == 0 and not fabric.is_global_zero):
                on_all_ranks(fabric, lambda own=its_turn: own and data.prepare(config.dataset, config.data_dir))
            data_set = on_all_ranks(fabric, lambda: data.load(config.dataset, config.data_dir, **config.dataset_args))
        self.loss = on_all_ranks(fabric, lambda: import_object("loss", config.loss) if config.loss else data_set.loss)
        self.metrics, self.train_metrics = data_set.metrics, data_set.train_metrics
        self.samples_per_epoch, of_validation = len(data_set.train), len(data_set.val)
        self.largest_micro_batch = data_set.largest_micro_batch
        self.config = config = on_all_ranks(
            fabric,
            lambda: effective.resolve(config, fabric, self.samples_per_epoch, of_validation, data_set.defaults),
        )
        self.validation_samples = config.validation_samples or of_validation
        on_all_ranks(fabric, lambda: self.resumed and checkpoint.refuse_differences(config, self.resumed))
        self.branches_off = bool(self.resumed) and checkpoint.branches_off(config, self.resumed)
        self.sharded = config.strategy == "fsdp"
        if not (data_set.at_hand or config.num_workers):
            self.notices.append("--num_workers=0: the training process itself reads the samples, and waits for them")
        if fabric.device.type == "cpu" and requested_precision.startswith("16"):
            self.notices.append(f"precision is {config.precision}: {requested_precision} needs a GPU")
        return data_set

    def _build_module(self, data_set: data.DataSet) -> None:
        """The network in the host's memory, the same on every rank."""
        fabric, c = self.fabric, self.config
        fabric.seed_everything(c.seed, verbose=False)
        shape, outputs = data_set.input_shape, data_set.num_outputs
        example = None if data_set.num_classes else data_set.example
        self.module = on_all_ranks(fabric, lambda: models.build(c.model, shape, outputs, c.model_args, example))
        self.min_micro_batch_size = models.smallest_micro_batch(self.module, shape, example)
        self.couples_samples = gradients.couples_samples(self.module)
        self.least_batch_size = max(2, fabric.world_size * self.min_micro_batch_size)
        self.test_gradients = c.test_gradients
        if self.couples_samples:
            self._choose_for_coupled_samples()
        if c.compile:
            self.notices.append("--compile: the first steps wait for the compiler, minutes for a large network")
        on_all_ranks(fabric, lambda: effective.refuse_single_samples(c, fabric.world_size, self.min_micro_batch_size))
        on_all_ranks(fabric, lambda: effective.refuse_a_single_worker(c, fabric.world_size))
        if self.sharded:
            on_all_ranks(fabric, self._refuse_sharding)

    def _choose_for_coupled_samples(self) -> None:
        """Where neither the user nor the published rule says where the statistics come from."""
        c = self.config
        noise_is_read = c.statistics == "unbiased" or c.lr_scaling in MEASURED
        is_published = bool(tests.rule(vars(c)).test) and not noise_is_read
        if c.test_gradients != "auto" or is_published:
            return
        # Per sample it would be another function, and its noise scale another one (docs/statistics.md, BatchNorm).
        self.test_gradients = "micro_batch"
        if tests.reads_gradients(c):
            who = "has BatchNorm" if gradients.couples_samples(self.module) else "couples the samples of a batch"
            self.notices.append(
                f"the model {who}: its statistics come from test_gradients=micro_batch, which cuts every measured "
                f"batch into {c.test_groups} micro-batches, each computed by itself"
            )

    def _place_on_device(self, data_set: data.DataSet) -> None:
        """Network and samples on the device, in the precision of the training."""
        fabric, c = self.fabric, self.config
        draw_by_rank(c.seed + 1 + fabric.global_rank)
        with OutOfMemory("the model", "take a smaller --model"):
            self.module = fabric.strategy.precision.convert_module(self.module).to(fabric.device)
            memory_format = torch.contiguous_format  # which shards need
            if not self.sharded:
                memory_format = models.choose_memory_format(self.module, data_set.input_shape)
        dtype, workers = next(self.module.parameters()).dtype, (c.num_workers,)
        arguments = (c.seed, c.shuffle, fabric.device, dtype, *workers, memory_format, c.validation_samples)
        with OutOfMemory("the data set", "take one that is read while training goes on (docs/extending.md)"):
            self.stream = batches.build(data_set, *arguments)
        if not data_set.num_classes or c.loss:
            on_all_ranks(fabric, self._refuse_loss)

    def _build_estimator(self, notify: Callable[[str], None]) -> gradients.Estimator | None:
        c, rule = self.config, tests.rule(vars(self.config))
        if not tests.reads_gradients(c):
            return None
        self.module.train()

        def build() -> tuple[gradients.Estimator, list[str]]:
            return gradients.build(
                self.test_gradients,
                self.module,
                self.mean_loss,
                bool(rule.test and rule.test.needs_inner_products),
                c.max_test_micro_batch_size,
                probe=self.stream.read(range(min(gradients.PROBE, self.samples_per_epoch))),
                autocast=self.fabric.autocast,
                in_training_pass=not c.compile,
                num_groups=c.test_groups,
                notify=notify,
                recheck=c.recheck,
            )

        try:
            estimator, notices = build()
            if estimator.couples_samples and not self.couples_samples:  # by itself, as the check at the start has found
                self.couples_samples = True
                self._choose_for_coupled_samples()
                if self.test_gradients == "micro_batch":
                    estimator, notices = build()
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
        self.notices += notices
        return estimator

    def _build_noise_scales(self) -> NoiseScales:
        c = self.config
        if self.sharded or self.couples_samples or c.compile:
            why = "--strategy=fsdp" if self.sharded else "--compile" if c.compile else f"BatchNorm in {c.model}"
            raise UsageError(f"--monitor_metrics needs gradients of single samples, not to be had with {why}")
        probe = self.stream.read(range(min(gradients.PROBE, self.samples_per_epoch)))
        problem = ""
        for name in ("vmap", "loop"):
            try:
                arguments = (self.module, self.mean_loss, False, c.max_test_micro_batch_size, probe)
                estimator, _ = gradients.build(name, *arguments, autocast=self.fabric.autocast, recheck=False)
                return NoiseScales(tuple(c.monitor_metrics), estimator, self.optimizer, c.smoothing)
            except ValueError as error:
                problem = str(error)
        raise UsageError(f"--monitor_metrics: {problem}")

    def _build_optimizer(self) -> None:
        """The model as Fabric wraps it, then the optimizer: Adagrad makes its state at once, where parameters are."""
        fabric, c = self.fabric, self.config
        with OutOfMemory("the model", "take a smaller --model"):
            self.model = fabric.setup_module(torch.compile(self.module) if c.compile else self.module)
        self.called = self.model._forward_module
        self.parameters, self.precision = list(self.module.parameters()), fabric.strategy.precision
        self.model.train()
        optimizer = on_all_ranks(fabric, lambda: optim.build(self.module, c))
        if self.sharded and isinstance(optimizer, optim.AdaGradNorm):
            raise UsageError(
                f"--strategy=fsdp: --optimizer={c.optimizer} needs the whole gradient's norm: take another one, or "
                "--strategy=ddp"
            )
        self.is_adaptive, self.family = optim.is_adaptive(optimizer), carry_over.family(optimizer)
        if c.coupling == "full" and self.family is None:
            self.notices.append(carry_over.NOT_KNOWN.format(c.optimizer))
        if optim.is_muon(c):
            self.notices.append(optim.of_muon(self.module))
        optim.set_training(optimizer, True)
        self.optimizer = fabric.setup_optimizers(optimizer).optimizer
        if c.weight_average and optim.averages_by_itself(optimizer):
            self.notices.append(f"--weight_average: --optimizer={c.optimizer} averages by itself: no other is made")
        elif c.weight_average:
            self.average = WeightAverage(self.module, c.weight_average)
        if c.strategy == "ddp":
            with naming_long_work(fabric, "looking for parameters that the loss does not use"):
                on_all_ranks(fabric, self._refuse_unused_parameters)
        on_all_ranks(fabric, lambda: effective.refuse_unequal_numbers(c, self.module, self.min_micro_batch_size))

    def _refuse_sharding(self) -> None:
        c = self.config
        fsdp.blocks(self.module, c.shard_modules)
        fsdp.refuse_what_needs_whole_tensors(self.module, c.compile)

    def _refuse_loss(self) -> None:
        with self.fabric.autocast():
            models.refuse_loss(self.module, self.loss, *self.stream.read(range(2)), self.config)

    def _refuse_unused_parameters(self) -> None:
        with self.fabric.autocast():
            models.refuse_unused_parameters(self.module, self.mean_loss, *self.stream.read(range(2)), self.config)

    def mean_loss(self, outputs: Any, targets: Any) -> Tensor:
        """The loss that is differentiated, in the default dtype as in the training pass."""
        dtype = torch.get_default_dtype()

        def cast(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

        return self.loss(tree_map(cast, outputs), targets).mean()

    def plan(self, controller: Controller, measured: bool) -> batches.Plan:
        """How the next batch is cut over ranks and micro-batches."""
        c, steps = self.config, self.config.gradient_accumulation_steps
        if measured and self.test_gradients == "micro_batch":  # a variance between micro-batches needs enough of them
            steps = max(steps, -(-c.test_groups // self.fabric.world_size))
        return batches.cut(
            controller.samples,
            controller.batch_size,
            self.fabric.world_size,
            c.max_micro_batch_size,
            steps,
            self.min_micro_batch_size,
            even=self.couples_samples or self.sharded,
        )

    def forward(self, inputs: Any) -> Any:
        """The model's outputs, computed and handed back in the precision of the training.

        What Fabric's wrapper does, but for its guard against `loss.backward()`: the wrappers of model, backward pass
        and optimizer cost a small network half of its step. This and the next two go past them, straight to what knows
        of the precision.
        """
        precision = self.precision
        with precision.forward_context():
            return precision.convert_output(self.called(precision.convert_input(inputs)))

    def backward(self, losses: Tensor, n: int, scale: float) -> None:
        """Add the gradient of scale · Σ ℓ_i; the precision scales it where it has to.

        The pass starts at the gradient by the losses: a few operations less than with the sum.

        Args:
            losses: of n samples (n,), or their mean ().
        """
        weights = self._filled(losses.shape, scale, dtype=losses.dtype, device=losses.device)
        self.precision.backward(losses, None, gradient=weights if losses.dim() else weights * n)

    def step(self) -> Tensor | None:
        """The optimizer's step, on gradients that are clipped where that is asked for, and gone then.

        Returns:
            Whether they were clipped, (), on the device; None where that was not asked for.
        """
        clipped = None
        if self.clipping:
            self.precision.unscale_gradients(self.optimizer)
            clipped = self.clipping(self.parameters)
        self.precision.optimizer_step(self.optimizer)
        for parameter in self.parameters:  # the optimizer's own zero_grad takes as long as a small layer
            parameter.grad = None
        return clipped

    @contextlib.contextmanager
    def observing(self, raw: Any, inputs: Any, targets: Any, loss_scale: float, whole: bool, clock: Clock) -> Iterator:
        """The training pass on a micro-batch, observed by the estimator.

        Args:
            raw: the inputs before they were normalised.
            whole: there is no other micro-batch in this step.
            clock: takes the time of the estimator's own work.
        """
        with contextlib.ExitStack() as observation:
            with clock.measuring(), OutOfMemory(*IN_THE_TEST):
                again = partial(self.stream.normalise, raw) if batches.smaller(raw, inputs) else None
                observation.enter_context(self.estimator.observe(inputs, targets, loss_scale, whole, again))
                if self.noise_scales:
                    self.noise_scales.add(again or (lambda: inputs), targets)
            yield

    def moments(self) -> tests.Moments:
        """Of the gradients that the estimator has observed; they may be scaled, as 16-mixed needs it."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        # (get_scale would wait for the device.)
        scale = scaler.scale(torch.ones((), dtype=torch.float32, device=self.fabric.device)) if scaler else 1.0
        try:
            with OutOfMemory(*IN_THE_TEST):
                return self.estimator.moments(scale, self.clipping and self.clipping.in_a_row)
        except ValueError as error:  # on all ranks alike: the loss was no mean of its samples'
            raise UsageError(f"--test_gradients: {error}") from None

    def measure_other_noise_scales(self, samples: int, step: int) -> None:
        """Those of --monitor_metrics, by what was observed in this step.

        Args:
            samples: used so far, this step's included.
        """
        if not self.noise_scales:
            return
        seed = (self.config.seed + 1 + self.fabric.global_rank << 32) + step
        with OutOfMemory(*IN_THE_TEST):
            found = self.noise_scales.measure(samples, seed)
        self.other_noise_scales = {f"noise_scale_{name}": scale for name, scale in found.items()}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """The model for evaluation: the ranks' buffers are averaged, and it is in training mode again afterwards."""
        of_average = self.average.buffers if self.average else []
        average_over_ranks([*self.module.buffers(), *of_average], self.fabric.world_size)
        self.model.eval()
        optim.set_training(self.optimizer, False)
        memory = OutOfMemory("a validation micro-batch", "lower --max_micro_batch_size")
        averaged = self.average.in_place() if self.average else contextlib.nullcontext()
        with memory, fsdp.forward_only(self.module), averaged:
            yield
        self.model.train()
        optim.set_training(self.optimizer, True)

    def validation_rounds(self) -> Iterator[tuple[batches.Batch | None, bool]]:
        """This rank's validation micro-batches, as many as any rank has, and whether they count.

        Where others still have one, this rank has none, or, of shards, whose layers all ranks gather together, one that
        does not count.
        """
        rank, world_size = self.fabric.global_rank, self.fabric.world_size
        size = min(self.config.max_micro_batch_size, LARGEST_IN_EVALUATION)
        rounds = range(-(-self.validation_samples // (size * world_size)))
        last = self.stream.read(range(1)) if self.sharded else None
        for _, batch in zip_longest(rounds, self.stream.validation(rank, world_size, size)):
            last = batch or last if self.sharded else None
            yield batch or last, bool(batch)


def draw_by_rank(seed: int) -> None:
    """Seed all generators that a model may draw from: dropout differs between ranks, whoever draws for it."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


IN_THE_TEST = (
    "the test",
    "lower --max_test_micro_batch_size or --max_micro_batch_size (or take --test_gradients=micro_batch)",
)


class OutOfMemory(contextlib.AbstractContextManager):
    """Says what is inside, and the remedy, where the device's memory does not suffice for it.

    Args:
        remedy: with a place for the number of samples.

    Raises:
        RunError: in the place of the device's own error.
    """

    def __init__(self, where: str, remedy: str, samples: int = 0):
        self.where, self.remedy, self.samples = where, remedy, samples

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (RuntimeError, MemoryError)) and gradients.is_out_of_memory(error):
            remedy = self.remedy.format(self.samples)
            raise RunError(f"out of memory on the device in {self.where}: {remedy}") from None
