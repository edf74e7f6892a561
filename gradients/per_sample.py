"""Estimators with a pass of their own, and `vmap`, the reference: per-sample gradients, a chunk at a time."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from gradients.contributions import per_sample_norms_sq
from gradients.estimator import Estimator, is_out_of_memory
from gradients.per_sample_copy import per_sample_copy

Result = TypeVar("Result")


class OwnPass(Estimator):
    """An estimator with a pass of its own, over a copy of the model in which no layer couples samples.

    Args:
        notify: called with a line where something turns out later.
    """

    def __init__(self, *arguments, notify: Callable[[str], None] = lambda line: None):
        super().__init__(*arguments)
        self.notify = notify
        self.template = per_sample_copy(self.model)
        self._known = {name for name, _ in (*self.template.named_parameters(), *self.template.named_buffers())}

    def _start(self) -> None:
        super()._start()
        self.observed: list[tuple[Tensor, Tensor, list[Tensor]]] = []

    def _fixed(self) -> dict[str, Tensor]:
        """Frozen parameters, and the buffers that the copy has."""
        fixed = {name: p.detach() for name, p in self.model.named_parameters() if not p.requires_grad}
        return fixed | {name: buffer for name, buffer in self.model.named_buffers() if name in self._known}

    def _call(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        self.template.train(self.model.training)
        with self.autocast():
            return functional_call(self.template, {**parameters, **self._fixed()}, (inputs,))

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The samples' losses (n,), whatever the reduction of `loss`."""
        return vmap(lambda output, target: self.loss(output.unsqueeze(0), target.unsqueeze(0)))(outputs, targets)

    def _chunks(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(inputs.split(self.max_micro_batch_size), targets.split(self.max_micro_batch_size))

    def _observe_in_chunks(self, measure: Callable, inputs: Tensor, targets: Tensor, random_states: list) -> None:
        """Add a micro-batch by `measure`: a chunk → Σ‖g_i‖², Σ g_i by parameter."""

        def measure_all() -> tuple[Tensor, dict[str, Tensor]]:
            norms_sq, total = self.sums.new_zeros(()), {}
            with restored(random_states, inputs.device):
                for chunk in self._chunks(inputs, targets):
                    of_chunk, gradients = measure(chunk)
                    norms_sq += of_chunk
                    total = added(total, gradients)
            return norms_sq, total

        norms_sq, gradients = self._in_memory(measure_all)
        self._add(len(inputs), norms_sq)
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

    def _again(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The observed micro-batches a second time, in chunks, drawing what was drawn the first time."""
        for inputs, targets, random_states in self.observed:
            with restored(random_states, inputs.device):
                yield from self._chunks(inputs, targets)


class PerSampleGradients(OwnPass):
    """`vmap`, the reference: per-sample gradients by vmap of grad on a copy of the model, a chunk of them at a time.

    Works for any module that vmap can run. Memory is one copy of all gradients per sample of a chunk.
    BatchNorm normalises each sample by its own statistics; dropout draws anew for every sample.
    Inner products take a second pass, as ḡ is known only after the first one.
    """

    @contextlib.contextmanager
    def observe(self, inputs: Tensor, targets: Tensor, loss_scale: float = 1.0) -> Iterator[None]:
        random_states = random_states_of(inputs.device)

        def norms_and_gradient(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            gradients = self.per_sample_gradients(*chunk)
            return norms_sq(gradients).sum(), {name: gradient.sum(0) for name, gradient in gradients.items()}

        self._observe_in_chunks(norms_and_gradient, inputs, targets, random_states)
        if self.inner_products:
            self.observed.append((inputs, targets, random_states))
        yield

    def inner_product_sums(self, mean: dict[str, Tensor], grad_scale: float) -> Tensor:
        return self._in_memory(lambda: self.inner_products_with(mean, self._again()))

    def inner_products_with(self, mean: dict[str, Tensor], chunks: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """[Σ p_i, Σ p_i²] by the per-sample gradients themselves."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.sums.device)
        for inputs, targets in chunks:
            gradients = self.per_sample_gradients(inputs, targets)
            inner = sum(g.flatten(1).double() @ mean[name].flatten().double() for name, g in gradients.items())
            sums += torch.stack([inner.sum(), inner.square().sum()])
        return sums

    def per_sample_gradients(self, inputs: Tensor, targets: Tensor, only: set[str] | None = None) -> dict[str, Tensor]:
        """The gradient of every sample's loss: parameter name → (n, *parameter shape); of `only` these parameters."""
        parameters = {name: parameter.detach() for name, parameter in self.parameters().items()}
        others = {name: parameters.pop(name) for name in list(parameters) if only is not None and name not in only}

        def sample_loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self._call({**parameters, **others}, x.unsqueeze(0)), y.unsqueeze(0))

        return vmap(grad(sample_loss), in_dims=(None, 0, 0), randomness="different")(parameters, inputs, targets)


def added(total: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: total[name] + gradient if name in total else gradient for name, gradient in gradients.items()}


def norms_sq(gradients: dict[str, Tensor]) -> Tensor:
    """‖g_i‖² over all parameters, float64 (n,)."""
    return sum(per_sample_norms_sq(gradient) for gradient in gradients.values())


def random_states_of(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextlib.contextmanager
def restored(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw from these random states inside, and leave the outer ones as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        if devices:
            torch.cuda.set_rng_state(states[1], device)
        yield
