"""The Trainer of transformers, watched: what it gives to its model and its loss, as `BatchScaler` wants to see them.

A sample is a row of the batch: with tokens (labels that are not −100), a sequence. The Trainer's loss over T tokens of
b sequences, Σ_i s_i / T with s_i the sum over the tokens of sequence i, is the mean of ℓ_i = s_i / (T/b).
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from ..control import Constant, Controller, LearningRateScaling
from ..gradients.samples import count
from ..scaler import BatchScaler


class NoiseScaleCallback(TrainerCallback):
    """Watches any Trainer and changes nothing: its logs get the noise scale and the ends of its 90 % interval.

        trainer.add_callback(NoiseScaleCallback(trainer))

    Args:
        trainer: that trains with it.
        measure_interval: steps from one measurement to the next.
        smoothing: half-life of the averages [samples].
        loss: as `AdaptiveBatchTrainer`.
        test_gradients: where the statistics come from (`gradients.build`).

    Attributes:
        scaler: the `BatchScaler` whose batch stays as it is, once `train` has begun; its `controller` has the numbers.
    """

    def __init__(
        self,
        trainer: Trainer,
        measure_interval: int = 16,
        smoothing: float = 5_000.0,
        loss: Callable[[Any, Tensor], Tensor] | None = None,
        test_gradients: str = "auto",
    ):
        self.trainer, self.loss, self.smoothing = trainer, loss, smoothing
        self.how = {"measure_interval": measure_interval, "test_gradients": test_gradients}
        self.training_step, self.scaler = trainer.training_step, None
        trainer.training_step = self._watched_step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        b = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        keeps = LearningRateScaling("adascale", b)  # asks for statistics; of a batch that stays it makes a factor of 1
        controller = Controller(b, rule=Constant(), unbiased=True, smoothing=self.smoothing, scaling=keeps)
        self.scaler = new_scaler(self.trainer, self.loss, controller=controller, **self.how)
        callbacks = self.trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))  # before those that write logs

    def _watched_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> Tensor:
        with observed(self.trainer, self.scaler, inputs, num_items_in_batch):
            loss = self.training_step(model, inputs, num_items_in_batch)
        is_whole = self.scaler._taken == len(self.scaler.positions)  # at the end of an epoch it may be smaller
        if self.trainer.accelerator.sync_gradients and is_whole:
            self.scaler.measure(self.trainer.accelerator.scaler)
        return loss

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        self.scaler.advance()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs=None, **_) -> None:
        if logs and "loss" in logs:
            noise = known_noise(self.scaler)
            logs.update(noise)
            state.log_history[-1].update(noise)


def known_noise(scaler: BatchScaler) -> dict[str, float]:
    """As far as it is known, for a log."""
    return {name: value for name, value in scaler.controller.known_noise().items() if math.isfinite(value or math.inf)}


def new_scaler(trainer: Trainer, loss: Callable | None, **arguments) -> BatchScaler:
    """Of what the Trainer is about to train."""
    scaler = BatchScaler(trainer.model_wrapped, _loss(trainer, loss), trainer.optimizer.optimizer, **arguments)
    scaler.module = _ByName(scaler.module)
    return scaler


def observed(
    trainer: Trainer, scaler: BatchScaler, inputs: dict[str, Any], items: Tensor | int | None
) -> contextlib.AbstractContextManager:
    """Around the Trainer's own step on a micro-batch.

    Args:
        items: that the Trainer divides the sum of the losses by, of the whole batch.
    """
    inputs = dict(trainer._prepare_inputs(inputs))
    targets = {"labels": inputs.pop("labels")}
    if items is not None:
        # A Trainer that does not average over devices divides by those of this process.
        of_all = items if trainer.args.average_tokens_across_devices else items * scaler.world_size
        share = torch.as_tensor(of_all / scaler.batch_size, device=targets["labels"].device)
        targets["items"] = share.reshape(1).expand(count(inputs))
    return scaler.observe(inputs, targets)


class _ByName(nn.Module):
    """A model that takes its inputs by name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs)


def _loss(trainer: Trainer, of_samples: Callable | None) -> Callable[[Any, dict[str, Tensor]], Tensor]:
    """Of outputs and `targets` of any samples: the mean of ℓ_i, or their sum where the Trainer adds up tokens."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    is_causal = getattr(model, "loss_function", None) is ForCausalLMLoss and not model.config.is_encoder_decoder
    given, shifts = trainer.compute_loss_func, trainer._loss_shifts_labels or is_causal  # GPT-2 has no `loss_type`

    def loss(outputs: Any, targets: dict[str, Tensor]) -> Tensor:
        labels, items = targets["labels"], targets["items"][0] if "items" in targets else None
        if of_samples:
            return of_samples(outputs, labels)
        if given:
            return given(outputs, labels, num_items_in_batch=items)
        logits = outputs["logits"]
        if shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        rows = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        return cross_entropy(*rows) if items is None else cross_entropy(*rows, reduction="sum") / items

    return loss
