"""`ghost`: exact moments from the training pass itself, or from one batched pass of the test's own."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .estimator import MicroBatch, dense, first_line, is_out_of_memory, listed, training_gradient
from .ghost import GhostMode, Seen
from .isolation import drawing_from, isolated
from .per_sample import (
    BySample,
    OwnPass,
    PerSampleGradients,
    SingleGradients,
    detached,
    in_wide_range,
    norms_sq,
)
from .samples import Batch, count


class GhostNorms(OwnPass):
    """`ghost`: exact per-sample norms and inner products p_i from an ordinary backward pass (ghost.py).

    Without layers that couple samples, and where the training pass runs inside `observe`, that pass is the test's pass:
    no second forward and backward, and ḡ is the gradient that DDP has averaged anyway. Otherwise one batched pass of
    its own. Parameters that no rule covers, known from the check at the start or found in a pass (a branch that the
    check has not taken), take per-sample gradients, of these parameters alone. (Where the model draws at random, these
    see other draws than the training pass.)

    The p_i need ḡ, which is known only when the step is over. A rank that passes its share in one piece keeps the
    layers' inputs and output gradients until then; of several pieces these would be too much, and one forward-mode pass
    over each gives the p_i.

    Attributes:
        known, uncovered: of `GhostMode`, as the check at the start has found them.
        forward_mode: the model has a forward-mode derivative; else `why_not_forward` says why.
    """

    def __init__(self, *arguments, in_training_pass: bool = False, notify: Callable[[str], None] = lambda line: None):
        super().__init__(*arguments, notify=notify)
        self.in_training_pass = in_training_pass
        self.known: Seen | None = None
        self.uncovered: set[str] = set()
        self.references: list[BySample] = [PerSampleGradients(*arguments), SingleGradients(*arguments)]
        self.forward_mode, self.why_not_forward = True, ""

    @contextlib.contextmanager
    def _observing(self, batch: MicroBatch) -> Iterator[None]:
        inputs, targets = batch.inputs, batch.targets
        before = self._before()
        # Shards are gathered for a pass that all ranks make: what has been kept is all that the p_i can come from.
        sharded = self.sharded
        keep = self.inner_products and not self.uncovered and (sharded or (batch.whole and not self.observed))
        self.kept = self.kept if sharded else []
        if self.inner_products:
            self.observed.append((batch.again, targets, *before))
        if self.in_training_pass:
            marks = {name: _mark(parameter.grad) for name, parameter in self.parameters().items()}
            refresh = self.parameters if sharded else None
            arguments = (self.parameters(), inputs, self.known, keep, refresh, self.uncovered, self.hooks)
            with GhostMode(*arguments) as mode, self._outputs() as outputs:
                yield
            if len(outputs) == 1:
                self._hold_loss(outputs[0], targets)
            self._say_what_failed(mode)
            mode.uncovered |= {name for name in mode.unseen() if _mark(self.parameters()[name].grad) != marks[name]}
            self._add(mode.norms_sq() / batch.loss_scale**2)
            if self.by_parameter:
                self._tell_apart(mode, batch.loss_scale)
            uncovered = mode.uncovered
            if mode.is_complete:
                self.kept.append((mode, batch.loss_scale))
        else:
            uncovered = set(self.uncovered)

            def norms_and_gradient(chunk: tuple[Batch, Batch]) -> tuple[Tensor, dict[str, Tensor]]:
                is_whole = keep and count(chunk[0]) == count(inputs)
                mode, gradient = self.backward(*chunk, before[1], is_whole, hold_loss=True)
                self.kept = [(mode, 1.0)] if mode.is_complete else []
                uncovered.update(mode.uncovered)
                return mode.norms_sq(), gradient

            self._observe_in_chunks(norms_and_gradient, batch, before)
            yield
        if uncovered:
            self.kept = []
            with drawing_from(before[0], self.device):
                own_norms_sq = self._norms_sq_of(uncovered, inputs, targets, before[1])
            self.own_norms_sq.append((len(self.norms_sq) - 1, own_norms_sq))
        self._look_again(batch, before)

    @contextlib.contextmanager
    def _outputs(self) -> Iterator[list[Batch]]:
        """Of the model in the training pass that runs inside."""
        outputs: list[Batch] = []
        keep = self.model.register_forward_hook(lambda module, inputs, output: outputs.append(detached(output)))
        try:
            yield outputs
        finally:
            keep.remove()

    def _norms_again(self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor]) -> Tensor:
        mode, _ = self.backward(inputs, targets, buffers)
        if not mode.uncovered:
            return mode.norms_sq()
        return mode.norms_sq() + self._norms_sq_of(mode.uncovered, inputs, targets, buffers)

    def _give_way(self) -> None:
        """To per-sample gradients of all parameters; from these, if they are what is wrong, to the next ones."""
        super()._give_way()
        everything = set(self.parameters())
        if everything <= self.uncovered and len(self.references) > 1:
            self.references.pop(0)
        self.uncovered, self.forward_mode = everything, False

    @property
    def works_on_shards(self) -> bool:
        return self.in_training_pass and not self.uncovered

    @property
    def tells_parameters_apart(self) -> bool:
        """In the training pass: an own pass may be made again in smaller chunks."""
        return self.in_training_pass

    def _tell_apart(self, mode: GhostMode, loss_scale: float) -> None:
        for name in mode.parameters:
            own = mode.norms_sq(name).sum() / loss_scale**2
            # Those without a rule are measured together.
            self._add_by_parameter({name: own * math.nan if name in mode.uncovered else own})

    def _norms_sq_of(self, names: set[str], inputs: Batch, targets: Batch, buffers: dict[str, Tensor]) -> Tensor:
        """‖g_i‖² over these parameters (n,), by the first reference that can; NaN, with a line, where none can."""

        def by(reference: BySample) -> Tensor:
            chunks = reference._chunks(inputs, targets)
            own = (reference.per_sample_gradients(*chunk, buffers, only=names) for chunk in chunks)
            return torch.cat([norms_sq(gradients) for gradients in own])

        failure = None, NotImplementedError("the parameters are sharded over the processes")
        while self.references and not self.sharded:
            reference = self.references[0]
            reference.max_micro_batch_size = self.max_micro_batch_size
            try:
                return self._in_memory(lambda: by(reference))  # noqa: B023 (called at once)
            except Exception as error:  # a model raises what it likes
                if is_out_of_memory(error):
                    raise
                failure = self.references.pop(0), error
        self.notify(
            f"batch size unchanged where {listed(sorted(names))} take part: no per-sample gradients of them "
            f"({first_line(failure[1])})"
        )
        return self.sums.new_full((count(inputs),), math.nan)

    def _start(self) -> None:
        super()._start()
        self.own_norms_sq: list[tuple[int, Tensor]] = []  # of uncovered parameters: number of the micro-batch, (n,)
        # The only pass of the step and its loss_scale; of shards, every pass
        self.kept: list[tuple[GhostMode, float]] = []

    def backward(
        self, inputs: Batch, targets: Batch, buffers: dict[str, Tensor], keep: bool = False, hold_loss: bool = False
    ) -> tuple[GhostMode, dict[str, Tensor]]:
        """A pass of the test's own: the mode with the norms, and the sum of the gradients."""
        parameters = self.parameters()
        with (
            isolated(self.model, buffers),
            torch.enable_grad(),
            GhostMode(parameters, inputs, self.known, keep, uncovered=self.uncovered, hooks=self.hooks) as mode,
        ):
            outputs = self._call(inputs)
            with torch._C.DisableTorchFunction():  # the loss has no parameters
                losses = self._losses(outputs, targets)
                gradients = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
                if hold_loss:
                    self._hold_loss(detached(outputs), targets, losses)
        self._say_what_failed(mode)
        found = {name: dense(gradient) for name, gradient in zip(parameters, gradients) if gradient is not None}
        mode.uncovered |= mode.unseen() & set(found)
        found |= {name: self.hooks[name](gradient) for name, gradient in found.items() if name in self.hooks}
        return mode, {name: found.get(name, torch.zeros_like(parameter)) for name, parameter in parameters.items()}

    def _say_what_failed(self, mode: GhostMode) -> None:
        if mode.failure:
            self.notify(
                f"a rule of test_gradients=ghost fails in a pass ({mode.failure}): per-sample gradients take over"
            )

    def _total(self, grad_scale: float | Tensor) -> Tensor:
        if self.in_training_pass:
            self.sums[2] /= grad_scale**2
            self.sums_by_parameter = {name: own / grad_scale**2 for name, own in self.sums_by_parameter.items()}
            self.norms_sq = [norms_sq / grad_scale**2 for norms_sq in self.norms_sq]
        for number, own in self.own_norms_sq:
            self.sums[2] += own.sum()
            if self.inner_products:
                self.norms_sq[number] = self.norms_sq[number] + own
        return self.sums

    def mean_gradient(self, samples: Tensor, grad_scale: float | Tensor) -> dict[str, Tensor]:
        if not self.in_training_pass:
            return super().mean_gradient(samples, grad_scale)
        return training_gradient(self.parameters(), grad_scale)

    def inner_products_with(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> Tensor:
        """By what the only pass has kept; else p_i = ⟨∇ℓ_i, ḡ⟩ is the derivative of ℓ_i along ḡ, by forward mode."""
        if self.sharded:
            return self._by_gathering(mean, grad_scale)
        if self.kept:
            mode, loss_scale = self.kept[0]
            scale = loss_scale * grad_scale if self.in_training_pass else 1.0
            return mode.inner_products(mean) / scale
        if self.forward_mode:
            try:
                return self._in_memory(lambda: self._by_forward_mode(mean))
            except (NotImplementedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                self.forward_mode, self.why_not_forward = False, first_line(error)
        if not self.is_doubtful:
            self.notify(
                f"inner products take per-sample gradients: no forward-mode derivative ({self.why_not_forward})"
            )
        return self._inner_products_by_reference(mean)

    def _by_gathering(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> Tensor:
        """ḡ is gathered one parameter at a time, on all ranks alike whatever each of them has kept."""
        complete = len(self.kept) == len(self.observed)
        products = [mode.norms_sq() * (0.0 if complete else math.nan) for mode, _ in self.kept]
        for name, parameter in self.parameters().items():
            shards = DTensor.from_local(
                mean[name],
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
            direction = shards.full_tensor()
            for own, (mode, loss_scale) in zip(products, self.kept):
                own += mode.inner_products_with(name, direction) / (loss_scale * grad_scale)
        if not complete:
            self.notify("batch size unchanged: a pass has left no inner products")
            return torch.cat(self.norms_sq) * math.nan
        return torch.cat(products)

    def _inner_products_by_reference(self, mean: dict[str, Tensor]) -> Tensor:
        while self.references:
            reference = self.references[0]
            reference.max_micro_batch_size = self.max_micro_batch_size
            try:
                return self._in_memory(lambda: reference.inner_products_of(mean, self._again()))  # noqa: B023
            except Exception as error:  # a model raises what it likes
                if is_out_of_memory(error):
                    raise
                failure = self.references.pop(0), error
        self.notify(f"batch size unchanged: no inner products ({first_line(failure[1])})")
        return torch.cat(self.norms_sq) * math.nan

    def _can_halve(self) -> bool:
        return super()._can_halve() and not self.in_training_pass

    def _by_forward_mode(self, mean: dict[str, Tensor]) -> Tensor:
        products = [self.along(mean, *chunk) for chunk in self._again()]
        return torch.cat(products or [self.sums.new_zeros(0)])

    def along(self, direction: dict[str, Tensor], inputs: Batch, targets: Batch, buffers: dict[str, Tensor]) -> Tensor:
        """The derivative of every sample's loss along a direction (by parameter), by forward mode: float64 (n,)."""
        parameters = {name: parameter.detach() for name, parameter in self.parameters().items()}
        direction = {name: direction[name].to(parameter.dtype) for name, parameter in parameters.items()}
        direction |= {name: hook(direction[name]) for name, hook in self.hooks.items()}  # ⟨h(g), d⟩ = ⟨g, h(d)⟩

        # Of the fused attention kernels none has a forward-mode derivative.
        # And not by torch.func: there the noise of dropout is laid out otherwise than its input, and so is another one.
        with isolated(self.model, buffers), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script")  # of torch's own forward-mode formulas
            with forward_ad.dual_level():
                duals = {name: forward_ad.make_dual(own, direction[name]) for name, own in parameters.items()}
                with self.autocast(), in_wide_range(self.device):
                    outputs = functional_call(self.model, duals, (inputs,))
                losses, derivatives = forward_ad.unpack_dual(self._losses(outputs, targets))
                return torch.zeros_like(losses, dtype=torch.float64) if derivatives is None else derivatives.double()

    def _chunks(self, inputs: Batch, targets: Batch) -> Iterator[tuple[Batch, Batch]]:
        # What dropout drew for a whole micro-batch can be drawn again only for the whole of it.
        return iter([(inputs, targets)]) if self.in_training_pass else super()._chunks(inputs, targets)


def _mark(gradient: Tensor | None) -> tuple[int, int]:
    """Changes when a backward pass adds something."""
    return (0, 0) if gradient is None else (id(gradient), gradient._version)
