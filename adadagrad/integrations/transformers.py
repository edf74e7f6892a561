"""Hugging Face's Trainer (transformers 5): one whose batch adapts, and a callback that only watches.

The Trainer ends a batch where `step % gradient_accumulation_steps` says so, a number that must not change on the way.
Here the loader gives all micro-batches of a batch as one item: each of the Trainer's steps is one of the optimizer's.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..scaler import BatchScaler
from .watching import NoiseScaleCallback, known_noise, new_scaler, observed

__all__ = ["AdaptiveBatchTrainer", "NoiseScaleCallback"]

Inputs = dict[str, Any]


class AdaptiveBatchTrainer(Trainer):
    """A Trainer whose batch is as many micro-batches of `per_device_train_batch_size` as the controller says.

    `max_steps` and the schedule of the learning rate count samples, in batches of the first size: as batches grow, the
    run takes fewer steps for the same samples. Batches run on from one epoch into the next.

    Args:
        scaling: arguments of `BatchScaler`: batch_size (or controller), max_batch_size, test, …. Sizes are multiples
            of `per_device_train_batch_size` × processes.
        loss: of the model's outputs and the labels, the mean over the samples; default: `compute_loss_func`, or cross
            entropy of the logits (docs/integrations.md says what is a sample of a language model).

    Attributes:
        scaler: the `BatchScaler`, once `train` has begun.

    Raises:
        ValueError: sizes do not go together (the message says what to change).
    """

    def __init__(
        self, *arguments, scaling: dict[str, Any], loss: Callable[[Any, Tensor], Tensor] | None = None, **more
    ):
        super().__init__(*arguments, **more)
        self.scaling, self.sample_loss = scaling, loss
        self.scaler: BatchScaler | None = None
        self.saved: dict[str, Any] | None = None
        self.piece = self.args.train_batch_size * self.args.world_size
        controller = scaling.get("controller")
        self.first_size = controller.batch_size if controller else scaling["batch_size"]
        largest = controller.limits.max_batch_size if controller else scaling.get("max_batch_size")
        for size in (self.first_size, largest or self.piece):
            if size % self.piece:
                raise ValueError(
                    f"a batch of {size} is no multiple of {self.piece}: per_device_train_batch_size × processes"
                )
        if self.args.gradient_accumulation_steps != 1:
            raise ValueError(
                "leave gradient_accumulation_steps at 1: how many micro-batches to a batch changes on the way"
            )
        self.add_callback(_Steps(self))

    def get_train_dataloader(self) -> "_Batches":
        """Of whole batches: lists of micro-batches."""
        if len(self.train_dataset) % self.piece and not self.args.dataloader_drop_last:
            raise ValueError(f"set dataloader_drop_last=True: the data set's size is no multiple of {self.piece}")
        self.batches = _Batches(super().get_train_dataloader(), self)
        return self.batches

    def _init_training_state(self, max_steps: int, *others) -> tuple[int, int]:
        super()._init_training_state(max_steps, *others)
        self.last_sample = max_steps * self.first_size
        self.saved = self.state.stateful_callbacks.get("BatchScaler")
        return (self.saved or {"samples": 0})["samples"] // self.batches.samples, 0  # the loader finds its place itself

    def _prepare_for_training(self, *arguments) -> tuple:
        prepared = super()._prepare_for_training(*arguments)
        for hook in self.scaler.rates_in_step() if self.scaler else ():  # of training before this
            hook.remove()
        self.scaler = new_scaler(self, self.sample_loss, **self.scaling)
        self.scaler.controller.limits.multiple = self.piece
        self.scaler.rates_in_step()
        if self.saved:
            self.scaler.load_state_dict(self.saved)
        return prepared

    def create_scheduler(self, *arguments, **more):
        schedule = super().create_scheduler(*arguments, **more)
        if isinstance(schedule, LRScheduler) and not isinstance(schedule, ReduceLROnPlateau):
            self.lr_scheduler = _BySamples(schedule, self)
        return self.lr_scheduler

    def training_step(self, model, inputs: list[Inputs], num_items_in_batch=None) -> Tensor:
        self.current_gradient_accumulation_steps, total = len(inputs), 0.0
        for i, piece in enumerate(inputs, start=1):
            gradients_stay_here = contextlib.nullcontext() if i == len(inputs) else self.accelerator.no_sync(model)
            with gradients_stay_here, observed(self, self.scaler, piece, num_items_in_batch):
                total += super().training_step(model, piece, num_items_in_batch)
        self.scaler.measure(self.accelerator.scaler)
        return total

    def _get_num_items_in_batch(self, batch_samples: list[list[Inputs]], device: torch.device):
        return super()._get_num_items_in_batch([piece for batch in batch_samples for piece in batch], device)

    def _track_num_input_tokens(self, inputs: list[Inputs]) -> None:
        for piece in inputs:
            super()._track_num_input_tokens(piece)

    def floating_point_ops(self, inputs: list[Inputs]) -> int:
        return sum(super(AdaptiveBatchTrainer, self).floating_point_ops(piece) for piece in inputs)

    def _maybe_log_save_evaluate(self, *arguments, **more) -> None:
        waits = self.control.should_evaluate or self.control.should_save
        with self.scaler.pause() if waits else contextlib.nullcontext():
            super()._maybe_log_save_evaluate(*arguments, **more)

    def _save_checkpoint(self, *arguments) -> None:
        self.state.stateful_callbacks["BatchScaler"] = self.scaler.state_dict()
        super()._save_checkpoint(*arguments)

    def log(self, logs: dict[str, float], *others) -> None:
        """Beside what the Trainer logs: the batch size and the noise scale; the learning rate is the step's own."""
        if "learning_rate" in logs:
            logs["learning_rate"] *= self.lr_factor
            logs |= {"batch_size": self.taken, **known_noise(self.scaler)}
        super().log(logs, *others)


class _Steps(TrainerCallback):
    """What follows from a step of the optimizer's, and where epochs and training end: by samples."""

    def __init__(self, trainer: AdaptiveBatchTrainer):
        self.trainer = trainer

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        trainer = self.trainer
        trainer.taken, trainer.lr_factor = trainer.scaler.batch_size, trainer.scaler.controller.lr_factor
        trainer.scaler.advance()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        trainer, samples = self.trainer, self.trainer.scaler.samples
        state.epoch = samples / trainer.batches.samples
        begun = (samples - trainer.taken) // trainer.batches.samples
        control.should_epoch_stop |= samples // trainer.batches.samples > begun
        if samples >= trainer.last_sample:  # what the Trainer does itself where it comes to max_steps
            control.should_training_stop = True
            control.should_evaluate |= args.eval_strategy == "steps" and args.eval_delay <= state.global_step
            control.should_save |= args.save_strategy == "steps"


class _Batches:
    """The loader's micro-batches, as many at a time as make a batch at that moment; from epoch to epoch without end.

    Attributes:
        samples: of an epoch.
    """

    def __init__(self, loader, trainer: AdaptiveBatchTrainer):
        self.loader, self.trainer, self.dataset = loader, trainer, loader.dataset
        self.samples, self.running = len(loader) * trainer.piece, None

    def __len__(self) -> int:
        return -(-self.samples // self.trainer.first_size)

    def __iter__(self) -> Iterator[list[Inputs]]:
        self.running = self.running or self._batches()
        return self.running

    def _batches(self) -> Iterator[list[Inputs]]:
        pieces = self._pieces(*divmod(self.trainer.scaler.samples // self.trainer.piece, len(self.loader)))
        while True:
            yield [next(pieces) for _ in range(self.trainer.scaler.batch_size // self.trainer.piece)]

    def _pieces(self, epoch: int, done: int) -> Iterator[Inputs]:
        while True:
            self.loader.set_epoch(epoch)
            pieces = iter(skip_first_batches(self.loader, done) if done else self.loader)
            with torch.random.fork_rng([], enabled=bool(done)):  # the run that goes on had drawn for its loader before
                first = next(pieces)
            yield first
            yield from pieces
            epoch, done = epoch + 1, 0


class _BySamples:
    """A schedule of so many steps of the first size, where batches are larger: at each of them it takes several."""

    def __init__(self, schedule: LRScheduler, trainer: AdaptiveBatchTrainer):
        self.schedule, self.trainer = schedule, trainer

    def step(self) -> None:
        while self.schedule.last_epoch < self.trainer.scaler.samples // self.trainer.first_size:
            self.schedule.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.schedule, name)
