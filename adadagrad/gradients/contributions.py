"""What one use of a parameter gives to its per-sample gradients, and the norms of these without the gradients.

For a layer with input x and output gradient B, the gradient of sample i is a known function of x_i and B_i, and its
norm is often much cheaper than the gradient itself (Goodfellow, arXiv:1510.01799, for linear layers). Each kind of
layer has a class here; per layer, the cheaper of the two forms is taken, in chunks that stay in cache.

Notation: n samples, T positions, I and O features; all norms are squared and float64.
"""

import math
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


@lru_cache
def _scratch(device: torch.device) -> int:
    """Numbers that a chunk of samples may take: what fits into a processor's cache, or what keeps a GPU busy."""
    if device.type == "cpu":
        return 2**20
    if device.type == "cuda":
        return min(2**27, torch.cuda.get_device_properties(device).total_memory // 256)
    return 2**27


def _per_chunk(numbers_per_sample: int, device: torch.device) -> int:
    return max(1, _scratch(device) // max(numbers_per_sample, 1))


def at_least_single(tensor: Tensor) -> Tensor:
    """At least single precision: squares of half-precision gradients would be lost."""
    return tensor.float() if tensor.dtype in HALF else tensor


@lru_cache
def _multiplies_halves(device: torch.device, dtype: torch.dtype) -> bool:
    """The device has products of such numbers that are added up in float32."""
    if device.type != "cuda" or dtype not in HALF or torch.version.hip:
        return False
    if dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _products(first: Tensor, second: Tensor) -> Tensor:
    """Matrix products (n, A, B) × (n, B, C) → (n, A, C), added up in single precision at least.

    A GPU multiplies numbers of 16 bits as they are: the products are exact, and several times as fast.
    """
    if first.dtype == second.dtype and _multiplies_halves(first.device, first.dtype):
        return torch.bmm(first, second, out_dtype=torch.float32)
    return torch.bmm(at_least_single(first), at_least_single(second))


def per_sample_norms_sq(per_sample: Tensor) -> Tensor:
    """Each sample's squared norm: (n, …) → float64 (n,).

    Rows in the gradients' own precision, their sum in double: double throughout costs a copy in double of everything.
    """
    return per_sample_row_norms(per_sample).double().square().sum(1)


def per_sample_row_norms(per_sample: Tensor) -> Tensor:
    """Norms of the rows of each sample's gradient: (n, …) → (n, R), at least single precision."""
    per_sample = at_least_single(per_sample)
    rows = per_sample.flatten(2) if per_sample.dim() > 2 else per_sample.reshape(len(per_sample), 1, -1)
    return torch.linalg.vector_norm(rows, dim=2)


def real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _sums_of_products(first: Tensor, second: Tensor) -> Tensor:
    """Σ_s first[t, s] · second[t, s] of every sample: (n, T, S) twice → (n, T)."""
    return (at_least_single(first) * at_least_single(second)).sum(2)


def _sum_of_products(first: Tensor, second: Tensor) -> Tensor:
    """Σ_ts first[t, s] · second[t, s] of every sample: (n, T, S) twice → float64 (n,)."""
    return _sums_of_products(first, second).sum(1, dtype=torch.float64)


def _end_to_end(parts: Iterable[Tensor], dim: int = 0) -> Tensor:
    """One after the other; a single one is not copied."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Part(Enum):
    """What numbers (n, R) say of the samples' squared norms."""

    GRADIENTS = "their squares add up; as they come, R may be large"
    NORMS = "their squares add up"
    TERMS = "they add up"


Parts = tuple[Part, Tensor]


def total_norms_sq(parts: Iterable[Parts]) -> Tensor:
    """The squared norms of all parts together, float64 (n,): few kernels, however many parts there are."""
    by_kind: dict[Part, list[Tensor]] = {kind: [] for kind in Part}
    for kind, numbers in parts:
        by_kind[kind].append(numbers)
    if gradients := by_kind[Part.GRADIENTS]:
        by_kind[Part.NORMS].append(torch.linalg.vector_norm(_end_to_end(gradients, 1), dim=1, keepdim=True))
    totals = []
    if by_kind[Part.NORMS]:
        totals.append(_end_to_end(by_kind[Part.NORMS], 1).double().square().sum(1))
    if by_kind[Part.TERMS]:
        totals.append(_end_to_end(by_kind[Part.TERMS], 1).sum(1, dtype=torch.float64))
    return sum(totals[1:], start=totals[0])


class Contribution:
    """What one use of a parameter gives to its per-sample gradients.

    `norms_sq()` and `inner_products(direction)` → float64 (n,); `parts()` → what `total_norms_sq` makes of it, together
    with other parameters' parts; `instantiate(chunk)` → the gradients of a slice of the samples, (m, *shape).
    """

    numbers_per_sample: int
    device: torch.device
    n: int

    def instantiate(self, chunk: slice) -> Tensor:
        raise NotImplementedError

    def parts(self) -> Parts:
        return Part.NORMS, _end_to_end(per_sample_row_norms(self.instantiate(chunk)) for chunk in self.chunks())

    def norms_sq(self) -> Tensor:
        return total_norms_sq([self.parts()])

    def inner_products(self, direction: Tensor) -> Tensor:
        """With `direction`, of the parameter's shape."""
        gradients = (self.instantiate(chunk) for chunk in self.chunks())
        return _end_to_end((rows.reshape(len(rows), -1) @ direction.flatten()).double() for rows in gradients)

    def chunks(self, numbers_per_sample: int | None = None) -> Iterable[slice]:
        size = _per_chunk(numbers_per_sample or self.numbers_per_sample, self.device)
        return (slice(i, min(i + size, self.n)) for i in range(0, self.n, size))


class Direct(Contribution):
    """Per-sample gradients that are small enough to be at hand: (n, *shape), at least single precision."""

    # Vectors of up to so many numbers for all samples (biases, weights of norms) wait for each other: one norm for all.
    SMALL = 2**16

    def __init__(self, gradients: Tensor):
        self.gradients, self.n, self.device = gradients, len(gradients), gradients.device
        self.numbers_per_sample = math.prod(gradients.shape[1:])

    def instantiate(self, chunk: slice) -> Tensor:
        return self.gradients[chunk]

    def parts(self) -> Parts:
        if self.gradients.dim() == 2 and self.gradients.numel() <= self.SMALL and not self.gradients.is_complex():
            return Part.GRADIENTS, self.gradients
        return Part.NORMS, per_sample_row_norms(self.gradients)

    def inner_products(self, direction: Tensor) -> Tensor:
        return self.gradients.reshape(self.n, -1).double() @ direction.flatten().double()


class OuterProducts(Contribution):
    """Σ_t B_t x_tᵀ: linear layers and 1×1 convolutions. x (n, T, I), B (n, T, O) → (n, O, I).

    Both are held as they come, under mixed precision in 16 bits; products of them are added up in single precision.
    """

    def __init__(self, x: Tensor, B: Tensor):
        self.x, self.B, self.n, self.device = x, B, len(x), x.device
        (positions, inputs), outputs = x.shape[1:], B.shape[2]
        self.gram_cost = positions**2 * (inputs + outputs)
        self.instantiate_cost = positions * inputs * outputs
        self.numbers_per_sample = inputs * outputs + positions * (inputs + outputs)
        self.gram_numbers = 2 * positions**2 + positions * (inputs + outputs)

    def instantiate(self, chunk: slice) -> Tensor:
        return _products(self.B[chunk].mT, self.x[chunk])

    def parts(self) -> Parts:
        if self.x.shape[1] == 1:
            return Part.NORMS, per_sample_row_norms(self.x[:, 0]) * per_sample_row_norms(self.B[:, 0])
        if self.instantiate_cost < self.gram_cost:
            return super().parts()
        # ‖Σ_t B_t x_tᵀ‖² = Σ_ts ⟨x_t, x_s⟩⟨B_t, B_s⟩
        pieces = ((self.x[chunk], self.B[chunk]) for chunk in self.chunks(self.gram_numbers))
        return Part.TERMS, _end_to_end(_sums_of_products(_products(x, x.mT), _products(B, B.mT)) for x, B in pieces)

    def inner_products(self, direction: Tensor) -> Tensor:
        """⟨Σ_t B_t x_tᵀ, D⟩ = Σ_t ⟨B_t, D x_t⟩"""
        direction = direction.reshape(self.B.shape[2], -1).mT
        chunks = self.chunks(self.x.shape[1] * (self.x.shape[2] + 2 * self.B.shape[2]))
        return _end_to_end(_sum_of_products(at_least_single(self.x[c]) @ direction, self.B[c]) for c in chunks)


class Convolution(Contribution):
    """The weight gradient of a convolution. x (n, C, *in), B (n, O, *out) → (n, O, C/groups, *kernel)."""

    # A shifted addition of Gram matrices is bound by memory: it costs as much as about so many multiplications.
    ADDITION = 10
    # Grouped convolutions of fewer input channels than this leave most of a processor's vector units idle.
    FEW_CHANNELS = 8
    # Elsewhere every operation costs its start: one sum over all offsets, where that needs little more memory.
    SUMS_IN_TURN_ON = ("cpu",)
    LITTLE = 2**14

    def __init__(self, x: Tensor, B: Tensor, weight_shape: torch.Size, stride, padding, dilation, groups: int):
        self.x, self.B, self.n, self.device = x, B, len(x), x.device
        self.weight_shape, self.stride, self.padding, self.dilation = weight_shape, stride, padding, dilation
        self.groups = groups
        inputs, outputs, kernel = (math.prod(shape[2:]) for shape in (x.shape, B.shape, weight_shape))
        self.numbers_per_sample = x.shape[1] * inputs + B.shape[1] * outputs + math.prod(weight_shape)
        patches = outputs * math.prod(weight_shape[1:])
        fits = _per_chunk(patches + self.numbers_per_sample, self.device) > 1
        self.by_patches = groups == 1 and x.shape[1] < self.FEW_CHANNELS and fits
        self.numbers_per_sample += patches if self.by_patches else 0
        padded = math.prod(size + 2 * p for size, p in zip(x.shape[2:], padding)) ** 2
        self.sums_at_once = self.device.type not in self.SUMS_IN_TURN_ON and padded <= max(4 * inputs**2, self.LITTLE)
        self.gram_numbers = inputs**2 + 3 * outputs**2 + (padded if self.sums_at_once else 0)
        self.instantiate_cost = outputs * math.prod(weight_shape)
        self.gram_cost = inputs**2 * x.shape[1] + outputs**2 * (B.shape[1] + kernel * self.ADDITION)

    def instantiate(self, chunk: slice) -> Tensor:
        x, B = self.x[chunk], self.B[chunk]
        if self.by_patches:
            return self._from_patches(x, B)
        return self._from_grouped_convolution(at_least_single(x), at_least_single(B))

    def _from_patches(self, x: Tensor, B: Tensor) -> Tensor:
        """A product with the patches of the input that the outputs see: (n, C·kernel, out) × (n, out, O)."""
        x = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        kernel, strides = self.weight_shape[2:], x.stride()
        taps = (s * d for s, d in zip(strides[2:], self.dilation))
        steps = (s * d for s, d in zip(strides[2:], self.stride))
        patches = x.as_strided((*x.shape[:2], *kernel, *B.shape[2:]), (*strides[:2], *taps, *steps))
        gradients = _products(patches.reshape(len(x), -1, math.prod(B.shape[2:])), B.flatten(2).mT)
        return gradients.mT.unflatten(2, (x.shape[1], *kernel))

    def _from_grouped_convolution(self, x: Tensor, B: Tensor) -> Tensor:
        """One grouped convolution with a group (or `groups` of them) for every sample."""
        m, dims = len(x), x.dim() - 2
        weight = x.new_empty(m * self.weight_shape[0], *self.weight_shape[1:])
        arguments = (self.stride, self.padding, self.dilation, False, (0,) * dims, m * self.groups)
        flat_B, flat_x = (tensor.reshape(1, -1, *tensor.shape[2:]) for tensor in (B, x))
        _, gradient, _ = torch.ops.aten.convolution_backward(
            flat_B, flat_x, weight, None, *arguments, (False, True, False)
        )
        return gradient.view(m, *self.weight_shape)

    def parts(self) -> Parts:
        if self.groups > 1 or self.instantiate_cost < self.gram_cost:
            return super().parts()
        chunks = self.chunks(self.gram_numbers)
        return Part.TERMS, _end_to_end(self._gram_terms(self.x[chunk], self.B[chunk]) for chunk in chunks)

    def inner_products(self, direction: Tensor) -> Tensor:
        """⟨B, x ∗ D⟩: the convolution with the direction in the place of the weight."""
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.x.dim() - 3]
        along = convolve(
            at_least_single(self.x), direction, None, self.stride, self.padding, self.dilation, self.groups
        )
        return _sum_of_products(along.flatten(2), self.B.flatten(2))

    def _gram_terms(self, x: Tensor, B: Tensor) -> Tensor:
        """Σ_s ⟨B_t, B_s⟩ ⟨patch_t, patch_s⟩ over output positions s: (n, T).

        The Gram matrix of the patches is the sum, over the kernel's offsets δ, of the Gram matrix of the pixels seen
        from t + δ and s + δ: one small product over pixels and |kernel| additions instead of a product over patches.
        """
        n, outputs = len(x), B.shape[2:]
        pixels = _products(x.flatten(2).mT, x.flatten(2)).view(n, *x.shape[2:], *x.shape[2:])
        gram_B = _products(B.flatten(2).mT, B.flatten(2))
        summed = self._summed_at_once if self.sums_at_once else self._summed_in_turn
        patches = summed(pixels, outputs)
        return _sums_of_products(patches.view_as(gram_B), gram_B)

    def _summed_at_once(self, pixels: Tensor, outputs: torch.Size) -> Tensor:
        """(n, *in, *in) → (n, *out, *out): the offsets are further dimensions of a view, and one sum takes them all."""
        pixels = F.pad(pixels, [p for p in reversed(self.padding) for _ in range(2)] * 2)
        of_samples, *strides = pixels.stride()
        of_t, of_s = strides[: len(outputs)], strides[len(outputs) :]
        steps = [own * step for axis in (of_t, of_s) for own, step in zip(axis, self.stride)]
        taps = [(t + s) * step for t, s, step in zip(of_t, of_s, self.dilation)]
        kernel = self.weight_shape[2:]
        seen = pixels.as_strided((len(pixels), *outputs, *outputs, *kernel), (of_samples, *steps, *taps))
        return seen.sum(tuple(range(-len(kernel), 0)))

    def _summed_in_turn(self, pixels: Tensor, outputs: torch.Size) -> Tensor:
        """(n, *in, *in) → (n, *out, *out) by an addition for every offset: up to seven times as fast on a CPU."""
        patches = pixels.new_zeros(len(pixels), *outputs, *outputs)
        for offsets in product(*map(range, self.weight_shape[2:])):
            windows = [self._window(*sizes) for sizes in zip(range(len(offsets)), offsets, pixels.shape[1:], outputs)]
            if all(seen.stop > seen.start for seen, _ in windows):
                out, seen = (tuple(window[i] for window in windows) for i in (0, 1))
                patches[(slice(None), *out, *out)].add_(pixels[(slice(None), *seen, *seen)])
        return patches

    def _window(self, axis: int, offset: int, inputs: int, outputs: int) -> tuple[slice, slice]:
        """Along one axis: the outputs whose tap at this offset lies inside the input, and the inputs it sees."""
        stride, shift = self.stride[axis], offset * self.dilation[axis] - self.padding[axis]
        first = max(0, -(shift // stride))
        last = min(outputs - 1, (inputs - 1 - shift) // stride)
        return slice(first, last + 1), slice(first * stride + shift, max(last * stride + shift + 1, 0), stride)


class EmbeddingRows(Contribution):
    """Rows of a table. indices (n, T), B (n, T, O) → (n, V, O)."""

    def __init__(self, indices: Tensor, B: Tensor, num_rows: int, padding_index: int | None):
        if padding_index is not None:
            B = B * (indices != padding_index).unsqueeze(-1)
        self.indices, self.B, self.num_rows, self.n, self.device = indices, B, num_rows, len(B), B.device
        self.numbers_per_sample = num_rows * B.shape[2]

    def instantiate(self, chunk: slice) -> Tensor:
        B = at_least_single(self.B[chunk])
        table = B.new_zeros(len(B), self.num_rows, B.shape[2])
        return table.scatter_add_(1, self.indices[chunk].unsqueeze(-1).expand_as(B), B)

    def parts(self) -> Parts:
        def gram(chunk: slice) -> Tensor:
            same_row = self.indices[chunk].unsqueeze(1) == self.indices[chunk].unsqueeze(2)
            return (_products(self.B[chunk], self.B[chunk].mT) * same_row).sum(2)

        return Part.TERMS, _end_to_end(gram(chunk) for chunk in self.chunks(2 * self.indices.shape[1] ** 2))

    def inner_products(self, direction: Tensor) -> Tensor:
        return _sum_of_products(direction[self.indices], self.B)


class PulledBack(Contribution):
    """The gradient of a parameter that enters through a tensor computed from parameters alone."""

    def __init__(self, contribution: Contribution, source: Tensor, parameter: Tensor):
        self.inner, self.source, self.parameter = contribution, source, parameter
        self.n, self.device = contribution.n, contribution.device
        self.numbers_per_sample = contribution.numbers_per_sample + parameter.numel()

    def at_hand(self) -> Direct:
        return Direct(self.instantiate(slice(0, self.n)))

    def fits_at_once(self) -> bool:
        return _per_chunk(self.numbers_per_sample, self.device) >= self.n

    def instantiate(self, chunk: slice) -> Tensor:
        gradients = self.inner.instantiate(chunk).reshape(-1, *self.source.shape).to(self.source.dtype)
        with torch.enable_grad():
            (pulled,) = torch.autograd.grad(
                self.source, self.parameter, gradients, retain_graph=True, is_grads_batched=True
            )
        return pulled


def norms_sq_of_sum(uses: list[Contribution], shape: torch.Size) -> Tensor:
    """Each sample's ‖Σ of its gradients‖² over several uses of one parameter of this shape: float64 (n,)."""
    uses = _joined(uses)
    if len(uses) == 1:
        return uses[0].norms_sq()
    kinds = {type(use) for use in uses}
    if len(uses) == 2 and kinds == {EmbeddingRows, OuterProducts}:
        table, layer = uses if isinstance(uses[0], EmbeddingRows) else reversed(uses)
        return norms_sq_of_sum([table], shape) + norms_sq_of_sum([layer], shape) + 2 * _cross(table, layer)
    chunks = uses[0].chunks(sum(use.numbers_per_sample for use in uses))
    sums = (sum(use.instantiate(chunk).reshape(-1, *shape) for use in uses) for chunk in chunks)
    return _end_to_end(per_sample_norms_sq(gradients) for gradients in sums)


def _joined(uses: list[Contribution]) -> list[Contribution]:
    """Uses of a kind are one use at more positions."""
    layers = [use for use in uses if isinstance(use, OuterProducts)]
    tables = [use for use in uses if isinstance(use, EmbeddingRows)]
    joined = [use for use in uses if not isinstance(use, (OuterProducts, EmbeddingRows))]
    if layers:
        x, B = (torch.cat([getattr(use, name) for use in layers], 1) for name in ("x", "B"))
        joined.append(OuterProducts(x, B) if len(layers) > 1 else layers[0])
    if tables:
        indices, B = (torch.cat([getattr(use, name) for use in tables], 1) for name in ("indices", "B"))
        joined.append(EmbeddingRows(indices, B, tables[0].num_rows, None) if len(tables) > 1 else tables[0])
    return joined


def _cross(table: EmbeddingRows, layer: OuterProducts) -> Tensor:
    """⟨gradient as a table, gradient as a layer's weight⟩ of a tied matrix, without either: float64 (n,).

    Σ_ts B'_s[index_t] ⟨B_t, x_s⟩, for the table's B_t and the layer's x_s and B'_s.
    """

    def of(chunk: slice) -> Tensor:
        indices, B, x = table.indices[chunk], table.B[chunk], layer.x[chunk]
        seen = layer.B[chunk].gather(2, indices.unsqueeze(1).expand(-1, x.shape[1], -1))  # n, S, T
        return _sum_of_products(seen, _products(x, B.mT))

    positions = table.indices.shape[1] * layer.x.shape[1]
    numbers = 3 * positions + table.B[0].numel() + layer.x[0].numel()
    return _end_to_end(of(chunk) for chunk in table.chunks(numbers))
