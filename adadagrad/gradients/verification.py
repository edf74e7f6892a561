"""The check at the start: do an estimator's per-sample gradients agree with those of single samples?

It is made on a twin of the model, a copy in double precision whose parameters are moved a little at random, so that a
head of zeros hides nothing. Where there can be no twin (no memory; tensors of the model's own that must be in single
precision) the model itself is looked at, in its own precision. Compared are, for every parameter and sample, the
gradient's norm and its product with a random direction. Where the model draws at random, all passes draw the same.
"""

import contextlib
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .contributions import per_sample_norms_sq
from .draws import SameDraws, tolerance
from .estimator import NO_MEAN, Loss, first_line, is_out_of_memory
from .ghost_norms import GhostNorms
from .isolation import drawing_from, isolated, random_states
from .per_sample import BySample, PerSampleGradients, SingleGradients, real, rowwise
from .samples import Batch, chunks, converted, count, some

PROBE = 7
"""Samples that the check can make use of."""
SIZES = (5, 7, 3, 4, 6, 2)
"""Numbers of samples, the best first; if there is one of which no dimension of the model's tensors is a multiple, that
is taken, else one that no dimension is."""
TINY = 1e-300
MOST_NUMBERS = 2**26
"""In the gradients of a chunk of samples."""


@dataclass
class Reference:
    """What single samples give: by parameter, (n,) float64 each.

    Args:
        norms_sq: of the gradients.
        along: their products with the direction.
    """

    norms_sq: dict[str, list[Tensor]] = field(default_factory=dict)
    along: dict[str, list[Tensor]] = field(default_factory=dict)


class Check:
    """The comparison, on up to `PROBE` samples.

    Raises:
        ValueError: single samples cannot be passed through the model, or the loss is no mean or sum over samples.

    Attributes:
        moving: names of the buffers that a forward pass changes.
        adds_up: the loss is the sum of the samples' losses, not their mean; None: not known, or it draws at random.
        couples: the outputs of a sample depend on the others of its batch.
        price: seconds that a sample by itself takes, over those of its share in the batch.
        precision: in which the comparison is made.
    """

    def __init__(self, model: nn.Module, loss: Loss, inputs: Batch, targets: Batch):
        self.most = count(inputs)
        self.states = random_states(next(model.parameters()).device)
        for attempt in (self._on_double_twin, self._on_twin, self._on_model):
            try:
                attempt(model, loss, inputs, targets)
                break
            except Exception as error:  # a model raises what it likes; in its own precision it may go well
                failure = error
        else:
            raise ValueError(
                f"single samples cannot be passed through this model ({first_line(failure)}): "
                "only test_gradients=micro_batch is left"
            ) from None
        self._judge_loss()

    def _on_double_twin(self, model: nn.Module, loss: Loss, inputs: Batch, targets: Batch) -> None:
        loss = copy.deepcopy(loss).double() if isinstance(loss, nn.Module) else loss
        batch = (converted(tree, torch.float64) for tree in (inputs, targets))
        self._set_up(_moved(_in_double(_copied(model))), loss, *batch)

    def _on_twin(self, model: nn.Module, loss: Loss, inputs: Batch, targets: Batch) -> None:
        self._set_up(_moved(_copied(model)), loss, inputs, targets)

    def _on_model(self, model: nn.Module, loss: Loss, inputs: Batch, targets: Batch) -> None:
        self._set_up(model, loss, inputs, targets)

    def _set_up(self, model: nn.Module, loss: Loss, inputs: Batch, targets: Batch) -> None:
        self.model, self.loss = model, loss
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        generator = torch.Generator().manual_seed(0)
        self.direction = {
            name: torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype).to(parameter.device)
            for name, parameter in self.parameters.items()
        }
        self.reference = Reference({name: [] for name in self.parameters}, {name: [] for name in self.parameters})
        self.loop = SingleGradients(model, self.loss, True, 1)
        self.buffers = dict(model.named_buffers())
        singles = chunks(1, inputs, targets)
        with self._drawing() as draws:
            started = time.perf_counter()
            self._add_single(*next(singles))
            self.seconds = time.perf_counter() - started
        self.lowest = draws.lowest
        self.moving = self._find_moving(some(inputs, slice(0, 1)))
        self.n = self._number(draws.sizes)
        self.inputs, self.targets = (some(batch, slice(0, self.n)) for batch in (inputs, targets))
        for _ in range(self.n - 1):
            with self._drawing():
                self._add_single(*next(singles))
        self.norms_sq = {name: torch.cat(rows) for name, rows in self.reference.norms_sq.items()}
        self.along = {name: torch.cat(rows) for name, rows in self.reference.along.items()}
        self.total = torch.stack([norms_sq.max() for norms_sq in self.norms_sq.values()]).sum().sqrt()

    def _number(self, sizes: set[int]) -> int:
        candidates = [n for n in SIZES if n <= self.most]
        fits_none = [n for n in candidates if all(size % n for size in sizes if size)]
        is_none = [n for n in candidates if n not in sizes]
        return next(iter([*fits_none, *is_none, min(self.most, SIZES[0])]))

    def _add_single(self, x: Batch, y: Batch) -> None:
        for name, gradient in self.loop.per_sample_gradients(x, y, self.buffers).items():
            self.reference.norms_sq[name].append(per_sample_norms_sq(real(gradient)))
            self.reference.along[name].append(self._product(name, gradient))

    def _product(self, name: str, gradients: Tensor) -> Tensor:
        return rowwise(gradients) @ real(self.direction[name]).flatten().double()

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[SameDraws]:
        """A pass that draws what all passes draw, and computes in double precision by default where the twin does."""
        default = torch.get_default_dtype()
        with drawing_from(self.states, self.device):
            try:
                if next(iter(self.parameters.values())).dtype == torch.float64:
                    torch.set_default_dtype(torch.float64)
                with SameDraws() as draws:
                    yield draws
            finally:
                torch.set_default_dtype(default)

    def _find_moving(self, x: Batch) -> set[str]:
        """By a forward pass."""
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with self._drawing(), isolated(self.model), torch.no_grad():
            self.model(x)
            after = dict(self.model.named_buffers())
            return {
                name
                for name, buffer in before.items()
                if name in after and not (after[name].shape == buffer.shape and not bool((after[name] != buffer).any()))
            }

    def _judge_loss(self) -> None:
        """The batch's gradient must be the mean or the sum of the samples'; find out why where it is not."""
        self.couples, self.price, self.adds_up = False, 1.0, None
        if self.n < 2:
            return
        try:
            with self._drawing() as draws, isolated(self.model), torch.enable_grad():
                started = time.perf_counter()
                outputs = self.model(self.inputs)
                of_model = draws.draws
                loss = self.loss(outputs, self.targets)
                gradients = _gradients(loss, self.parameters)
                self.price = self.seconds * self.n / max(time.perf_counter() - started, 1e-9)
            with self._drawing(), isolated(self.model), torch.no_grad():
                alone_outputs = [self.model(x) for (x,) in chunks(1, self.inputs)]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            return  # a model that takes single samples only
        batch = {name: self._product(name, gradient.unsqueeze(0)) for name, gradient in gradients.items()}
        means, adds_up = (self._agree(batch, scale) for scale in (1 / self.n, 1.0))
        if means or adds_up:
            if means != adds_up and draws.draws == of_model:
                self.adds_up = adds_up
            return
        if not self._same_outputs(outputs, alone_outputs):
            self.couples = True
            return
        raise ValueError(NO_MEAN)

    def _agree(self, batch: dict[str, Tensor], scale: float) -> bool:
        return not any(
            self._differs(name, batch[name], scale * self.along[name].sum().reshape(1), self.along[name].abs().max())
            for name in self.parameters
        )

    def _same_outputs(self, together: Batch, singles: list[Batch]) -> bool:
        def rows(outputs: Batch) -> list[Tensor]:
            return [leaf.detach() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]

        most = tolerance(self.lowest)
        for i, one in enumerate(singles):
            for whole, own in zip(rows(together), rows(one)):
                if whole.dim() == 0 or whole.shape[1:] != own.shape[1:] or len(whole) != self.n * len(own):
                    return True  # no row of its own: nothing can be said
                row = whole[i * len(own) : (i + 1) * len(own)]
                if not float((row - own).abs().max() / (whole.abs().max() + TINY)) <= most:
                    return False
        return True

    @property
    def precision(self) -> str:
        return str(self.lowest).removeprefix("torch.")

    def _differs(self, name: str, found: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
        """How far off these numbers of a parameter are, relative to the largest; 0.0 within rounding."""
        scale = expected.abs().max() if scale is None else scale
        # Gradients that are zero but for rounding (a bias in front of a normalisation) cannot be compared.
        length = torch.linalg.vector_norm(real(self.direction[name]).double())
        error = (found - expected).abs().max()
        if float(error / (scale + 1e-4 * self.total * length + TINY)) <= tolerance(self.lowest):
            return 0.0
        return float(error / (scale + TINY)) if not bool((~torch.isfinite(found)).any()) else math.inf

    def _difference(self, name: str, norms_sq: Tensor, along: Tensor | None) -> float:
        """Of one parameter: the larger of norms' and products'."""
        root = self.norms_sq[name].sqrt()
        own = [self._differs(name, norms_sq.sqrt(), root)]
        if along is not None:  # a typical product
            length = torch.linalg.vector_norm(real(self.direction[name]).double())
            scale = root.max() * length / math.sqrt(max(self.direction[name].numel(), 1))
            own.append(self._differs(name, along, self.along[name], scale))
        return max(own)

    def _verdict(self, differences: dict[str, float]) -> str:
        worst = max(differences, key=differences.get, default=None)
        if worst is None or differences[worst] == 0:
            return ""
        if differences[worst] > 100:  # not finite, or to be zero
            return f"its gradients of {worst} are not those of single samples"
        return f"its gradients of {worst} are {_percent(differences[worst])} off those of single samples"

    def of_vmap(self, estimator: PerSampleGradients) -> str:
        """What is wrong with `vmap`; "" where nothing is. The estimator is told how buffers move."""
        twins = PerSampleGradients(self.model, self.loss, True, self.n)
        for twins.buffers_by_sample in (False, True) if self.moving else (False,):
            try:
                problem = self._of_samples(twins)
            except Exception as error:  # a model raises what it likes
                problem = first_line(error)
            if not problem:
                break
        estimator.buffers_by_sample = twins.buffers_by_sample
        return problem

    def _of_samples(self, estimator: BySample) -> str:
        numbers = sum(parameter.numel() for parameter in self.parameters.values())
        size = max(1, min(self.n, MOST_NUMBERS // max(numbers, 1)))
        parts: list[dict[str, tuple[Tensor, Tensor]]] = []
        buffers = {name: buffer for name, buffer in self.buffers.items() if name in self.moving}
        for chunk in chunks(size, self.inputs, self.targets):
            with self._drawing():
                gradients = estimator.per_sample_gradients(*chunk, buffers)
            parts.append({k: (per_sample_norms_sq(real(g)), self._product(k, g)) for k, g in gradients.items()})
        found = {name: [torch.cat(rows) for rows in zip(*(part[name] for part in parts))] for name in self.parameters}
        return self._verdict({name: self._difference(name, *found[name]) for name in self.parameters})

    def of_ghost(self, estimator: GhostNorms) -> str:
        """What is wrong with `ghost`; the estimator, of the model itself, is told what the twin's has found."""
        twins = GhostNorms(self.model, self.loss, True, self.n)
        with self._drawing():
            mode, _ = twins.backward(self.inputs, self.targets, self.buffers, keep=True)
        estimator.known, estimator.uncovered = mode.seen, mode.uncovered
        covered = [name for name in self.parameters if name not in mode.uncovered]
        problem = self._verdict({name: self._difference(name, mode.norms_sq(name), None) for name in covered})
        if not problem and mode.is_complete and self._total_differs(mode.inner_products(self.direction)):
            problem = "its inner products are off those of single samples"
        if not problem and estimator.inner_products:
            try:
                with self._drawing():
                    along = twins.along(self.direction, self.inputs, self.targets, self.buffers)
                estimator.forward_mode = not self._total_differs(along)
                estimator.why_not_forward = "it differs from single samples"
            except Exception as error:  # said when it is missed
                estimator.forward_mode, estimator.why_not_forward = False, first_line(error)
        return problem

    def _total_differs(self, found: Tensor) -> bool:
        error = (found - sum(self.along.values())).abs().max() / (self.total + TINY)
        return not float(error) <= 100 * tolerance(self.lowest)


def _gradients(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    own = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return {name: g.to_dense() if g.is_sparse else g for name, g in zip(parameters, own)}


def _percent(error: float) -> str:
    return f"{error:.1%}" if error >= 0.001 else f"{100 * error:.0e} %"


def _copied(model: nn.Module) -> nn.Module:
    """A copy without gradients; tensors that the model has kept from its last pass are no obstacle."""
    kept = (leaf for module in model.modules() for leaf in tree_leaves(list(_attributes(module).values())))
    memo = {id(t): t.detach().clone() for t in kept if isinstance(t, Tensor) and t.grad_fn is not None}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        return copy.deepcopy(model, memo)
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _attributes(module: nn.Module) -> dict:
    """What is kept beside parameters, buffers and submodules."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    return {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}


def _in_double(model: nn.Module) -> nn.Module:
    def cast(tensor: Tensor) -> Tensor:
        precise = {True: torch.float64, False: torch.complex128}[tensor.is_floating_point()]
        return tensor.to(precise) if tensor.is_floating_point() or tensor.is_complex() else tensor

    model._apply(cast)
    for module in model.modules():
        own = {k: v for k, v in _attributes(module).items() if isinstance(v, Tensor) and not v.requires_grad}
        module.__dict__.update({name: cast(value) for name, value in own.items()})
    return model


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    """Every parameter by a tenth of its size, in directions that do not depend on the precision."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        size = float(parameter.abs().double().square().mean().sqrt()) if parameter.numel() else 0.0
        parameter.add_(noise * (0.1 * size or 0.05))
    return model


def agreed(problem: str, device: torch.device) -> str:
    """The same verdict on every rank: one that fails, fails for all."""
    if not (dist.is_available() and dist.is_initialized()):
        return problem
    failed = torch.tensor(float(bool(problem)), dtype=torch.float64, device=device)
    dist.all_reduce(failed)
    return problem or ("it fails on another process" if failed else "")
