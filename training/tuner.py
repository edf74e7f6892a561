"""Before the first step: passes that leave no trace choose the size of micro-batches, find what does not fit, and
measure how the time of a step depends on its batch.

`parts` are the components of the run (components.py), put together and not used yet.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

import batches
import optim
import tests
from adadagrad import gradients
from adadagrad.control.step_time import StepTime
from adadagrad.gradients.isolation import random_states, set_random_states
from launch.collectives import all_gather_object
from options.errors import RunError
from options.schema import Config
from training.clock import Event
from training.components import Components

MEASURED = ("max_micro_batch_size", "knee")
"""The options that are found out here where they say nothing."""
REPETITIONS = 5
"""At most so many timed passes of a size."""
ENOUGH = 0.2
"""Seconds of them after which no more are needed."""


def tune(parts: Components) -> tuple[dict[str, Any], list[str]]:
    """The options in `MEASURED` as they take effect, and lines for the user. On all ranks, which get the same.

    Raises:
        RunError: a micro-batch of the size in the options does not fit into the device's memory.
    """
    fabric = parts.fabric
    if parts.config.strategy != "auto":  # of a single process, too: its gradients lie in the buckets
        # DDP puts its buckets into the order in which gradients come after the first pass: without it the first step of
        # a run, and of its continuation, would sum in another order than the steps after it.
        seconds_of_pass(parts, parts.min_micro_batch_size, in_step=False)
    size, lines = _size_of_training(parts)
    knee, of_knee = parts.config.knee, []
    if is_knee_needed(parts.config):
        knee, of_knee = _knee(parts, size)
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return dict(zip(MEASURED, (size, knee))), lines + of_knee


def is_knee_needed(config: Config) -> bool:
    """The batch size depends on the hardware, and the options do not say how."""
    return tests.rule(vars(config)).timed


def _size_of_training(parts: Components) -> tuple[int, list[str]]:
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
    size, rates = batches.quickest(lambda n: samples_per_second(parts, n), least, largest)
    if not size:
        raise RunError(f"out of memory on the device with {least} samples: take a smaller --model")
    by_size = ", ".join(f"{n}: {rate:,.0f}" for n, rate in rates.items())
    return size, [f"max_micro_batch_size=auto: using {size} (samples/s by size: {by_size})"]


def samples_per_second(parts: Components, size: int) -> float:
    """Per device, with micro-batches of this size; 0 if any rank runs out of memory."""
    seconds = [seconds_of_pass(parts, size)]  # the first one makes plans and fills caches
    while not math.isinf(seconds[-1]) and len(seconds) <= REPETITIONS and sum(seconds[1:]) < ENOUGH:
        seconds.append(seconds_of_pass(parts, size))
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

    def forward_and_backward(inputs: Any, targets: Any) -> None:
        observing = parts.estimator.observe(inputs, targets, 1 / size) if testing else contextlib.nullcontext()
        # (Leaving no_backward_sync(enabled=False), Fabric turns the exchange of shards off for good.)
        apart = contextlib.nullcontext() if exchanged else fabric.no_backward_sync(parts.model)
        with apart, observing:
            losses = parts.loss(parts.forward(inputs), targets)
            parts.backward(losses, size, 1 / size)

    with leaving_no_trace(parts):
        seconds = _slowest(parts, forward_and_backward, size)
        if testing and not math.isinf(seconds):
            seconds += _slowest(parts, parts.moments)
    return seconds


ROUNDS, SECONDS = (4, 8), 2.0
"""Of the measurement of the knee: least and most, and the time after which no further round begins [s]."""
LONG_STEP = 1.0
"""Sizes whose step takes longer are not followed by larger ones [s]."""


def _knee(parts: Components, micro_batch_size: int) -> tuple[float, list[str]]:
    """P = α/β [samples] of a line through the times of whole steps α + βb, at batch sizes b by factors of four.

    Each size counts with its shortest step, on the slowest rank: whatever disturbs a machine makes steps longer. Sizes
    take turns, so that a disturbance does not meet one alone.
    """
    c, world_size = parts.config, parts.fabric.world_size
    plans, shortest = [], {}
    with leaving_no_trace(parts), _without_learning(parts):
        size, largest = max(2, world_size * parts.min_micro_batch_size), 4 * world_size * micro_batch_size
        largest = max(size, min(largest, c.max_batch_size))
        while True:  # the first round makes plans and fills caches
            plans.append(batches.cut(0, size, world_size, micro_batch_size, 1, parts.min_micro_batch_size, even=True))
            _slowest(parts, lambda: _whole_step(parts, plans[-1]))
            if _slowest(parts, lambda: _whole_step(parts, plans[-1])) > LONG_STEP or size == largest:
                break
            size = min(4 * size, largest)
        spent, rounds = 0.0, 0
        while rounds < ROUNDS[0] or (rounds < ROUNDS[1] and spent < SECONDS):
            for plan in plans:
                seconds = _slowest(parts, lambda plan=plan: _whole_step(parts, plan))
                shortest[plan.batch_size] = min(seconds, shortest.get(plan.batch_size, math.inf))
                spent += seconds
            rounds += 1
    step_time = StepTime()
    for size, seconds in shortest.items():
        step_time.add(size, seconds)
    if (line := step_time.fit()) is None:
        return float(largest), [f"knee: taken to be {largest:,}, as there are no two batch sizes to compare here"]
    fixed, per_sample = line
    knee = float(f"{max(fixed / per_sample, 1.0):.3g}")
    times = f"{1000 * fixed:.3g} ms and {1000 * per_sample:.3g} ms a sample"
    return knee, [f"knee={knee:g}: a step takes {times} here, measured once (config.yaml keeps it)"]


def _whole_step(parts: Components, plan: batches.Plan) -> None:
    """Reading, forward and backward passes, exchange of gradients, optimizer step."""
    micro_batches = plan.micro_batches(parts.fabric.global_rank)
    if isinstance(parts.stream, batches.InMemoryStream):
        taken = parts.stream.take(micro_batches)
    else:  # what worker processes read ahead takes no time of a step
        taken = (_samples(parts, len(positions)) for positions in micro_batches)
    for i, (inputs, targets) in enumerate(taken, start=1):
        n = len(micro_batches[i - 1])
        last = i == len(micro_batches)
        with contextlib.nullcontext() if last else parts.fabric.no_backward_sync(parts.model):
            losses = parts.loss(parts.forward(inputs), targets)
            parts.backward(losses, n, parts.fabric.world_size / plan.batch_size)
    parts.step()


@contextlib.contextmanager
def _without_learning(parts: Components) -> Iterator[None]:
    """Optimizer steps inside change nothing: their rate is 0, and what they make of the optimizer's state is undone."""
    optimizer, precision = parts.optimizer, parts.fabric.strategy.precision
    scaler, norms = copy.deepcopy(precision.state_dict()), parts.clipping and parts.clipping.state_dict()
    groups = [{name: copy.deepcopy(v) for name, v in g.items() if name != "params"} for g in optimizer.param_groups]
    state = {parameter: copy.deepcopy(own) for parameter, own in optimizer.state.items()}
    # Some step by what they keep, whatever the rate (Rprop): of those that are not known, the weights are kept, too.
    kept = [parameter.detach().clone() for parameter in parts.parameters] if parts.family is None else []
    optim.set_learning_rate(optimizer, 0.0)
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, before in zip(optimizer.param_groups, groups):
            group.update(before)
        with torch.no_grad():
            for parameter, before in zip(parts.parameters, kept):
                parameter.copy_(before)
        precision.load_state_dict(scaler)
        if norms:
            parts.clipping.load_state_dict(norms)


def _samples(parts: Components, size: int) -> batches.Batch:
    """As many as are asked for, of a few that are read."""
    few = parts.stream.read(range(min(size, 32, parts.samples_per_epoch)))
    return tree_map(lambda part: part[torch.arange(size, device=part.device) % len(part)], few)


def _slowest(parts: Components, work: Callable[..., object], size: int | None = None) -> float:
    """Seconds of the slowest rank, infinite where one has run out of memory: the same on all ranks.

    Args:
        size: so many samples are made before, untimed, and handed to `work`; None: it takes nothing.
    """
    seconds = math.inf
    try:
        samples = _samples(parts, size) if size else ()
        start = Event(parts.fabric.device)
        work(*samples)
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
    """What is inside leaves no trace: buffers, random states, gradients and the model's own attributes are as before.

    On a GPU it has no more memory than a step will have: the optimizer's state is made by the first step only.
    """
    device = parts.fabric.device
    to_come = 0 if device.type == "cpu" else optim.bytes_of_state_to_come(parts.optimizer, parts.config)
    room = torch.empty(to_come, dtype=torch.uint8, device=device)
    buffers = [buffer.clone() for buffer in parts.module.buffers()]
    states = random_states(device)
    parts.model.train()
    try:
        # Counters, generators, what a model keeps of its last pass; of shards, torch keeps books in there.
        with contextlib.nullcontext() if parts.sharded else gradients.preserving_attributes(parts.module):
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
        if parts.noise_scales:
            parts.noise_scales.forget()
        if device.type == "cuda":
            torch.cuda.empty_cache()
