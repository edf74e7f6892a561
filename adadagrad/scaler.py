"""The batch size in a loop of one's own: `BatchScaler` joins estimator, controller, step times and learning rate."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import ASGD, SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from .clipping import Clipping
from .control import Controller, Limits, StepTime, Update, carry_over, steady
from .gradients import PROBE, Estimator, Loss, build, couples_samples
from .gradients.samples import Batch, count, some
from .tests import Moments, Test

BY_GROUPS = ("micro_batch", "worker")
COUPLED = (
    "the model couples the samples of a batch (BatchNorm does): its statistics come from the variance between "
    "micro-batches (test_gradients=micro_batch); a batch that comes in one piece is cut, with passes of its own"
)


class BatchScaler:
    """Says how large the next batch is, and takes the optimizer's step with the learning rate that goes with it.

        scaler = BatchScaler(model, cross_entropy, optimizer, batch_size=16, max_batch_size=len(images))
        while scaler.samples < 100_000:
            inputs, targets = draw(scaler.batch_size)
            with scaler.observe(inputs, targets):
                scaler.scale(cross_entropy(model(inputs), targets)).backward()
            scaler.step()

    The batch may come in any number of micro-batches, each in its own `observe`; under DDP and FSDP2 every process
    brings a part (`positions`), and all of them are told the same.

    Args:
        model: as it is called: a module, also wrapped by DistributedDataParallel or torch.compile, or sharded by
            fully_shard.
        loss: of outputs and targets: the mean over the samples (), or the samples' losses (n,).
        optimizer: of the model's parameters, of any number of groups. What stands in `group["lr"]` (set by hand or by a
            scheduler) is the learning rate for batches of `batch_size` samples; during the step it is multiplied.
        batch_size: b₀, of the first batch [samples].
        max_batch_size: largest size [samples]; default: no bound.
        test: makes the published rule (arXiv:2402.11215) of it: tested at every step, by the statistics of that batch
            alone, and the learning rate stays. Default: `steady`.
        controller: instead of the last three: any other.
        measure_interval: steps from one measurement to the next; default: 1 with `test`, else as
            `Controller.is_due` has it: often until the noise is known well, then at every 16th step.
        test_gradients: where the statistics come from (`gradients.build`), or an estimator that was built before.
            On shards `auto` means micro_batch, which compares the processes' gradients with each other; where a model
            couples samples (BatchNorm), too, but for the published rule.
        max_micro_batch_size: most samples in a pass that is made for the statistics alone.
        autocast: makes the context of such a pass, where the training's forward pass runs under mixed precision.

    Attributes:
        controller: holds the averaged statistics, the fit to the step times, and all that is decided by.
        moments: of the last step that was measured; None before the first one.

    Raises:
        ValueError: the processes are more than the samples of a batch; `observe`: this model's statistics cannot be had
            in this way (the message says which can); `step`: the batch did not have `batch_size` samples.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: Optimizer,
        batch_size: int | None = None,
        max_batch_size: int | None = None,
        test: Test | None = None,
        controller: Controller | None = None,
        measure_interval: int | None = None,
        test_gradients: str | Estimator = "auto",
        max_micro_batch_size: int = 256,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        if (batch_size is None) == (controller is None):
            raise ValueError("a BatchScaler needs either batch_size (with max_batch_size and test) or controller")
        if controller is None and test is not None:
            controller = Controller(batch_size, test, limits=Limits(max_batch_size))
            measure_interval = measure_interval or 1
        family = carry_over.family(optimizer)
        if controller is None:
            controller = steady(batch_size, max_batch_size, not isinstance(optimizer, (SGD, ASGD)), family)
        self.module, self.is_compiled = _unwrapped(model)
        self.loss, self.optimizer, self.controller = loss, optimizer, controller
        self.measure_interval = measure_interval
        self.test_gradients, self.max_micro_batch_size, self.autocast = test_gradients, max_micro_batch_size, autocast
        self.estimator: Estimator | None = None  # built on the samples of the first batch that is measured
        self._of_estimator: dict[str, int] | None = None  # its state, loaded before it was built
        self.moments: Moments | None = None
        self.rank, self.world_size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._refuse_small(self.batch_size)
        if family is None and controller.scaling.measures:
            self._notify(carry_over.NOT_KNOWN.format(type(optimizer).__name__))
        self._begin_step()
        self._hooks: list[RemovableHandle] = []
        self._timed_from: tuple[float, int] | None = None  # when the last measurement was complete [s], at which step

    def _begin_step(self) -> None:
        # A step with a measurement, which has been made; samples of this process: so far, in the present micro-batch
        price = {} if self.estimator is None else {"price": self.estimator.price}
        self._measures = self.controller.needs_moments and self.controller.is_due(self.measure_interval, **price)
        self._measured, self._taken, self._micro_batch_size = False, 0, 0

    @property
    def batch_size(self) -> int:
        """Of the present batch, over all processes [samples]."""
        return self.controller.batch_size

    @property
    def samples(self) -> int:
        """That all steps so far have used, over all processes."""
        return self.controller.samples

    @property
    def steps(self) -> int:
        """That were taken so far."""
        return self.controller.steps

    @property
    def positions(self) -> range:
        """This process's part of the present batch, in an order of samples 0, 1, 2, … that all processes share.

        Those of one step end where those of the next begin, whatever the sizes. The parts differ by one sample at most.
        """
        first = self.samples + (self.rank - self.samples) % self.world_size
        return range(first, self.samples + self.batch_size, self.world_size)

    def observe(self, inputs: Batch, targets: Batch) -> contextlib.AbstractContextManager:
        """Forward and backward pass of a micro-batch run inside; watched where the step is measured.

        Args:
            inputs: (n, …), of this process; a tensor, or tuples, lists and dicts of tensors.
            targets: (n, …), likewise.
        """
        self._micro_batch_size = count(inputs)
        is_whole = not self._taken and self._micro_batch_size == len(self.positions)
        self._taken += self._micro_batch_size
        if not self._measures:
            return contextlib.nullcontext()
        if self.estimator is None:
            self.estimator = self._build_estimator(inputs, targets)
            if self._of_estimator:
                self.estimator.load_state_dict(self._of_estimator)
        return self.estimator.observe(inputs, targets, self._loss_scale, is_whole)

    @property
    def _loss_scale(self) -> float:
        """On the sum of a micro-batch's losses: DDP averages over processes, together it is the mean of the batch."""
        return self.world_size / self.batch_size

    def scale(self, loss: Tensor) -> Tensor:
        """What is to be differentiated: the micro-batch's share in the mean loss of the batch, ().

        Args:
            loss: of the micro-batch in whose `observe` this is called: the mean (), or the samples' losses (n,).
        """
        return (loss.sum() if loss.dim() else loss * self._micro_batch_size) * self._loss_scale

    def measure(
        self,
        grad_scaler: torch.amp.GradScaler | None = None,
        samples: int | None = None,
        clipping: Clipping | None = None,
    ) -> None:
        """Take the statistics of the batch, if they are due. `step` does it; call it where gradients are clipped
        (or unscaled) before that: they must be as the backward passes have left them. On all processes.

        Args:
            grad_scaler: that has scaled the loss.
            samples: that the batch has, over all processes, where a trainer ends it early (at the end of an epoch).
            clipping: as `step`.
        """
        if self._measured or not self._measures:
            return
        if self.estimator is None:
            raise ValueError("nothing was observed: forward and backward pass belong into `with scaler.observe(…)`")
        # (get_scale would wait for the device.)
        scale = grad_scaler.scale(torch.ones((), device=self.estimator.sums.device)) if grad_scaler else 1.0
        self.moments, self._measured = self.estimator.moments(scale, clipping and clipping.in_a_row), True
        self._refuse_other_size(self.moments.batch_size, samples)
        if self.moments.num_groups < 2 <= self.batch_size:
            self._notify("a batch of one micro-batch has no variance between micro-batches: cut it into two or more")
        self._time_steps()

    def step(self, grad_scaler: torch.amp.GradScaler | None = None, clipping: Clipping | None = None) -> Update:
        """The optimizer's step, zero_grad, and what follows for the next batch. On all processes.

        Args:
            grad_scaler: that has scaled the loss; its `step` and `update` are called.
            clipping: of the gradients, once they are measured; one that is `auto` also tells the controller where
                steps are as long as the curvature allows.
        """
        self.measure(grad_scaler, clipping=clipping)
        if self.world_size == 1:
            self._refuse_other_size(self._taken)
        if clipping:
            if grad_scaler:
                grad_scaler.unscale_(self.optimizer)
            clipping(self.module.parameters())
        with self.rates():
            if grad_scaler:
                grad_scaler.step(self.optimizer)
                grad_scaler.update()
            else:
                self.optimizer.step()
        self.optimizer.zero_grad()
        return self.advance()

    def advance(self, samples: int | None = None) -> Update:
        """What follows for the next batch, where a trainer takes the optimizer's step itself (with `rates` or
        `rates_in_step`) and clears the gradients. On all processes.

        Args:
            samples: as `measure`.
        """
        if self.estimator is not None and not self._measured:
            self.estimator.forget()  # of a batch that a trainer has ended early, and nobody has measured
        in_a_row = self._measured and self.estimator.flag
        update = self.controller.update(self.moments if self._measured else None, samples, clipped_in_a_row=in_a_row)
        if update.transition:
            carry_over.apply(update.transition, self.optimizer)
        self._begin_step()
        return update

    def scaling(self, batch_size: int) -> float:
        """Make the present batch one of so many samples, where the world decides how many there are; before `observe`.

        Learning rate, optimizer state and decay follow as if the controller had asked for it.

        Args:
            batch_size: over all processes [samples]; at least one a process.

        Returns:
            The factor on the learning rate.
        """
        self._refuse_small(batch_size)
        transition = self.controller.take(batch_size)
        if transition:
            carry_over.apply(transition, self.optimizer)
        self._begin_step()
        return self.controller.lr_factor

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What is inside (an evaluation, a checkpoint) does not count as time of training. The host waits."""
        start = self._time()
        yield
        if self._timed_from:
            self._timed_from = self._timed_from[0] + self._time() - start, self._timed_from[1]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and dicts, for a checkpoint; the same on all processes. Between two steps."""
        estimator = self.estimator.state_dict() if self.estimator else self._of_estimator
        return self.controller.state_dict() | {"estimator": estimator, "hardware": self._hardware}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Step times are forgotten where the state is of other hardware, or of another number of processes."""
        self.controller.load_state_dict(state)
        if state.get("hardware", self._hardware) != self._hardware:
            self.controller.step_time = StepTime()
        self._of_estimator = state.get("estimator")  # earlier states have none
        if self.estimator and self._of_estimator:
            self.estimator.load_state_dict(self._of_estimator)
        self._timed_from = None
        self._begin_step()

    @property
    def _hardware(self) -> list[str | int]:
        """What a step's time depends on, beside the batch size."""
        device = next(self.module.parameters()).device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return [name, self.world_size]

    def _build_estimator(self, inputs: Batch, targets: Batch) -> Estimator:
        if isinstance(self.test_gradients, Estimator):
            estimator = self.test_gradients
        else:
            estimator = self._estimator_by_name(inputs, targets)
        if self._is_sharded and not estimator.works_on_shards:
            raise ValueError(
                "these statistics need whole parameters, and the model is sharded: take the norm test (or none), or an "
                "estimator that gradients.build('ghost', …, in_training_pass=True) has made before fully_shard"
            )
        return estimator

    @property
    def _is_sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self.module.parameters())

    def _estimator_by_name(self, inputs: Batch, targets: Batch) -> Estimator:
        name = self.test_gradients
        may_compare = name == "auto" and not self._is_published  # micro-batches, where samples are coupled
        is_coupled = may_compare and couples_samples(self.module)
        if self._is_sharded and name not in ("auto", *BY_GROUPS):
            raise ValueError(
                f"test_gradients={name} is checked on whole parameters, and these are sharded: give an estimator that "
                "gradients.build has made before fully_shard, or take micro_batch"
            )
        if is_coupled or (self._is_sharded and name == "auto"):
            name = "micro_batch"
        estimator, notices = self._built(name, inputs, targets)
        if may_compare and not is_coupled and estimator.couples_samples:  # as the check has found
            is_coupled, (estimator, notices) = True, self._built("micro_batch", inputs, targets)
        for line in [COUPLED] * is_coupled + notices:
            self._notify(line)
        return estimator

    @property
    def _is_published(self) -> bool:
        """A test decides by the statistics as they are published, and nothing else reads the noise scale."""
        controller = self.controller
        return bool(controller.rule.test) and not (controller.decided_by.unbiased or controller.scaling.measures)

    def _built(self, name: str, inputs: Batch, targets: Batch) -> tuple[Estimator, list[str]]:
        test = self.controller.rule.test
        return build(
            name,
            self.module,
            _MeanLoss(self.loss),
            bool(test and test.needs_inner_products),
            self.max_micro_batch_size,
            probe=tuple(some(batch, slice(0, PROBE)) for batch in (inputs, targets)),
            autocast=self.autocast,
            in_training_pass=not self.is_compiled,
            notify=self._notify,
            cuts=self.world_size == 1 and not self._is_sharded,
        )

    def _refuse_small(self, batch_size: int) -> None:
        if batch_size < self.world_size:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {self.world_size} processes")

    def _refuse_other_size(self, found: int, expected: int | None = None) -> None:
        if found != (expected or self.batch_size):
            raise ValueError(
                f"the batch had {found} samples, not the {expected or self.batch_size} of batch_size"
                + (": each process brings len(scaler.positions)" if self.world_size > 1 else "")
            )

    def _notify(self, line: str) -> None:
        if self.rank == 0:
            warnings.warn(line, stacklevel=2)

    def rates_in_step(self) -> list[RemovableHandle]:
        """From here on whoever calls the optimizer's `step` takes it with the `rates` of the batch; gives the hooks."""
        if not self._hooks:
            inside = contextlib.ExitStack()
            self._hooks = [
                self.optimizer.register_step_pre_hook(lambda *_: inside.enter_context(self.rates())),
                self.optimizer.register_step_post_hook(lambda *_: inside.close()),
            ]
        return self._hooks

    @contextlib.contextmanager
    def rates(self) -> Iterator[None]:
        """Inside, learning rates and decoupled decays are for the present batch size; a scheduler sees the others."""
        changes = [(group, "lr", self.controller.lr_factor) for group in self.optimizer.param_groups]
        if (factor := self.controller.decay_factor) != 1:
            changes += [(group, "weight_decay", factor) for group in carry_over.decays_apart(self.optimizer)]
        before = [group[name] for group, name, _ in changes]
        for group, name, factor in changes:
            group[name] = group[name] * factor
        try:
            yield
        finally:
            for (group, name, _), value in zip(changes, before):
                group[name] = value

    def _time_steps(self) -> None:
        """Add the mean time of the steps since the last measurement, on the slowest process, to the controller's.

        A measurement has just waited for the device: no other step has to. All these steps were of the same size, as
        only measured steps change it where step times matter; what comes before the first measurement, preparations of
        all kinds among it, does not count.
        """
        now, before = time.perf_counter(), self._timed_from
        self._timed_from = now, self.steps
        if before is None or not self.controller.rule.timed:
            return
        seconds = (now - before[0]) / (self.steps - before[1])
        if self.world_size > 1:
            slowest = torch.tensor(seconds, dtype=torch.float64, device=self.estimator.sums.device)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            seconds = slowest.item()
        self.controller.step_time.add(self.batch_size, seconds)

    def _time(self) -> float:
        """Now that the device is done with all that is queued [s]."""
        if next(self.module.parameters()).device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


class _MeanLoss(nn.Module):
    """The mean of what a loss gives; a module, so that one with weights of its own moves to other precisions."""

    def __init__(self, loss: Loss):
        super().__init__()
        self.loss = loss

    def forward(self, outputs: Any, targets: Any) -> Tensor:
        return self.loss(outputs, targets).mean()


def _unwrapped(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module inside DistributedDataParallel and torch.compile; whether the latter was there."""
    is_compiled = False
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model, is_compiled = model._orig_mod, True
        else:
            return model, is_compiled
