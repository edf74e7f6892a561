"""What the estimators share: sums over ranks, the mean gradient, norms of tensors as large as the model."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..tests import Moments
from .contributions import at_least_single, real
from .samples import Batch

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) of a batch → scalar: the mean (or sum) of the samples' losses."""


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """All-reduce in place where several processes train together."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class MicroBatch:
    """What `Estimator.observe` is given."""

    inputs: Batch
    targets: Batch
    loss_scale: float
    whole: bool
    again: Callable[[], Batch]


NO_MEAN = (
    "the loss is neither the mean nor the sum of its samples' losses (class weights, ignore_index over the "
    "batch, a contrastive loss?), so that samples have no gradients of their own: take a loss that is, or "
    "test_gradients=micro_batch"
)


class Estimator:
    """What the estimators share. They differ in how a micro-batch is observed and where ḡ and the p_k come from.

    Args:
        model: the module that is trained (not a wrapper of it).
        loss: of the outputs and targets of a batch.
        inner_products: measure p_k, too.
        max_micro_batch_size: most samples in a pass of the test's own.
        autocast: makes the context of the forward pass (mixed precision).

    Attributes:
        by_parameter: measure every parameter by itself, too, where `tells_parameters_apart`.
        of_parameters: the moments of the last call of `moments`, by parameter, then.
        flag: what the last call of `moments` has read along.
        measured: how often `moments` was called.
        gave_way: how often later steps have shown that the next estimator must take over.
        couples_samples: the outputs of a sample depend on the others of its batch; the check at the start finds it.
    """

    adds_up: bool | None = None
    """The loss is the sum of its samples' losses, not their mean; None: it is not held against them."""
    recheck = False
    """A few later steps are compared with single samples again."""
    tells_parameters_apart = False
    price = 0.4
    """About what a measured step takes beyond a plain one, in plain steps (docs/statistics.md, "Cost")."""
    works_on_shards = False
    """It needs no pass of its own and no whole gradients, but for a layer at a time."""

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
        self.by_parameter, self.of_parameters, self.measured, self.gave_way = False, {}, 0, 0
        self.flag = False
        self.couples_samples = False
        self._start()

    @property
    def sharded(self) -> bool:
        """Each rank has a shard of every parameter and of its gradient (FSDP2)."""
        return any(isinstance(parameter, DTensor) for parameter in self.model.parameters())

    def _start(self) -> None:
        # [samples, groups, Σ m_k‖ḡ_k‖²; how often the loss was no mean, how often norms were not single samples']
        self.sums = torch.zeros(5, dtype=torch.float64, device=next(self.model.parameters()).device)
        self.gradient_sum: dict[str, Tensor] = {}
        self.sums_by_parameter: dict[str, Tensor] = {}  # Σ m_k‖ḡ_k‖² over the parameter alone
        self.norms_sq: list[Tensor] = []  # ‖g_i‖² of the samples in order, where inner products are measured

    def forget(self) -> None:
        """Drop what was observed since the last call of `moments`; measured steps are counted from here."""
        self.measured = 0
        self._start()

    def state_dict(self) -> dict[str, int]:
        """Plain numbers, for a checkpoint, the same on all ranks: what goes on looks at the same steps again."""
        return {"measured": self.measured, "gave_way": self.gave_way}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.measured = state["measured"]
        while self.gave_way < state["gave_way"]:
            self._give_way()

    def observe(
        self,
        inputs: Batch,
        targets: Batch,
        loss_scale: float = 1.0,
        whole: bool = True,
        again: Callable[[], Batch] | None = None,
    ) -> contextlib.AbstractContextManager:
        """Add a micro-batch; the training pass on it, whose loss is loss_scale · Σ ℓ_i, runs inside.

        Args:
            whole: this is all that the process has of the step: no further micro-batch follows (a hint: where it is
                wrong, memory is used in vain).
            again: makes the same inputs anew, so that they need not be kept until ḡ is known.
        """
        return self._observing(MicroBatch(inputs, targets, loss_scale, whole, again or (lambda: inputs)))

    def _observing(self, batch: MicroBatch) -> contextlib.AbstractContextManager:
        raise NotImplementedError

    def moments(self, grad_scale: float | Tensor = 1.0, flag: Tensor | None = None) -> Moments:
        """The moments of all micro-batches observed since the last call, on all ranks. The host waits for the device.

        Args:
            grad_scale: the gradient scaler's factor on the gradients of the training pass; for a tensor nobody waits.
            flag: (), on the device, the same on all ranks: read along, for `self.flag`, so that nobody waits for it.

        Raises:
            ValueError: the loss of a batch was neither the mean nor the sum of its samples' losses; on all ranks.
        """
        total = sum_over_ranks(self._total(grad_scale))
        mean = self.mean_gradient(total[0], grad_scale)
        of_shards = sum_over_ranks if self.sharded else lambda norms: norms  # a norm is then one of all ranks' together
        numbers = [total, of_shards(norm_sq(mean.values())[None])]
        if self.inner_products:
            products, norms_sq, sizes = self.products(mean, grad_scale)
            apart = (total[0] * products - sizes * norms_sq) / (total[0] - sizes)
            weighted = (products, products.square(), apart.square())
            numbers.append(sum_over_ranks(torch.stack([(sizes * values).sum() for values in weighted])))
        names = list(mean) if self.by_parameter else []
        if names:
            nothing = self.sums.new_zeros(())
            own = torch.stack([self.sums_by_parameter.get(name, nothing) for name in names])
            numbers += [sum_over_ranks(own), of_shards(torch.stack([norm_sq([mean[name]]) for name in names]))]
        self._start()
        flags = [] if flag is None else [flag.to(total.dtype)[None]]
        numbers = torch.cat([*flags, *numbers]).tolist()  # the only wait
        self.flag = bool(flags) and bool(numbers.pop(0))
        samples, groups, sum_norm_sq, losses_off, norms_off, grad_norm_sq, *rest = numbers
        self.measured += 1
        if losses_off and self.adds_up is not None:
            raise ValueError(NO_MEAN)
        if norms_off and self.recheck:  # the numbers of this step are wrong, then
            self._give_way()
            sum_norm_sq = math.nan
        sum_inner, sum_inner_sq, sum_apart_sq = rest[:3] if self.inner_products else (None, None, None)
        apart = zip(names, rest[len(rest) - 2 * len(names) :], rest[len(rest) - len(names) :])
        self.of_parameters = {name: Moments(round(samples), round(groups), norm, own) for name, own, norm in apart}
        return Moments(round(samples), round(groups), grad_norm_sq, sum_norm_sq, sum_inner_sq, sum_inner, sum_apart_sq)

    def _give_way(self) -> None:
        """To the next estimator, as this one's numbers are not those of single samples; on all ranks alike."""
        self.gave_way += 1

    def _total(self, grad_scale: float | Tensor) -> Tensor:
        """`sums` of this rank."""
        return self.sums

    def _add_by_parameter(self, sums: dict[str, Tensor]) -> None:
        """Σ m_k‖ḡ_k‖² of a micro-batch by parameter, float64 ()."""
        for name, own in sums.items():
            self.sums_by_parameter[name] = self.sums_by_parameter.get(name, 0.0) + own

    def _add(self, norms_sq: Tensor) -> None:
        """The ‖g_i‖² of a micro-batch's samples, float64 (n,)."""
        self.sums[:2] += len(norms_sq)
        self.sums[2] += norms_sq.sum()
        if self.inner_products:
            self.norms_sq.append(norms_sq)

    def mean_gradient(self, samples: Tensor, grad_scale: float | Tensor) -> dict[str, Tensor]:
        """ḡ by parameter: here from the sums of an own pass, averaged over the ranks in one exchange."""
        sums = {name: real(gradient) for name, gradient in self.gradient_sum.items()}
        flat = sum_over_ranks(torch.cat([own.flatten() for own in sums.values()])) / samples  # in the widest dtype
        pieces = flat.split([own.numel() for own in sums.values()])
        mean = {name: piece.view(sums[name].shape) for name, piece in zip(sums, pieces)}
        return {n: torch.view_as_complex(g) if self.gradient_sum[n].is_complex() else g for n, g in mean.items()}

    def products(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """p_k, ‖ḡ_k‖² and m_k of this rank's groups in order, float64 (K,); here single samples."""
        nothing = [self.sums.new_zeros(0)]  # a rank may have none
        return self.inner_products_with(mean, grad_scale), torch.cat(self.norms_sq or nothing), 1.0

    def inner_products_with(self, mean: dict[str, Tensor], grad_scale: float | Tensor) -> Tensor:
        """p_i of this rank's samples in order, float64 (n,)."""
        raise NotImplementedError

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def by_module(of_parameters: dict[str, Moments]) -> dict[str, Moments]:
    """The moments of every module's own parameters (of those without a module: by the name "") by its name."""
    modules: dict[str, Moments] = {}
    for name, own in of_parameters.items():
        module = name.rpartition(".")[0]
        before = modules.get(module)
        modules[module] = own if before is None else replace(
            own, grad_norm_sq=before.grad_norm_sq + own.grad_norm_sq, sum_norm_sq=before.sum_norm_sq + own.sum_norm_sq
        )  # fmt: skip
    return modules


def is_out_of_memory(error: BaseException) -> bool:
    """On the device, which is the host where there is no other.

    Libraries say it in words of their own: cuDNN finds no engine whose workspace fits, cuBLAS and NCCL allocate, too.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|ALLOC_FAILED|ALLOCATION_FAILED|unable to find an engine|CUDA calloc", re.I
)


def training_gradient(parameters: dict[str, nn.Parameter], grad_scale: float | Tensor) -> dict[str, Tensor]:
    """ḡ as the training step has it: averaged over the ranks, before clipping; of shards, this rank's."""

    def unscaled(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            return torch.zeros_like(own_part(parameter))
        gradient = dense(own_part(parameter.grad))
        return gradient if isinstance(grad_scale, float) and grad_scale == 1 else gradient / grad_scale

    return {name: unscaled(parameter) for name, parameter in parameters.items()}


def own_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def dense(gradient: Tensor) -> Tensor:
    """Embeddings may give sparse ones."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def listed(names: list[str], most: int = 3) -> str:
    """The first few of them, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def first_line(error: Exception, most: int = 160) -> str:
    """Its words, for a message of one line."""
    words = " ".join((str(error).strip() or type(error).__name__).split("\n")[0].split())
    return words if len(words) <= most else f"{words[:most]}…"


BLOCK = 2**18
"""Numbers in a stretch of a norm or of an inner product: single precision adds up so many without harm."""


def in_memory_order(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The same numbers in the order in which they (or those of `like`) lie in memory: flattened without a copy."""
    like = tensor if like is None else like
    channels_last = like.dim() == 4 and not like.is_contiguous()
    if channels_last and like.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1)
    return tensor


def row_norms(tensor: Tensor) -> Tensor:
    """‖row‖ of every row of the first dimension; of a vector, its norm."""
    tensor = in_memory_order(at_least_single(tensor))
    return torch.linalg.vector_norm(tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1), dim=1)


def stretches(tensor: Tensor) -> list[Tensor]:
    """Its numbers, at least in single precision, at most `BLOCK` of them at a time; of an empty shard, none."""
    tensor = in_memory_order(at_least_single(tensor))
    return list(tensor.flatten().split(BLOCK)) if tensor.numel() > BLOCK else [tensor] * (tensor.numel() > 0)


def norm_sq(tensors: Iterable[Tensor]) -> Tensor:
    """The squared norm of all of them as one vector, float64 (): a kernel or two for all of them on a GPU."""
    tensors = list(tensors)
    pieces = [piece for tensor in tensors for piece in stretches(tensor)]
    if not pieces:
        return torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    return torch.stack(torch._foreach_norm(pieces)).double().square().sum()
