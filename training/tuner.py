"""Before the first step: passes that leave no trace choose the size of micro-batches and find what does not fit.

`parts` are the components of the run (components.py), put together and not used yet.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch.utils._pytree import tree_map

import batches
import optim
from adadagrad import gradients
from adadagrad.control.step_time import StepTime
from adadagrad.gradients.isolation import random_states, set_random_states
from launch import fsdp
from launch.collectives import all_gather_object
from options.errors import RunError
from training.clock import Event
from training.components import Components
from training.metrics import Validation, weights_of

MEASURED = ("max_micro_batch_size", "eval_micro_batch_size")
"""The options for which `auto` is found out here."""
REPETITIONS = 5
"""At most so many timed passes of a size."""
ENOUGH = 0.2
"""Seconds of them after which no more are needed."""
LARGEST_OF_EVALUATION = 1024
"""Where nothing is measured [samples]."""


def rehearse(parts: Components, step_time: StepTime) -> tuple[int, int, list[str]]:
    """The most samples of a micro-batch in training, in evaluation, and what the user should be told. On all ranks.

    Args:
        step_time: learns what was measured.

    Raises:
        RunError: a micro-batch of the size in the options does not fit into the device's memory.
    """
    fabric = parts.fabric
    if fabric.world_size > 1:
        # DDP puts its buckets into the order in which gradients come after the first pass: without it the first step of
        # a run, and of its continuation, would sum in another order than the steps after it.
        seconds_of_pass(parts, parts.min_micro_batch_size, in_step=False)
    size, told = _size_of_training(parts, step_time)
    evaluation_size, told_of_evaluation = _size_of_evaluation(parts, size)
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return size, evaluation_size, told + told_of_evaluation


def _size_of_training(parts: Components, step_time: StepTime) -> tuple[int, list[str]]:
    c, fabric = parts.config, parts.fabric
    largest = -(-c.max_batch_size // fabric.world_size)
    size = c.max_micro_batch_size
    if size != "auto":
        # (On a CPU what is too large is slow, and no error.)
        if fabric.device.type != "cpu" and math.isinf(seconds_of_pass(parts, min(size, largest))):
            raise RunError(
                f"out of memory on the device with {min(size, largest)} samples, to which the batch can grow: lower "
                "--max_micro_batch_size, or leave it out: auto takes what fits"
            )
        return size, []
    largest = min(largest, parts.largest_micro_batch or largest)
    least = min(largest, max(8, parts.min_micro_batch_size))
    size, rates = batches.quickest(lambda n: samples_per_second(parts, n, seconds_of_pass), least, largest)
    if not size:
        raise RunError(f"out of memory on the device with {least} samples: take a smaller --model")
    for n, rate in rates.items():
        if rate:
            step_time.probe(n * fabric.world_size, n / rate)
    return size, [_told("max_micro_batch_size", size, rates)]


def _size_of_evaluation(parts: Components, size_of_training: int) -> tuple[int, list[str]]:
    c, fabric = parts.config, parts.fabric
    share = -(-parts.validation_samples // fabric.world_size)
    size = c.eval_micro_batch_size
    if size != "auto":
        if fabric.device.type != "cpu" and math.isinf(seconds_of_evaluation(parts, min(size, share))):
            raise RunError(
                f"out of memory on the device in an evaluation of {min(size, share)} samples: lower "
                "--eval_micro_batch_size"
            )
        return size, []
    if c.max_micro_batch_size != "auto":
        return min(size_of_training, LARGEST_OF_EVALUATION), []
    largest = min(share, parts.largest_micro_batch or share)
    least = min(size_of_training, largest)
    size, rates = batches.quickest(lambda n: samples_per_second(parts, n, seconds_of_evaluation), least, largest)
    return size or least, [_told("eval_micro_batch_size", size or least, rates)]


def _told(option: str, size: int, rates: dict[int, float]) -> str:
    measured = ", ".join(f"{n}: {rate:,.0f}" for n, rate in rates.items())
    return f"{option}=auto takes {size} (samples/s by size: {measured})"


def samples_per_second(parts: Components, size: int, seconds_of: Callable[..., float]) -> float:
    """Of a device, with micro-batches of so many samples; 0 where they do not fit into the memory of every rank's.

    Args:
        seconds_of: (parts, size) → seconds of a pass, which are measured.
    """
    seconds = [seconds_of(parts, size)]  # the first one makes plans and fills caches
    while not math.isinf(seconds[-1]) and len(seconds) <= REPETITIONS and sum(seconds[1:]) < ENOUGH:
        seconds.append(seconds_of(parts, size))
    return size / min(seconds[1:], default=math.inf)


def seconds_of_pass(parts: Components, size: int, in_step: bool = True) -> float:
    """The slowest rank's time for forward and backward pass, and for the test's work where the run is to test.

    Infinite where one of them runs out of memory.

    Args:
        size: samples of the pass.
        in_step: as a micro-batch within a step; else as its last one, with the exchange of gradients, untested.
    """
    fabric, testing = parts.fabric, in_step and bool(parts.estimator)
    # What FSDP2 adds up between exchanges is beyond the optimizer's reach: it would come into the first step.
    exchanged = not in_step or parts.sharded
    inputs, targets = _samples(parts, size)

    def forward_and_backward() -> None:
        observing = parts.estimator.observe(inputs, targets, 1 / size) if testing else contextlib.nullcontext()
        with fabric.no_backward_sync(parts.model, enabled=not exchanged), observing:
            losses = parts.loss(parts.forward(inputs), targets)
            parts.backward(losses, weights_of(losses, size, 1 / size))

    with leaving_no_trace(parts):
        seconds = _slowest(parts, forward_and_backward)
        if testing and not math.isinf(seconds):
            seconds += _slowest(parts, parts.moments)
    return seconds


def seconds_of_evaluation(parts: Components, size: int) -> float:
    """The slowest rank's time for a micro-batch of the evaluation; infinite where one runs out of memory."""
    inputs, targets = _samples(parts, size)
    validation = Validation(parts.loss, parts.metrics, parts.fabric.device)
    with leaving_no_trace(parts), torch.no_grad(), fsdp.forward_only(parts.module):
        parts.model.eval()
        try:
            return _slowest(parts, lambda: validation.update(parts.forward(inputs), targets))
        finally:
            validation.forget()


def _samples(parts: Components, size: int) -> batches.Batch:
    """As many as are asked for, of a few that are read."""
    few = parts.stream.read(range(min(size, 32, parts.samples_per_epoch)))
    return tree_map(lambda part: part[torch.arange(size, device=part.device) % len(part)], few)


def _slowest(parts: Components, work: Callable[[], object]) -> float:
    """Seconds of the slowest rank, infinite where one has run out of memory: the same on all ranks."""
    start, seconds = Event(parts.fabric.device), math.inf
    try:
        work()
        end = Event(parts.fabric.device)
        end.wait()
        seconds = end.seconds_since(start)
    except (RuntimeError, MemoryError) as error:
        if not gradients.is_out_of_memory(error):
            raise
    except RunError:  # out of memory in the test; where ranks exchange there, the others cannot be called back
        if parts.fabric.world_size > 1:
            raise
    return max(all_gather_object(parts.fabric, seconds))


@contextlib.contextmanager
def leaving_no_trace(parts: Components) -> Iterator[None]:
    """What is inside leaves no trace: buffers, random states and gradients are as before.

    On a GPU it has no more memory than a step will have: the optimizer's state is made by the first step only.
    """
    device = parts.fabric.device
    to_come = 0 if device.type == "cpu" else optim.bytes_of_state_to_come(parts.optimizer, parts.config)
    room = torch.empty(to_come, dtype=torch.uint8, device=device)
    buffers = [buffer.clone() for buffer in parts.module.buffers()]
    states = random_states(device)
    parts.model.train()
    try:
        yield
    finally:
        del room
        parts.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, before in zip(parts.module.buffers(), buffers):
                buffer.copy_(before)
        set_random_states(states, device)
        parts.model.train()
        if parts.estimator:
            parts.estimator.forget()
        if device.type == "cuda":
            torch.cuda.empty_cache()
