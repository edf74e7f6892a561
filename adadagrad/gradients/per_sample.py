"""Estimators with a pass of their own: `vmap`, a chunk of samples at a time, and `loop`, one after the other."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_map

from .contributions import per_sample_norms_sq, real
from .draws import SameDraws, tolerance
from .estimator import Estimator, MicroBatch, dense, is_out_of_memory
from .hooks import Hook, of_each
from .isolation import drawing_from, isolated, preserving_state, random_states
from .samples import Batch, chunks, count, leaves, per_sample, some, taken_apart

Result = TypeVar("Result")
Observed = tuple[Callable[[], Batch], Batch, list, dict[str, Tensor]]
"""What makes the inputs, targets, random states and buffers before the pass."""


class OwnPass(Estimator):
    """An estimator with a pass of its own, over the model with every sample by itself (isolation.py).

    Args:
        notify: called with a line where something turns out later.

    Attributes:
        moving: names of the buffers that a forward pass changes (the check at the start finds them).
        hooks: of parameters, those that change the samples' gradients (hooks.py).
    """

    def __init__(self, *arguments, notify: Callable[[str], None] = lambda line: None):
        super().__init__(*arguments)
        self.notify = notify
        self.moving: set[str] = {name for name, _ in self.model.named_buffers()}
        self.device = next(self.model.parameters()).device
        self.hooks: dict[str, Hook] = {}
        self.is_doubtful, self.loss_fails = False, False

    def _start(self) -> None:
        super()._start()
        self.observed: list[Observed] = []
        self.has_looked = False
        self.passed = [None, None]

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

    def _hold_loss(self, outputs: Batch, targets: Batch, losses: Tensor | None = None) -> None:
        """Hold the loss of a batch against its samples'; what is found is read with the moments.

        Class weights, padding and missing labels may be such that the check's samples had nothing of them.
        """
        if self.adds_up is None or self.loss_fails:
            return
        try:
            with torch.no_grad(), torch._C.DisableTorchFunction(), self._loss_as_it_was():
                whole = self.loss(outputs, targets).detach().double()
                losses = self._losses(outputs, targets) if losses is None else losses
        except Exception:  # a user's loss raises what it likes, as where its outputs are others than the model's
            self.loss_fails = True
            return
        most, losses = {torch.float64: 1e-6, torch.float32: 1e-3}.get(losses.dtype, 0.1), losses.detach().double()
        whole = whole if self.adds_up else whole * len(losses)
        is_near = (whole - losses.sum()).abs() <= most * (whole.abs() + losses.abs().sum())
        self.sums[3] += whole.isfinite() & ~is_near

    def _loss_as_it_was(self) -> contextlib.AbstractContextManager:
        return preserving_state(self.loss) if isinstance(self.loss, nn.Module) else contextlib.nullcontext()

    def _look_again(self, batch: MicroBatch, before: tuple[list, dict[str, Tensor]]) -> None:
        """At a few steps: are the norms of a micro-batch, as it is, still those of single samples?

        The check at the start has seen few samples, and the branches that the model took then.
        """
        if not self.recheck or self.has_looked or self.sharded or not (self.is_doubtful or is_due(self.measured + 1)):
            return
        self.has_looked, n = True, count(batch.inputs)
        single = SingleGradients(self.model, self.loss, False, 1, self.autocast)
        single.hooks, errors = self.hooks, []
        try:
            with drawing_from(before[0], self.device), SameDraws() as draws:
                found = self._norms_again(batch.inputs, batch.targets, before[1])
            for i in sorted({0, n // 2, n - 1}):
                with drawing_from(before[0], self.device), SameDraws():
                    one = (some(tree, slice(i, i + 1)) for tree in (batch.inputs, batch.targets))
                    own = norms_sq(single.per_sample_gradients(*one, before[1]))[0].sqrt()
                errors.append(torch.stack([(found[i].sqrt() - own).abs(), own]))
        except Exception:  # a model raises what it likes, or has no memory left
            return
        off, own = torch.stack(errors).amax(0)
        self.sums[4] += ~(off <= tolerance(draws.lowest) * own) & own.isfinite()

    def _norms_again(self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor]) -> Tensor:
        """‖g_i‖² of these samples in one pass (n,)."""
        raise NotImplementedError

    def _give_way(self) -> None:
        super()._give_way()
        self.is_doubtful = True
        self.notify(
            "at a later step the statistics are not those of single samples: the next estimator takes over, and this "
            "step leaves the batch size unchanged"
        )

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
        SameDraws.new_pass()
        gradients, *passed = self._pass(inputs, targets, buffers, only)
        if self.adds_up is not None:
            self.passed = passed
        return {n: of_each(self.hooks[n], own) if n in self.hooks else own for n, own in gradients.items()}

    def _pass(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], only: set[str] | None
    ) -> tuple[dict[str, Tensor], Tensor, Batch]:
        """The gradients, the samples' losses (n,) and outputs; None where these are not (n, …)."""
        raise NotImplementedError

    @contextlib.contextmanager
    def _observing(self, batch: MicroBatch) -> Iterator[None]:
        before = self._before()
        passed: list[tuple[Tensor, Batch]] = []

        def norms_and_gradient(chunk: tuple[Batch, Batch]) -> tuple[Tensor, dict[str, Tensor]]:
            gradients = self.per_sample_gradients(*chunk, before[1])
            passed.append(tuple(self.passed))
            return norms_sq(gradients), {name: gradient.sum(0) for name, gradient in gradients.items()}

        self._observe_in_chunks(norms_and_gradient, batch, before)
        losses, outputs = zip(*passed[-len(list(self._chunks(batch.inputs, batch.targets))) :])
        if all(part is not None for part in outputs):
            self._hold_loss(tree_map(_joined, *outputs), batch.targets, torch.cat(losses))
        self._look_again(batch, before)
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

    price = 3.0

    buffers_by_sample = False
    loop: "SingleGradients | None" = None

    def _norms_again(self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor]) -> Tensor:
        gradients = (self.per_sample_gradients(*chunk, buffers) for chunk in self._chunks(inputs, targets))
        return torch.cat([norms_sq(own) for own in gradients])

    def _give_way(self) -> None:
        super()._give_way()
        self.loop = SingleGradients(self.model, self.loss, self.inner_products, 1, self.autocast)
        self.recheck = False

    def _pass(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], only: set[str] | None
    ) -> tuple[dict[str, Tensor], Tensor, Batch]:
        if self.loop:
            return self.loop._pass(inputs, targets, buffers, only)
        parameters = {name: parameter.detach() for name, parameter in self.parameters().items()}
        others = {name: parameters.pop(name) for name in list(parameters) if only is not None and name not in only}
        rows, of_one = taken_apart(inputs, targets)
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        if self.buffers_by_sample:
            own = {name: buffer.expand(count(inputs), *buffer.shape).clone() for name, buffer in buffers.items()}

        form: list = []

        def sample_loss(parameters: dict[str, Tensor], own: dict[str, Tensor], *rows: Tensor):
            x, y = of_one(*rows)
            with self.autocast(), in_wide_range(self.device):
                outputs = functional_call(self.model, {**parameters, **others, **own}, (x,))
            flat, form[:] = tree_flatten(outputs)[0], [outputs]
            kept = [leaf for leaf in flat if isinstance(leaf, Tensor)] if self.adds_up is not None else []
            return self.loss(outputs, y).reshape(()), kept

        in_dims = (None, 0 if self.buffers_by_sample else None, *(0 for _ in rows))
        with isolated(self.model, buffers, under_vmap=True):
            passed = vmap(grad_and_value(sample_loss, has_aux=True), in_dims, randomness="different")
            gradients, (losses, kept) = passed(parameters, own, *rows)
        if not kept or not all(leaf.dim() > 1 and leaf.shape[1] == 1 for leaf in kept):
            return gradients, losses, None
        rest = iter(kept)
        return (
            gradients,
            losses,
            tree_map(lambda own: next(rest).flatten(0, 1) if isinstance(own, Tensor) else own, *form),
        )


class SingleGradients(BySample):
    """`loop`: one backward pass a sample through the model itself; the last resort, for all that autograd can do."""

    price = 10.0

    def _pass(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], only: set[str] | None
    ) -> tuple[dict[str, Tensor], Tensor, Batch]:
        parameters = {name: p for name, p in self.parameters().items() if only is None or name in only}
        singles = [self._gradients_of_one(x, y, buffers, parameters) for x, y in chunks(1, inputs, targets)]
        gradients, losses, outputs = zip(*singles)
        leaves_of_all = [leaf for own in outputs for leaf in leaves(own)]
        by_sample = bool(leaves_of_all) and all(leaf.dim() and len(leaf) == 1 for leaf in leaves_of_all)
        together = tree_map(_joined, *outputs) if by_sample else None
        first, *others = gradients
        if not others:  # no copy: a model may be so large that there is no room for one
            return {name: gradient.unsqueeze(0) for name, gradient in first.items()}, losses[0].reshape(1), together
        stacked = {name: torch.stack([first[name], *(other[name] for other in others)]) for name in parameters}
        return stacked, torch.stack([loss.reshape(()) for loss in losses]), together

    def _gradients_of_one(
        self, x: Batch, y: Batch, buffers: dict[str, Tensor], parameters: dict[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], Tensor, Batch]:
        with isolated(self.model, buffers), torch.enable_grad():
            outputs = self._call(x)
            loss = self.loss(outputs, y)
            try:
                own = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            except RuntimeError as error:
                if "checkpoint" not in str(error).lower() or ".grad()" not in str(error):
                    raise
                own = self._by_backward(x, y, list(parameters.values()))
        gradients = (p.new_zeros(p.shape) if g is None else dense(g) for p, g in zip(parameters.values(), own))
        outputs = detached(outputs) if self.adds_up is not None else None
        return dict(zip(parameters, gradients)), loss.detach(), outputs

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


def is_due(measured: int) -> bool:
    """The 2nd, the 20th, the 200th, … measured step is looked at again."""
    digits = str(measured)
    return digits[0] == "2" and not digits[1:].strip("0")


def detached(outputs: Batch) -> Batch:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)


def _joined(*parts):
    """Of outputs of several batches, one after the other."""
    return torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]


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
