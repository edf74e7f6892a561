"""Lightning's Trainer: a callback that adds up as many micro-batches as the controller says.

The Trainer ends a batch where `accumulate_grad_batches` divides the number of micro-batches since the epoch began: the
callback sets it, when a batch begins, to the number at which that one ends, and puts the factor on the loss right.
"""

import contextlib
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..gradients import Loss
from ..gradients.samples import Batch, count
from ..scaler import BatchScaler


class AdaptiveBatchSize(Callback):
    """Batches of as many of the loader's micro-batches as the controller says; under automatic optimization with one
    optimizer, on one device or several (DDP, FSDP2).

    A batch of the loader is a pair, inputs and targets; all have the same size. The epoch's last batch may be smaller.
    Logged, and so in `trainer.callback_metrics`: batch_size, lr_factor and, once it is known, noise_scale.

    Args:
        loss: as `BatchScaler`'s; what `training_step` gives is its mean over the micro-batch.
        model: the module's attribute that is called with the inputs.
        scaling: arguments of `BatchScaler`: batch_size (or controller), max_batch_size, test, …. Sizes are multiples
            of the micro-batch × processes.

    Attributes:
        scaler: the `BatchScaler`, once training has begun.

    Raises:
        ValueError: in training: the micro-batches differ in size, or do not add up to the batch.
    """

    def __init__(self, loss: Loss, model: str = "model", **scaling):
        self.loss, self.model, self.scaling = loss, model, scaling
        self.scaler: BatchScaler | None = None
        self.saved: dict[str, Any] | None = None
        self.watched = contextlib.ExitStack()
        self.end, self.piece = 0, 0  # of the batch in micro-batches of the epoch; samples of one, on all processes

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        (optimizer,) = trainer.optimizers
        self.scaler = BatchScaler(getattr(module, self.model), self.loss, optimizer, **self.scaling)
        self.scaler.rates_in_step()
        if self.saved:
            self.scaler.load_state_dict(self.saved)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.end = 0  # the trainer ends an epoch with a step, whatever has been added up by then

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, batch_idx: int) -> None:
        piece = count(batch[0]) * self.scaler.world_size
        if piece != (self.piece or piece) or self.scaler.batch_size % piece:
            raise ValueError(
                f"a batch of {self.scaler.batch_size} is not made of micro-batches of {piece} (over all processes): "
                "batch_size and max_batch_size must be multiples of that, and the loader needs drop_last=True"
            )
        self.piece = self.scaler.controller.limits.multiple = piece
        if batch_idx >= self.end:
            trainer.optimizers[0].zero_grad()  # as the trainer does at the begin of an epoch alone, with these numbers
            self.number, self.taken = self.scaler.batch_size // piece, 0
            self.end = trainer.accumulate_grad_batches = batch_idx + self.number
        self.watched.enter_context(self.scaler.observe(*batch))

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        if self.end != self.number:
            loss.mul_(self.end / self.number)  # the trainer has divided by the wrong one

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.watched.close()
        self.taken += 1
        if trainer.fit_loop._should_accumulate():
            return
        if self.taken < self.number:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.number / self.taken
        self.scaler.measure(getattr(trainer.precision_plugin, "scaler", None), self.taken * self.piece)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        told = {"batch_size": self.taken * self.piece, "lr_factor": self.scaler.controller.lr_factor}
        self.scaler.advance(self.taken * self.piece)
        noise_scale = self.scaler.controller.noise_scale
        module.log_dict(
            {name: float(value) for name, value in told.items()} | ({"noise_scale": noise_scale} if noise_scale else {})
        )

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.scaler else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict
