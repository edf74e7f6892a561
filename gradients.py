"""Where the moments come from: per-sample gradients, reduced to the few numbers that a test needs.

    moments = gradients.moments(model, loss, inputs, targets)

An estimator watches the micro-batches of a step on every rank and then gives the moments of the global batch:

    with estimator.observe(inputs, targets):
        …forward and backward of the training step…
    moments = estimator.moments()

The numbers do not depend on how the batch was cut into ranks and micro-batches: scalars are summed in float64, the mean
gradient is averaged once over the ranks.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from contributions import at_least_single, per_sample_norms_sq
from ghost import GhostMode
from models import couples_samples, per_sample_copy
from tests import Moments

Result = TypeVar("Result")
Loss = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) of a batch → scalar: the mean (or sum) of the samples' losses."""


def moments(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    inner_products: bool = True,
    test_gradients: str = "auto",
    max_micro_batch_size: int = 256,
) -> Moments:
    """The moments of one batch at the model's present weights; in a plain PyTorch program or on every rank of one.

    Args:
        model: any module; its parameters' `.grad` are left alone.
        loss: of outputs and targets, for example `torch.nn.functional.cross_entropy`.
        inputs: (n, …), this rank's samples.
        targets: (n, …).
        inner_products: measure Σ p_i and Σ p_i², too (all tests but the norm test need them).
        test_gradients: vmap, ghost, or auto (ghost where it covers the model).
        max_micro_batch_size: samples in a pass.
    """
    estimator, _ = build(test_gradients, model, loss, inner_products, max_micro_batch_size, (inputs[:3], targets[:3]))
    with estimator.observe(inputs, targets):
        pass
    return estimator.moments()


def build(
    test_gradients: str,
    model: nn.Module,
    loss: Loss,
    inner_products: bool,
    max_micro_batch_size: int,
    probe: tuple[Tensor, Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    in_training_pass: bool = False,
    num_groups: int = 8,
    notify: Callable[[str], None] = lambda line: None,
) -> tuple["Estimator", list[str]]:
    """The estimator by its name on the command line, and what the user should be told of it.

    Args:
        test_gradients: vmap, ghost, micro_batch, or auto: ghost where every parameter is covered, else vmap.
        probe: inputs and targets of a few samples, on which `ghost` is compared with single-sample gradients.
        in_training_pass: the training pass itself runs inside `observe`, on `model` and uncompiled.
        num_groups: bounds the gradient copies that micro_batch keeps: at most twice as many.
        notify: called with a line where something turns out later.
        (The others: see `PerSampleGradients`.)
    """
    arguments = (model, loss, inner_products, max_micro_batch_size, autocast)
    if test_gradients == "micro_batch":
        return MicroBatchGradients(*arguments, num_groups=num_groups), []
    if test_gradients == "vmap":
        return PerSampleGradients(*arguments, notify=notify), []
    ghost = GhostNorms(*arguments, in_training_pass=in_training_pass and not couples_samples(model), notify=notify)
    problem = ghost.check(*probe)
    if not problem:
        return ghost, []
    if test_gradients == "auto":
        return PerSampleGradients(*arguments, notify=notify), [f"test_gradients=auto takes vmap: {problem}"]
    return ghost, [f"test_gradients=ghost takes per-sample gradients in part: {problem}"]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """All-reduce in place where several processes train together."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class Estimator:
    """What the estimators share. They differ in how a micro-batch is observed and where ḡ and the p_k come from.

    Args:
        model: the module that is trained (not a wrapper of it).
        loss: of the outputs and targets of a batch.
        inner_products: measure p_k, too.
        max_micro_batch_size: most samples in a pass of the test's own.
        autocast: makes the context of the forward pass (mixed precision).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inner_products: bool,
        max_micro_batch_size: int,
        autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.model, self.loss, self.inner_products = model, loss, inner_products
        self.max_micro_batch_size, self.autocast = max_micro_batch_size, autocast
        self._start()

    def _start(self) -> None:
        # [samples, groups, Σ m_k‖ḡ_k‖²]
        self.sums = torch.zeros(3, dtype=torch.float64, device=next(self.model.parameters()).device)
        self.gradient_sum: dict[str, Tensor] = {}

    def observe(self, inputs: Tensor, targets: Tensor, loss_scale: float = 1.0) -> contextlib.AbstractContextManager:
        """Add a micro-batch; the training pass on it, whose loss is loss_scale · Σ ℓ_i, runs inside."""
        raise NotImplementedError

    def moments(self, grad_scale: float = 1.0) -> Moments:
        """The moments of all micro-batches observed since the last call, on all ranks. The host waits for the device.

        Args:
            grad_scale: the gradient scaler's factor on the gradients of the training pass.
        """
        samples, groups, sum_norm_sq = sum_over_ranks(self._total(grad_scale)).tolist()
        mean = self.mean_gradient(samples, grad_scale)
        inner = [None, None]
        if self.inner_products:
            inner = sum_over_ranks(self.inner_product_sums(mean, grad_scale)).tolist()
        grad_norm_sq = float(_norm_sq(mean.values()))
        self._start()
        return Moments(round(samples), round(groups), grad_norm_sq, sum_norm_sq, inner[1], inner[0])

    def _total(self, grad_scale: float) -> Tensor:
        """[samples, groups, Σ m_k‖ḡ_k‖²] of this rank."""
        return self.sums

    def _add(self, samples: int, norms_sq: Tensor) -> None:
        self.sums[:2] += samples
        self.sums[2] += norms_sq

    def mean_gradient(self, samples: float, grad_scale: float) -> dict[str, Tensor]:
        """ḡ by parameter: here from the sums of an own pass, averaged over the ranks in one exchange."""
        flat = sum_over_ranks(torch.cat([gradient.flatten() for gradient in self.gradient_sum.values()])) / samples
        pieces = flat.split([gradient.numel() for gradient in self.gradient_sum.values()])
        return {name: piece.view_as(self.gradient_sum[name]) for name, piece in zip(self.gradient_sum, pieces)}

    def inner_product_sums(self, mean: dict[str, Tensor], grad_scale: float) -> Tensor:
        """[Σ m_k p_k, Σ m_k p_k²] over this rank's groups, float64."""
        raise NotImplementedError

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def is_out_of_memory(error: BaseException) -> bool:
    """On the device, which is the host where there is no other."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class _OwnPass(Estimator):
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
            with _restored(random_states, inputs.device):
                for chunk in self._chunks(inputs, targets):
                    of_chunk, gradients = measure(chunk)
                    norms_sq += of_chunk
                    total = _added(total, gradients)
            return norms_sq, total

        norms_sq, gradients = self._in_memory(measure_all)
        self._add(len(inputs), norms_sq)
        self.gradient_sum = _added(self.gradient_sum, gradients)

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
            with _restored(random_states, inputs.device):
                yield from self._chunks(inputs, targets)


class PerSampleGradients(_OwnPass):
    """`vmap`, the reference: per-sample gradients by vmap of grad on a copy of the model, a chunk of them at a time.

    Works for any module that vmap can run. Memory is one copy of all gradients per sample of a chunk.
    BatchNorm normalises each sample by its own statistics; dropout draws anew for every sample.
    Inner products take a second pass, as ḡ is known only after the first one.
    """

    @contextlib.contextmanager
    def observe(self, inputs: Tensor, targets: Tensor, loss_scale: float = 1.0) -> Iterator[None]:
        random_states = _random_states(inputs.device)

        def norms_and_gradient(chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            gradients = self.per_sample_gradients(*chunk)
            return _norms_sq(gradients).sum(), {name: gradient.sum(0) for name, gradient in gradients.items()}

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


class GhostNorms(_OwnPass):
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
            with _restored(_random_states(inputs.device), inputs.device):
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
        random_states = _random_states(inputs.device)
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
        return sum(_norms_sq(gradients).sum() for gradients in own)

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
        return _training_gradient(self.parameters(), grad_scale)

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
                    f"inner products take per-sample gradients: no forward-mode derivative ({_first_line(error)})"
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


class MicroBatchGradients(Estimator):
    """`micro_batch`: the variance between the gradients of the training step's own micro-batches, times their size.

    Nearly free: the groups' gradients are seen on their way into `.grad`, before DDP averages them. Norms need no copy;
    inner products keep at most 2 × `num_groups` gradients, as neighbouring groups are merged when there are more.
    For networks with BatchNorm this is also the most accurate estimate: it looks at the real training gradients.
    """

    def __init__(self, *arguments, num_groups: int = 8):
        super().__init__(*arguments)
        self.num_groups = num_groups

    def _start(self) -> None:
        super()._start()
        # m_k, and by parameter: loss_scale · Σ of the group's gradients, or the norms of its rows
        self.groups: list[tuple[int, dict[str, Tensor]]] = []
        self.loss_scale = 1.0

    @contextlib.contextmanager
    def observe(self, inputs: Tensor, targets: Tensor, loss_scale: float = 1.0) -> Iterator[None]:
        group: dict[str, Tensor] = {}

        def hook_for(name: str):
            def keep(gradient: Tensor) -> None:
                group[name] = gradient  # autograd then leaves this tensor alone and adds it up elsewhere

            def keep_norms(gradient: Tensor) -> None:
                group[name] = _row_norms(gradient)

            return keep if self.inner_products else keep_norms

        handles = [parameter.register_hook(hook_for(name)) for name, parameter in self.parameters().items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.loss_scale = loss_scale
        self.groups.append((len(inputs), group))
        if len(self.groups) > 2 * self.num_groups:
            if self.inner_products:
                self.groups = [_merged(self.groups[i : i + 2]) for i in range(0, len(self.groups), 2)]
            else:
                self._add_norms()
                self.groups = []

    def _add_norms(self) -> None:
        """Of several groups at once: a dozen small operations for each would be most of a small network's price."""
        norms = [[_row_norms(g) if self.inner_products else g for g in group.values()] for _, group in self.groups]
        rows = [sum(map(len, own)) for own in norms]
        sizes = self.sums.new_tensor([m for m, _ in self.groups])
        self.sums[0] += sizes.sum()
        self.sums[1] += len(sizes)
        squares = torch.cat([norm for own in norms for norm in own]).double().square()
        sizes = sizes.repeat_interleave(torch.tensor(rows, device=sizes.device), output_size=sum(rows))
        self.sums[2] += (squares / sizes).sum()

    def _total(self, grad_scale: float) -> Tensor:
        if self.groups:  # a rank may have none
            self._add_norms()
        # ḡ_k = (the loss's gradient) / (m_k · loss_scale · grad_scale)
        self.sums[2] /= (self.loss_scale * grad_scale) ** 2
        return self.sums

    def mean_gradient(self, samples: float, grad_scale: float) -> dict[str, Tensor]:
        return _training_gradient(self.parameters(), grad_scale)

    def inner_product_sums(self, mean: dict[str, Tensor], grad_scale: float) -> Tensor:
        sizes = self.sums.new_tensor([m for m, _ in self.groups])
        inner = _inner([group for _, group in self.groups], mean) / (grad_scale * self.loss_scale)  # m_k p_k
        return torch.stack([inner.sum(), (inner.square() / sizes).sum()])


def _added(total: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: total[name] + gradient if name in total else gradient for name, gradient in gradients.items()}


def _merged(groups: list[tuple[int, dict[str, Tensor]]]) -> tuple[int, dict[str, Tensor]]:
    """One group of two (or of one, the last of an odd number)."""
    sizes, gradients = zip(*groups)
    return sum(sizes), {name: sum(group[name] for group in gradients) for name in gradients[0]}


def _training_gradient(parameters: dict[str, nn.Parameter], grad_scale: float) -> dict[str, Tensor]:
    """ḡ as the training step has it: averaged over the ranks, before clipping."""

    def unscaled(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(parameter)
        return parameter.grad if grad_scale == 1 else parameter.grad / grad_scale

    return {name: unscaled(parameter) for name, parameter in parameters.items()}


def listed(names: list[str], most: int = 3) -> str:
    """The first few of them, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


# Of tensors as large as the model: short stretches in the gradients' own precision, their sum in double. (Double
# throughout costs a copy in double of every tensor.)

BLOCK = 2**16
"""Numbers in a stretch of an inner product."""


def _row_norms(tensor: Tensor) -> Tensor:
    """‖row‖ of every row of the first dimension."""
    return torch.linalg.vector_norm(at_least_single(tensor).reshape(len(tensor) if tensor.dim() else 1, -1), dim=1)


def _norm_sq(tensors: Iterable[Tensor]) -> Tensor:
    """The squared norm of all of them as one vector, float64 ()."""
    return torch.cat([_row_norms(tensor) for tensor in tensors]).double().square().sum()


def _inner(groups: list[dict[str, Tensor]], mean: dict[str, Tensor]) -> Tensor:
    """The inner product of each with `mean` as one vector, float64 (K,). By parameter, so that `mean` stays in cache.

    torch.dot is ten times as fast here as other ways to a sum of products, but keeps its sum in single precision.
    """
    products: list[list[Tensor]] = [[] for _ in groups]
    for name, direction in mean.items():
        direction = at_least_single(direction).flatten().split(BLOCK)
        for own, group in zip(products, groups):
            if name in group:
                own += [torch.dot(a, b) for a, b in zip(at_least_single(group[name]).flatten().split(BLOCK), direction)]
    return torch.stack([torch.stack(own).sum(dtype=torch.float64) for own in products])


def _norms_sq(gradients: dict[str, Tensor]) -> Tensor:
    """‖g_i‖² over all parameters, float64 (n,)."""
    return sum(per_sample_norms_sq(gradient) for gradient in gradients.values())


def _random_states(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return states + [torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextlib.contextmanager
def _restored(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw from these random states inside, and leave the outer ones as they were."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.set_rng_state(states[0])
        if devices:
            torch.cuda.set_rng_state(states[1], device)
        yield
