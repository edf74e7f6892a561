"""`ghost`: exact moments from the training pass itself, or from one batched pass over a copy of the model."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradients.estimator import first_line, is_out_of_memory, listed, training_gradient
from gradients.ghost import GhostMode
from gradients.per_sample import OwnPass, PerSampleGradients, norms_sq, random_states_of, restored


class GhostNorms(OwnPass):
    """`ghost`: exact per-sample norms and inner products p_i from an ordinary backward pass (ghost.py).

    Without layers that couple samples, and where the training pass runs inside `observe`, that pass is the test's pass:
    no second forward and backward, and ḡ is the gradient that DDP has averaged anyway. Otherwise one batched pass over
    the copy of the model. Parameters that no rule covers take per-sample gradients, of these parameters alone.

    The p_i need ḡ, which is known only when the step is over. A rank that passes its share in one piece keeps the
    layers' inputs and output gradients until then; of several pieces these would be too much, and one forward-mode pass
    over each gives the p_i.
    """

    def __init__(self, *arguments, in_training_pass: bool = False, notify: Callable[[str], None] = lambda line: None):
        super().__init__(*arguments, notify=notify)
        self.in_training_pass = in_training_pass
        self.expansions: set[int] | None = None
        self.uncovered: set[str] = set()
        self.reference = PerSampleGradients(*arguments)
        self.forward_mode = True

    def check(self, inputs: Tensor, targets: Tensor) -> str:
        """Compare with one backward pass a sample, on a few samples; says what is not covered, "" where all is well."""
        training = self.model.training
        self.model.eval()  # no dropout: both must see the same function
        try:
            with restored(random_states_of(inputs.device), inputs.device):
                mode, _ = self._backward(inputs, targets)
                covered = [p for name, p in self.parameters().items() if name not in mode.uncovered]
                expected = torch.stack([self._norm_sq_of_one(covered, *sample) for sample in zip(inputs, targets)])
                precise = self._call(self.parameters(), inputs).dtype in (torch.float32, torch.float64)
        finally:
            self.model.train(training)
        self.expansions, self.uncovered = mode.expansions, mode.uncovered
        error = float((mode.norms_sq - expected).abs().max() / expected.max().clamp(min=1e-30))
        # Rounding grows to some tenths of a percent through 50 layers in float32; a wrong rule is off by far more.
        if not error < (1e-2 if precise else 0.2):
            self.uncovered = set(self.parameters())
            return f"on this model its norms are {error:.1%} off those of single samples"
        return f"no rule for {listed(sorted(self.uncovered))}" if self.uncovered else ""

    def _norm_sq_of_one(self, parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        loss = self._losses(self._call(self.parameters(), x.unsqueeze(0)), y.unsqueeze(0)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
        return sum((g.double().square().sum() for g in gradients if g is not None), start=self.sums.new_zeros(()))

    @contextlib.contextmanager
    def observe(self, inputs: Tensor, targets: Tensor, loss_scale: float = 1.0) -> Iterator[None]:
        random_states = random_states_of(inputs.device)
        keep = self.inner_products and not self.observed and not self.uncovered
        self.whole = None
        if self.inner_products:
            self.observed.append((inputs, targets, random_states))
        if self.in_training_pass:
            with GhostMode(self.parameters(), inputs, self.expansions, keep) as mode:
                yield
            self._add(len(inputs), mode.norms_sq.sum() / loss_scale**2)
            if mode.is_complete:
                self.whole = mode, loss_scale
        else:

            def norms_and_gradient(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
                is_whole = keep and len(chunk[0]) == len(inputs)
                mode, gradient = self._backward(*chunk, is_whole)
                self.whole = (mode, 1.0) if mode.is_complete else None
                return mode.norms_sq.sum(), gradient

            self._observe_in_chunks(norms_and_gradient, inputs, targets, random_states)
            yield
        if self.uncovered:
            self.own_norms_sq += self._in_memory(lambda: self._uncovered_norms_sq(inputs, targets))

    def _uncovered_norms_sq(self, inputs: Tensor, targets: Tensor) -> Tensor:
        chunks = self._chunks(inputs, targets)
        own = (self.reference.per_sample_gradients(*chunk, only=self.uncovered) for chunk in chunks)
        return sum(norms_sq(gradients).sum() for gradients in own)

    def _start(self) -> None:
        super()._start()
        self.own_norms_sq = self.sums.new_zeros(())
        self.whole: tuple[GhostMode, float] | None = None  # the only pass of the step, and its loss_scale

    def _backward(self, inputs: Tensor, targets: Tensor, keep: bool = False) -> tuple[GhostMode, dict[str, Tensor]]:
        """A backward pass over the copy: the mode with the norms, and the sum of the gradients."""
        parameters = self.parameters()
        with GhostMode(parameters, inputs, self.expansions, keep) as mode:
            loss = self._losses(self._call(parameters, inputs), targets).sum()
            gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        return mode, dict(zip(parameters, gradients))

    def _total(self, grad_scale: float) -> Tensor:
        if self.in_training_pass:
            self.sums[2] /= grad_scale**2
        self.sums[2] += self.own_norms_sq
        return self.sums

    def mean_gradient(self, samples: float, grad_scale: float) -> dict[str, Tensor]:
        if not self.in_training_pass:
            return super().mean_gradient(samples, grad_scale)
        return training_gradient(self.parameters(), grad_scale)

    def inner_product_sums(self, mean: dict[str, Tensor], grad_scale: float) -> Tensor:
        """By what the only pass has kept; else p_i = ⟨∇ℓ_i, ḡ⟩ is the derivative of ℓ_i along ḡ, by forward mode."""
        if self.whole:
            mode, loss_scale = self.whole
            scale = loss_scale * grad_scale if self.in_training_pass else 1.0
            inner = mode.inner_products(mean) / scale
            return torch.stack([inner.sum(), inner.square().sum()])
        if self.forward_mode:
            try:
                return self._in_memory(lambda: self._forward_mode_sums(mean))
            except (NotImplementedError, RuntimeError) as error:
                if is_out_of_memory(error):
                    raise
                self.forward_mode = False
                self.notify(
                    f"inner products take per-sample gradients: no forward-mode derivative ({first_line(error)})"
                )
        return self._in_memory(lambda: self.reference.inner_products_with(mean, self._again()))

    def _can_halve(self) -> bool:
        return super()._can_halve() and not self.in_training_pass

    def _forward_mode_sums(self, mean: dict[str, Tensor]) -> Tensor:
        sums = self.sums.new_zeros(2)
        parameters = {name: parameter.detach() for name, parameter in self.parameters().items()}
        for inputs, targets in self._again():

            def losses(parameters: dict[str, Tensor], inputs=inputs, targets=targets) -> Tensor:
                return self._losses(self._call(parameters, inputs), targets)

            # Of the fused attention kernels none has a forward-mode derivative.
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
                inner = jvp(losses, (parameters,), (mean,))[1].double()
            sums += torch.stack([inner.sum(), inner.square().sum()])
        return sums

    def _chunks(self, inputs: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        # What dropout drew for a whole micro-batch can be drawn again only for the whole of it.
        return iter([(inputs, targets)]) if self.in_training_pass else super()._chunks(inputs, targets)

    def _call(self, parameters: dict[str, Tensor], inputs: Tensor) -> Tensor:
        if not self.in_training_pass:
            return super()._call(parameters, inputs)
        with self.autocast():  # the model itself: it must draw as it drew in the training pass
            return functional_call(self.model, parameters, (inputs,))
