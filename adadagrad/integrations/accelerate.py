"""accelerate: a batch of as many micro-batches as the controller says.

`Accelerator.accumulate` ends a batch where `gradient_accumulation_steps` divides its count of micro-batches: changing
the former alone lets processes part ways. Here both are set together, and only where a batch begins.
"""

import contextlib
from collections.abc import Iterator

from accelerate import Accelerator
from torch import Tensor, nn

from ..control import Controller
from ..gradients.samples import Batch, count
from ..scaler import BatchScaler

UNEVEN = (
    "a batch of {} is not made of micro-batches of {} (over all processes): batch_size and max_batch_size must be "
    "multiples of that, and the loader needs drop_last=True"
)


@contextlib.contextmanager
def adaptive_accumulate(
    accelerator: Accelerator, scaler: BatchScaler | Controller, model: nn.Module, inputs: Batch, targets: Batch = ()
) -> Iterator[None]:
    """In the place of `accelerator.accumulate(model)`, around all that is done with a micro-batch.

        scaler = BatchScaler(model, cross_entropy, optimizer.optimizer, batch_size=16, max_batch_size=512)
        for inputs, targets in endless(loader):
            with adaptive_accumulate(accelerator, scaler, model, inputs, targets):
                accelerator.backward(cross_entropy(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()

    A batch runs on from one epoch into the next. The statistics are those of the gradients as `accelerator.backward`
    leaves them, so that they may be clipped afterwards. Given a `Controller` (`Limits.multiple` the micro-batch ×
    processes), the loop measures and calls `controller.update` by itself after the step.

    Args:
        scaler: its optimizer is torch's (`.optimizer` of the one that `accelerator.prepare` gives).
        model: as `accelerator.prepare` gives it.
        inputs: (n, …), of this process: all micro-batches have n samples on every process.
        targets: (n, …).

    Raises:
        ValueError: the batch is no whole number of micro-batches.
    """
    controller = scaler if isinstance(scaler, Controller) else scaler.controller
    piece = controller.limits.multiple = count(inputs) * accelerator.num_processes
    if accelerator.sync_gradients:  # the last micro-batch was the end of a batch
        if controller.batch_size % piece:
            raise ValueError(UNEVEN.format(controller.batch_size, piece))
        accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False  # no smaller batch at an epoch's end
        accelerator.gradient_accumulation_steps, accelerator.step = controller.batch_size // piece, 0
    watched = _observed(accelerator, scaler, inputs, targets) if scaler is not controller else contextlib.nullcontext()
    with accelerator.accumulate(model), watched:
        yield
    if accelerator.sync_gradients and scaler is not controller:
        scaler.advance()


@contextlib.contextmanager
def _observed(accelerator: Accelerator, scaler: BatchScaler, inputs: Batch, targets: Batch) -> Iterator[None]:
    """Inside, the micro-batch is watched until `accelerator.backward` has done its work; then the batch is measured."""
    scaler.rates_in_step()
    plain, observed = accelerator.backward, contextlib.ExitStack()

    def backward(loss: Tensor, **how) -> None:
        plain(loss, **how)
        observed.close()
        if accelerator.sync_gradients:
            scaler.measure(accelerator.scaler)

    with observed:
        observed.enter_context(scaler.observe(inputs, targets))
        accelerator.backward = backward
        try:
            yield
        finally:
            del accelerator.backward
