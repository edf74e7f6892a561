"""Estimators with a pass of their own: `vmap`, a chunk of samples at a time, and `loop`, one after the other."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .contributions import per_sample_norms_sq, real
from .estimator import Estimator, MicroBatch, dense, is_out_of_memory
from .isolation import drawing_from, isolated, random_states
from .samples import Batch, chunks, count, per_sample, taken_apart

Result = TypeVar("Result")
Observed = tuple[Callable[[], Batch], Batch, list, dict[str, Tensor]]
"""What makes the inputs, targets, random states and buffers before the pass."""


class OwnPass(Estimator):
    """An estimator with a pass of its own, over the model with every sample by itself (isolation.py).

    Args:
        notify: called with a line where something turns out later.

    Attributes:
        moving: names of the buffers that a forward pass changes (the check at the start finds them).
    """

    def __init__(self, *arguments, notify: Callable[[str], None] = lambda line: None):
        super().__init__(*arguments)
        self.notify = notify
        self.moving: set[str] = {name for name, _ in self.model.named_buffers()}
        self.device = next(self.model.parameters()).device

    def _start(self) -> None:
        super()._start()
        self.observed: list[Observed] = []

    def _before(self) -> tuple[list, dict[str, Tensor]]:
        """What a later pass must find to see what this one sees: random states, and buffers that move."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers() if name in self.moving}
        return random_states(self.device), buffers

    def _call(self, inputs: Batch):
        with self.autocast(), in_wide_range(self.device):
            return self.model(inputs)

    def _losses(self, outputs: Batch, targets: Batch) -> Tensor:
        """The samples' losses (n,), whatever the reduction of `loss`."""
        return per_sample(self.loss, outputs, targets)

    def _chunks(self, inputs: Batch, targets: Batch) -> Iterator[tuple[Batch, Batch]]:
        return chunks(self.max_micro_batch_size, inputs, targets)

    def _observe_in_chunks(self, measure: Callable, batch: MicroBatch, before: tuple) -> None:
        """Add a micro-batch by `measure`: a chunk → ‖g_i‖² (n,), Σ g_i by parameter."""

        def measure_all() -> tuple[Tensor, dict[str, Tensor]]:
            norms_sq, total = [], {}
            with drawing_from(before[0], self.device):
                for chunk in self._chunks(batch.inputs, batch.targets):
                    of_chunk, gradients = measure(chunk)
                    norms_sq.append(of_chunk)
                    total = added(total, gradients)
            return torch.cat(norms_sq), total

        norms_sq, gradients = self._in_memory(measure_all)
        self._add(norms_sq)
        self.gradient_sum = added(self.gradient_sum, gradients)

    def _in_memory(self, work: Callable[[], Result]) -> Result:
        """The result of a pass of the test's own; where it runs out of memory, of one in chunks half as large."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._can_halve():
                    raise
            # Here nothing refers to the tensors of that pass any more.
            self.max_micro_batch_size //= 2
            self.notify(
                f"out of memory in the test's own pass: it goes on with {self.max_micro_batch_size} samples at a time "
                f"(as --max_test_micro_batch_size={self.max_micro_batch_size})"
            )
            if self.sums.is_cuda:
                torch.cuda.empty_cache()

    def _can_halve(self) -> bool:
        return self.max_micro_batch_size > 1

    def _again(self) -> Iterator[tuple[Batch, Batch, dict[str, Tensor]]]:
        """The observed micro-batches a second time, in chunks, drawing what was drawn the first time."""
        for inputs, targets, states, buffers in self.observed:
            with drawing_from(states, self.device):
                for chunk in self._chunks(inputs(), targets):
                    yield *chunk, buffers


class BySample(OwnPass):
    """An estimator that has the per-sample gradients themselves at hand, a chunk of them at a time.

    Inner products take a second pass, as ḡ is known only after the first one.
    """

    def per_sample_gradients(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], only: set[str] | None = None
    ) -> dict[str, Tensor]:
        """The gradient of every sample's loss: parameter name → (n, *parameter shape); of `only` these parameters."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _observing(self, batch: MicroBatch) -> Iterator[None]:
        before = self._before()

        def norms_and_gradient(chunk: tuple[Batch, Batch]) -> tuple[Tensor, dict[str, Tensor]]:
            gradients = self.per_sample_gradients(*chunk, before[1])
            return norms_sq(gradients), {name: gradient.sum(0) for name, gradient in gradients.items()}

        self._observe_in_chunks(norms_and_gradient, batch, before)
        if self.inner_products:
            self.observed.append((batch.again, batch.targets, *before))
        yield

    def inner_products_with(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> Tensor:
        return self._in_memory(lambda: self.inner_products_of(mean, self._again()))

    def inner_products_of(self, mean: dict[str, Tensor], again: Iterable) -> Tensor:
        """p_i by the per-sample gradients themselves, float64 (n,)."""
        products = [self.sums.new_zeros(0)]
        for inputs, targets, buffers in again:
            gradients = self.per_sample_gradients(inputs, targets, buffers)
            products.append(sum(rowwise(g) @ real(mean[name]).flatten().double() for name, g in gradients.items()))
        return torch.cat(products)


class PerSampleGradients(BySample):
    """`vmap`: per-sample gradients by vmap of grad, a chunk of samples at a time.

    Works for any module that vmap can run. Memory is one copy of all gradients per sample of a chunk.
    BatchNorm normalises each sample by its own statistics; dropout draws anew for every sample.

    Attributes:
        buffers_by_sample: buffers that move do so by the samples (a running mean), not by the weights alone (spectral
            normalisation): each sample has its own. The check at the start finds out.
    """

    buffers_by_sample = False

    def per_sample_gradients(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], only: set[str] | None = None
    ) -> dict[str, Tensor]:
        parameters = {name: parameter.detach() for name, parameter in self.parameters().items()}
        others = {name: parameters.pop(name) for name in list(parameters) if only is not None and name not in only}
        rows, of_one = taken_apart(inputs, targets)
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        if self.buffers_by_sample:
            own = {name: buffer.expand(count(inputs), *buffer.shape).clone() for name, buffer in buffers.items()}

        def sample_loss(parameters: dict[str, Tensor], own: dict[str, Tensor], *rows: Tensor) -> Tensor:
            x, y = of_one(*rows)
            with self.autocast(), in_wide_range(self.device):
                outputs = functional_call(self.model, {**parameters, **others, **own}, (x,))
            return self.loss(outputs, y).reshape(())

        in_dims = (None, 0 if self.buffers_by_sample else None, *(0 for _ in rows))
        with isolated(self.model, buffers, under_vmap=True):
            return vmap(grad(sample_loss), in_dims, randomness="different")(parameters, own, *rows)


class SingleGradients(BySample):
    """`loop`: one backward pass a sample through the model itself; the last resort, for all that autograd can do."""

    def per_sample_gradients(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], only: set[str] | None = None
    ) -> dict[str, Tensor]:
        parameters = {name: p for name, p in self.parameters().items() if only is None or name in only}
        first, *others = (self._gradients_of_one(x, y, buffers, parameters) for x, y in chunks(1, inputs, targets))
        if not others:  # no copy: a model may be so large that there is no room for one
            return {name: gradient.unsqueeze(0) for name, gradient in first.items()}
        return {name: torch.stack([first[name], *(other[name] for other in others)]) for name in parameters}

    def _gradients_of_one(
        self, x: Batch, y: Batch, buffers: dict[str, Tensor], parameters: dict[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        with isolated(self.model, buffers), torch.enable_grad():
            loss = self.loss(self._call(x), y)
            try:
                own = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower() or ".grad()" not in str(error):
                    raise
                own = self._by_backward(x, y, list(parameters.values()))
        return {name: p.new_zeros(p.shape) if g is None else dense(g) for (name, p), g in zip(parameters.items(), own)}

    def _by_backward(self, x: Batch, y: Batch, parameters: list[nn.Parameter]) -> list[Tensor | None]:
        """Reentrant checkpointing works with `.backward()` alone, which writes to `.grad`."""
        everything = list(self.model.parameters())
        if any(parameter._post_accumulate_grad_hooks for parameter in everything):
            raise NotImplementedError("reentrant checkpointing with an optimizer inside the backward pass")
        before = [parameter.grad for parameter in everything]
        try:
            for parameter in everything:
                parameter.grad = None
            self.loss(self._call(x), y).backward()
            return [parameter.grad for parameter in parameters]
        finally:
            for parameter, gradient in zip(everything, before):
                parameter.grad = gradient

    def _chunks(self, inputs: Batch, targets: Batch) -> Iterator[tuple[Batch, Batch]]:
        return chunks(1, inputs, targets)

    def _can_halve(self) -> bool:
        return False


def in_wide_range(device: torch.device) -> contextlib.AbstractContextManager:
    """float16 loses small gradients without the scaler of the training pass: bfloat16 does not, nor float32."""
    if not (torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16):
        return contextlib.nullcontext()
    supported = device.type != "cuda" or torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16 if supported else None, enabled=supported)


def added(total: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: total[name] + gradient if name in total else gradient for name, gradient in gradients.items()}


def norms_sq(gradients: dict[str, Tensor]) -> Tensor:
    """‖g_i‖² over all parameters, float64 (n,)."""
    return sum(per_sample_norms_sq(gradient) for gradient in gradients.values())


def rowwise(gradients: Tensor) -> Tensor:
    """Each sample's gradient of a parameter as a vector: (n, …) → float64 (n, numbers)."""
    gradients = real(gradients)
    return gradients.reshape(len(gradients), math.prod(gradients.shape[1:])).double()
