"""`micro_batch`: the variance between the gradients of a step's own micro-batches."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from .contributions import at_least_single, real
from .estimator import (
    BLOCK,
    Estimator,
    MicroBatch,
    dense,
    in_memory_order,
    norm_sq,
    row_norms,
    training_gradient,
)
from .isolation import drawing_from, preserving_state, random_states
from .per_sample import added, in_wide_range
from .samples import Batch, count, some


class MicroBatchGradients(Estimator):
    """`micro_batch`: the variance between the gradients of the training step's own micro-batches, times their size.

    Nearly free: the groups' gradients are seen on their way into `.grad`, before DDP averages them. Norms need no copy;
    inner products keep at most 2 × `num_groups` gradients, as neighbouring groups are merged when there are more.
    For networks with BatchNorm this is also the most accurate estimate: it looks at the real training gradients.

    With a group a worker and accumulation step it is DDP-Norm and FSDP-Norm (Lau et al., arXiv:2412.21124, section 3),
    the groups' variance divided by K − 1 in place of K. Under FSDP2 a group's gradient is seen layer by layer, whole
    and before it is sharded; inner products would keep it.
    """

    price = 0.1

    tells_parameters_apart = True

    def __init__(self, *arguments, num_groups: int = 8):
        super().__init__(*arguments)
        self.num_groups = num_groups

    @property
    def works_on_shards(self) -> bool:
        return not self.inner_products

    def _start(self) -> None:
        super()._start()
        # m_k, and by parameter: loss_scale · Σ of the group's gradients, or the norms of its rows
        self.groups: list[tuple[int, dict[str, Tensor]]] = []
        self.loss_scale = 1.0

    @contextlib.contextmanager
    def _observing(self, batch: MicroBatch) -> Iterator[None]:
        group: dict[str, Tensor] = {}

        def hook_for(name: str):
            def keep(gradient: Tensor) -> None:
                group[name] = dense(gradient)  # autograd then leaves this tensor alone and adds it up elsewhere

            def keep_norms(gradient: Tensor) -> None:
                group[name] = row_norms(dense(gradient))

            return keep if self.inner_products else keep_norms

        with self._hooked(hook_for):
            yield
        self.loss_scale = batch.loss_scale
        self._add_group(count(batch.inputs), group)

    def _add_group(self, size: int, group: dict[str, Tensor]) -> None:
        self.groups.append((size, group))
        if len(self.groups) > 2 * self.num_groups:
            if self.inner_products:
                self.groups = [_merged(self.groups[i : i + 2]) for i in range(0, len(self.groups), 2)]
            else:
                self._add_norms()
                self.groups = []

    @contextlib.contextmanager
    def _hooked(self, hook_for: Callable[[str], Callable[[Tensor], None]]) -> Iterator[None]:
        """Every parameter's hook meets its gradient; of shards, that of the whole parameter of a gathered block."""
        hooked: dict[str, RemovableHandle] = {}

        def hook(prefix: str, block: nn.Module) -> None:
            for name, parameter in block.named_parameters(prefix):
                if parameter.requires_grad and name not in hooked and not isinstance(parameter, DTensor):
                    hooked[name] = parameter.register_hook(hook_for(name))

        hook("", self.model)
        gathered = [
            block.register_forward_pre_hook(lambda block, _, prefix=prefix: hook(prefix, block))
            for prefix, block in self.model.named_modules()
            if isinstance(block, FSDPModule)
        ]
        try:
            yield
        finally:
            for handle in [*hooked.values(), *gathered]:
                handle.remove()

    def _add_norms(self) -> None:
        """Of several groups at once: a dozen small operations for each would be most of a small network's price."""
        sizes = self._on_device([m for m, _ in self.groups], self.sums.dtype)
        self.sums[0] += sizes.sum()
        self.sums[1] += len(sizes)
        if self.inner_products:
            nothing = self.sums.new_zeros(())
            norms_sq = [norm_sq(group.values()) if group else nothing for _, group in self.groups]
            self.norms_sq = [torch.stack(norms_sq)]
            self.sums[2] += (self.norms_sq[0] / sizes).sum()
        else:
            rows = [sum(map(len, group.values())) for _, group in self.groups]
            squares = torch.cat([norms for _, group in self.groups for norms in group.values()]).double().square()
            sizes = sizes.repeat_interleave(self._on_device(rows, torch.int64), output_size=sum(rows))
            self.sums[2] += (squares / sizes).sum()
        if self.by_parameter:
            for m, group in self.groups:
                self._add_by_parameter({name: norm_sq([kept]) / m for name, kept in group.items()})

    def _on_device(self, numbers: list[int], dtype: torch.dtype) -> Tensor:
        """Copied while the host goes on."""
        return torch.tensor(numbers, dtype=dtype).to(self.sums.device, non_blocking=True)

    def _total(self, grad_scale: float | Tensor) -> Tensor:
        if self.groups:  # a rank may have none
            self._add_norms()
        # ḡ_k = (the loss's gradient) / (m_k · loss_scale · grad_scale)
        scale_sq = (self.loss_scale * grad_scale) ** 2
        self.sums[2] /= scale_sq
        self.sums_by_parameter = {name: own / scale_sq for name, own in self.sums_by_parameter.items()}
        return self.sums

    def mean_gradient(self, samples: Tensor, grad_scale: float | Tensor) -> dict[str, Tensor]:
        return training_gradient(self.parameters(), grad_scale)

    def products(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sizes = self._on_device([m for m, _ in self.groups], self.sums.dtype)
        scaled = sizes * grad_scale * self.loss_scale  # of what is kept over ḡ_k
        groups = [group for _, group in self.groups]
        if not groups:
            return sizes, sizes, sizes
        inner = _inner if self.sums.device.type == "cpu" else _inner_in_few_kernels
        return inner(groups, mean) / scaled, self.norms_sq[0] / scaled**2, sizes


class CutGradients(MicroBatchGradients):
    """`micro_batch` in a loop that may bring a batch in one piece: that one is cut into `num_groups` pieces of two
    samples or more, each with a forward and backward pass of its own before the training's. Of one process."""

    price = 1.0

    @contextlib.contextmanager
    def _observing(self, batch: MicroBatch) -> Iterator[None]:
        if not batch.whole:
            with super()._observing(batch):
                yield
            return
        device = self.sums.device
        with preserving_state(self.model), drawing_from(random_states(device), device):
            for piece in self._pieces(batch):
                self._add_piece(*piece)
        yield

    def _pieces(self, batch: MicroBatch) -> Iterator[tuple[Batch, Batch]]:
        n = count(batch.inputs)
        number = min(max(self.num_groups, -(-n // self.max_micro_batch_size)), max(n // 2, 1))
        for i in range(number):
            piece = slice(i * n // number, (i + 1) * n // number)
            yield some(batch.inputs, piece), some(batch.targets, piece)

    def _add_piece(self, inputs: Batch, targets: Batch) -> None:
        parameters, m = self.parameters(), count(inputs)
        with torch.enable_grad():
            with self.autocast(), in_wide_range(self.sums.device):
                outputs = self.model(inputs)
            with self.autocast():
                loss = m * self.loss(outputs, targets)
            # What this piece does not use has a gradient of zeros: another piece may use it.
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
        gradients = {name: dense(own) for name, own in zip(parameters, found)}
        self.gradient_sum = added(self.gradient_sum, gradients)
        kept = gradients if self.inner_products else {name: row_norms(own) for name, own in gradients.items()}
        self._add_group(m, kept)

    def _total(self, grad_scale: float | Tensor) -> Tensor:
        return super()._total(self._scale(grad_scale))

    def mean_gradient(self, samples: Tensor, grad_scale: float | Tensor) -> dict[str, Tensor]:
        if self.gradient_sum:
            return Estimator.mean_gradient(self, samples, grad_scale)
        return super().mean_gradient(samples, grad_scale)

    def products(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().products(mean, self._scale(grad_scale))

    def _scale(self, grad_scale: float | Tensor) -> float | Tensor:
        """Of the gradients that were kept: those of passes of its own are not scaled."""
        return 1.0 if self.gradient_sum else grad_scale


def _merged(groups: list[tuple[int, dict[str, Tensor]]]) -> tuple[int, dict[str, Tensor]]:
    """One group of two (or of one, the last of an odd number)."""
    sizes, gradients = zip(*groups)
    names = dict.fromkeys(name for group in gradients for name in group)
    return sum(sizes), {name: sum(group[name] for group in gradients if name in group) for name in names}


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    """Its numbers as a vector, at least in single precision, in the order in which those of `like` lie in memory."""
    return at_least_single(real(in_memory_order(tensor, like))).flatten()


def _inner(groups: list[dict[str, Tensor]], mean: dict[str, Tensor]) -> Tensor:
    """The inner product of each with `mean` as one vector, float64 (K,). By parameter, so that `mean` stays in cache.

    torch.dot is ten times as fast here as other ways to a sum of products, but keeps its sum in single precision.
    """
    products: list[list[Tensor]] = [[] for _ in groups]
    for name, direction in mean.items():
        flat = _flat(direction, direction).split(BLOCK)
        for own, group in zip(products, groups):
            if name in group:
                own += [torch.dot(a, b) for a, b in zip(_flat(group[name], direction).split(BLOCK), flat)]
    return torch.stack([torch.stack(own).sum(dtype=torch.float64) for own in products])


TOGETHER = 2**22
"""Numbers of parameters that share their kernels; of all groups' together at most 16 times as many."""


def _inner_in_few_kernels(groups: list[dict[str, Tensor]], mean: dict[str, Tensor]) -> Tensor:
    """The same for a device on which every operation costs its start: of several parameters and groups at a time."""
    shares = list(_shared_out({name: direction.numel() for name, direction in mean.items()}))
    largest = max(sum(mean[name].numel() for name in names) for names in shares)
    at_a_time = max(1, 16 * TOGETHER // largest)

    def products(some: list[dict[str, Tensor]], names: list[str]) -> Tensor:
        blocks = torch.cat([_stretch(group, names, mean) for group in some]).view(len(some), -1, BLOCK)
        return blocks.mul_(_stretch(mean, names, mean).view(-1, BLOCK)).sum(2).sum(1, dtype=torch.float64)

    parts = (groups[first : first + at_a_time] for first in range(0, len(groups), at_a_time))
    return torch.cat([sum(products(some, names) for names in shares) for some in parts])


def _shared_out(numbers: dict[str, int]) -> Iterator[list[str]]:
    """Names in order, at most `TOGETHER` numbers at a time (or one name)."""
    names, total = [], 0
    for name, own in numbers.items():
        if names and total + own > TOGETHER:
            yield names
            names, total = [], 0
        names.append(name)
        total += own
    if names:
        yield names


def _stretch(tensors: dict[str, Tensor], names: list[str], like: dict[str, Tensor]) -> Tensor:
    """These tensors' numbers one after the other, filled up with zeros to whole blocks."""
    pieces = [_flat(tensors[n] if n in tensors else torch.zeros_like(like[n]), like[n]) for n in names]
    missing = -sum(map(len, pieces)) % BLOCK
    return torch.cat([*pieces, pieces[0].new_zeros(missing)])
