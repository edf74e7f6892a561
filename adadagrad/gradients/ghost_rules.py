"""What a function that meets a parameter does to it: call the function, then say what the per-sample gradients are.

`RULES` has every function that is covered; a model that calls another one with a parameter is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .contributions import (
    HALF,
    Contribution,
    Convolution,
    Direct,
    EmbeddingRows,
    OuterProducts,
    at_least_single,
)

if TYPE_CHECKING:
    from .ghost import GhostMode


Rule = Callable[..., Tensor]
"""(mode, function, *arguments of the function) → what the function gives."""


def _by_sample(tensor: Tensor, n: int) -> Tensor:
    """(n·k, …, features) → (n, T, features): the rows of one sample stand together."""
    return tensor.reshape(n, -1, tensor.shape[-1])


def _as_multiplied(input: Tensor, output: Tensor) -> Tensor:
    """What the layer has multiplied: under mixed precision the input in 16 bits, in half the memory."""
    return input.detach().to(output.dtype) if output.dtype in HALF else input.detach()


def _linear(mode: GhostMode, function, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = function(input, weight, bias)
    _record_linear(mode, output, input, weight, bias)
    return output


def _record_linear(mode: GhostMode, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n = mode.n
    if not mode.rows_by_sample(input):
        mode._give_up([weight, *([bias] if bias is not None else [])])
        return
    x = _as_multiplied(input, output)
    mode.use(output, weight, lambda B: OuterProducts(_by_sample(x, n), _by_sample(B, n)))
    mode.use(output, bias, lambda B: Direct(_by_sample(at_least_single(B), n).sum(1)))


def _addmm(mode: GhostMode, function, bias: Tensor, input: Tensor, weight: Tensor, **kwargs) -> Tensor:
    """A linear layer whose weight is transposed, as in GPT-2."""
    output = function(bias, input, weight, **kwargs)
    if kwargs or not mode.rows_by_sample(input) or isinstance(mode._origin(bias), str):
        mode._give_up([tensor for tensor in (bias, input, weight) if mode._ancestors(tensor)])
        return output
    x, n, rows = _as_multiplied(input, output), mode.n, bias.dim() == 1 or len(bias) == 1
    mode.use(output, weight, lambda B: OuterProducts(_by_sample(B, n), _by_sample(x, n)))
    if rows and bias.shape[-1:] == output.shape[-1:]:
        mode.use(output, bias, lambda B: Direct(_by_sample(at_least_single(B), n).sum(1).view(n, *bias.shape)))
    else:
        mode._give_up([bias])
    return output


def _matmul(mode: GhostMode, function, input: Tensor, other: Tensor) -> Tensor:
    output = function(input, other)
    if other.dim() != 2 or input.dim() < 2 or not mode.rows_by_sample(input):
        mode._give_up([tensor for tensor in (input, other) if mode._ancestors(tensor)])
        return output
    x, n = _as_multiplied(input, output), mode.n
    # x @ W: the gradient of W is that of a linear layer's weight, transposed.
    mode.use(output, other, lambda B: OuterProducts(_by_sample(B, n), _by_sample(x, n)))
    return output


def _convolution(mode: GhostMode, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    output = function(input, weight, bias, stride, padding, dilation, groups)
    dims = weight.dim() - 2
    if input.dim() != dims + 2 or not mode.rows_by_sample(input):
        mode._give_up([weight, *([bias] if bias is not None else [])])
        return output
    stride, dilation = (tuple(v) if isinstance(v, (tuple, list)) else (v,) * dims for v in (stride, dilation))
    if len(stride) != dims:
        stride, dilation = stride * dims, dilation * dims
    x, padding = _explicit_padding(_as_multiplied(input, output), weight, padding, dilation)
    k, n = len(input) // mode.n, mode.n

    def weight_gradient(B: Tensor) -> Contribution:
        inputs = x
        pointwise = groups == 1 and math.prod(weight.shape[2:]) == 1 and not any(padding)
        if pointwise or k > 1:
            if k > 1:  # several maps a sample: unfold them into one
                return Direct(_sum_maps(Convolution(inputs, B, weight.shape, stride, padding, dilation, groups), n))
            inputs = inputs[(..., *(slice(None, None, s) for s in stride))]
            return OuterProducts(inputs.flatten(2).mT, B.flatten(2).mT)
        return Convolution(inputs, B, weight.shape, stride, padding, dilation, groups)

    mode.use(output, weight, weight_gradient)
    mode.use(output, bias, lambda B: Direct(_over_maps(at_least_single(B).flatten(2).sum(2), n)))
    return output


def _sum_maps(convolution: Convolution, n: int) -> Tensor:
    """Where a sample has several maps, their gradients add up."""
    gradients = torch.cat([convolution.instantiate(chunk) for chunk in convolution.chunks()])
    return gradients.view(n, -1, *gradients.shape[1:]).sum(1)


def _explicit_padding(x: Tensor, weight: Tensor, padding, dilation) -> tuple[Tensor, tuple[int, ...]]:
    """Numbers for `padding="same"` and "valid"; uneven padding is added to x."""
    dims = weight.dim() - 2
    if padding == "valid":
        return x, (0,) * dims
    if padding == "same":
        totals = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:])]
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        return F.pad(x, sides), (0,) * dims
    padding = tuple(padding) if isinstance(padding, (tuple, list)) else (padding,)
    return x, padding if len(padding) == dims else padding * dims


def _embedding(mode: GhostMode, function, input, weight, padding_idx=None, *args, **kwargs) -> Tensor:
    output = function(input, weight, padding_idx, *args, **kwargs)
    scaled_by_frequency = kwargs.get("scale_grad_by_freq", args[2] if len(args) > 2 else False)
    if not mode.rows_by_sample(input) or scaled_by_frequency:
        mode._give_up([weight])
        return output
    indices, n = input.detach().reshape(mode.n, -1), mode.n
    padding_index = None if padding_idx is None else padding_idx % len(weight)
    mode.use(output, weight, lambda B: EmbeddingRows(indices, _by_sample(B, n), len(weight), padding_index))
    return output


def _plain_embedding(mode: GhostMode, function, weight, indices, padding_idx=-1, *args, **kwargs) -> Tensor:
    """Here a negative index of the padding means that there is none; for F.embedding, −1 is the last row."""

    def call(indices, weight, padding_idx, *args, **kwargs):
        return function(weight, indices, -1 if padding_idx is None else padding_idx, *args, **kwargs)

    padding_index = None if padding_idx < 0 else padding_idx
    return _embedding(mode, call, indices, weight, padding_index, *args, **kwargs)


def _layer_norm(mode: GhostMode, function, input, normalized_shape, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
    output = function(input, normalized_shape, weight, bias, eps, *args)
    if not mode.rows_by_sample(input):
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return output
    x, n, shape = input.detach(), mode.n, tuple(normalized_shape)

    def rows(tensor: Tensor) -> Tensor:
        return at_least_single(tensor).reshape(n, -1, *shape)

    mode.use(output, weight, lambda B: Direct((rows(B) * F.layer_norm(rows(x), shape, eps=eps)).sum(1)))
    mode.use(output, bias, lambda B: Direct(rows(B).sum(1)))
    return output


def _rms_norm(mode: GhostMode, function, input, normalized_shape, weight=None, eps=None) -> Tensor:
    output = function(input, normalized_shape, weight, eps)
    if not mode.rows_by_sample(input):
        mode._give_up([weight])
        return output
    x, n, shape = input.detach(), mode.n, tuple(normalized_shape)

    def rows(tensor: Tensor) -> Tensor:
        return at_least_single(tensor).reshape(n, -1, *shape)

    mode.use(output, weight, lambda B: Direct((rows(B) * F.rms_norm(rows(x), shape, eps=eps)).sum(1)))
    return output


def _group_norm(mode: GhostMode, function, input, num_groups, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
    output = function(input, num_groups, weight, bias, eps, *args)
    if not mode.rows_by_sample(input):
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return output
    x, n, channels = input.detach(), mode.n, input.shape[1]
    sums: list[Tensor] = []  # Σ_t B_t, (n·k, C), which the weight leaves to the bias

    def of_sample(gradients: Tensor) -> Direct:
        return Direct(_over_maps(gradients, n))

    def weight_gradient(B: Tensor) -> Contribution:
        maps, B = (at_least_single(tensor).reshape(len(x), channels, -1) for tensor in (x, B))
        # The statistics by the kernel that the layer itself uses: many times as fast as torch.var_mean on CPU.
        _, mean, scale = torch.native_group_norm(maps, None, None, *maps.shape, num_groups, eps)
        sums.append(B.sum(2))
        # Σ_t B_t (x_t − mean)·scale, without a normalised copy of x
        products, of_B = ((t.view(len(x), num_groups, -1)) for t in ((B * maps).sum(2), sums[0]))
        gradients = torch.addcmul(products, mean.unsqueeze(2), of_B, value=-1).mul_(scale.unsqueeze(2))
        return of_sample(gradients.view(len(x), channels))

    def bias_gradient(B: Tensor) -> Contribution:
        return of_sample(sums.pop() if sums else at_least_single(B).reshape(len(x), channels, -1).sum(2))

    mode.use(output, weight, weight_gradient)
    mode.use(output, bias, bias_gradient)
    return output


def _instance_norm(mode: GhostMode, function, input, running_mean=None, running_var=None, weight=None, bias=None,
                   use_input_stats=True, *args, **kwargs) -> Tensor:  # fmt: skip
    eps = kwargs.get("eps", args[1] if len(args) > 1 else 1e-5)

    def call(input, num_groups, weight, bias, eps):
        return function(input, running_mean, running_var, weight, bias, use_input_stats, *args, **kwargs)

    if not use_input_stats:
        return _frozen_norm(mode, call, input, running_mean, running_var, weight, bias, eps)
    return _group_norm(mode, call, input, input.shape[1], weight, bias, eps)


def _batch_norm(mode: GhostMode, function, input, running_mean, running_var, weight=None, bias=None,
                training=False, momentum=0.1, eps=1e-5, *args) -> Tensor:  # fmt: skip
    def call(input, num_groups, weight, bias, eps):
        return function(input, running_mean, running_var, weight, bias, training, momentum, eps, *args)

    if training:  # statistics of the batch: no sample has a gradient of its own
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return call(input, None, weight, bias, eps)
    return _frozen_norm(mode, call, input, running_mean, running_var, weight, bias, eps)


def _frozen_norm(mode: GhostMode, call, input, running_mean, running_var, weight, bias, eps) -> Tensor:
    """Normalisation by statistics that are given: it couples nothing."""
    output = call(input, None, weight, bias, eps)
    if not mode.rows_by_sample(input):
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return output
    x, n, mean, scale = input.detach(), mode.n, running_mean.clone(), (running_var + eps).rsqrt()

    def weight_gradient(B: Tensor) -> Contribution:
        B, maps = _maps(B, n), _maps(x, n)
        return Direct(((B * maps).sum((1, 3)) - mean * B.sum((1, 3))) * scale)

    mode.use(output, weight, weight_gradient)
    mode.use(output, bias, lambda B: Direct(_maps(B, n).sum((1, 3))))
    return output


def _over_maps(gradients: Tensor, n: int) -> Tensor:
    """The sum over a sample's maps: (n·k, C) → (n, C)."""
    return gradients if len(gradients) == n else gradients.view(n, -1, gradients.shape[1]).sum(1)


def _maps(tensor: Tensor, n: int) -> Tensor:
    """(n·k, C, *) → (n, k, C, positions), at least single precision."""
    tensor = at_least_single(tensor)
    return tensor.reshape(n, len(tensor) // n, tensor.shape[1], -1)


def _arithmetic(gradient: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Rule:
    """A rule for out = first ∘ second, elementwise with broadcasting.

    Args:
        gradient: (B, source, other, source_is_first) → the source's gradient before it is summed over broadcasting.
    """

    def rule(mode: GhostMode, function, first, second, *args, **kwargs) -> Tensor:
        output = function(first, second, *args, **kwargs)
        source, other = (first, second) if isinstance(first, Tensor) and mode._ancestors(first) else (second, first)
        both_derived = isinstance(other, Tensor) and mode._ancestors(other)
        if args or kwargs or both_derived or not mode.rows_by_sample(other):
            mode._give_up([tensor for tensor in (source, other) if mode._ancestors(tensor)])
            return output
        value, weight, is_first = other.detach(), source.detach(), source is first
        _use_broadcast(mode, output, source, lambda B: gradient(B, weight, value, is_first))
        return output

    return rule


def _use_broadcast(mode: GhostMode, output: Tensor, source: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
    """Of a source that meets rows by sample elementwise, the same in every row.

    Args:
        gradient: B (at least single precision) → the source's gradient before it is summed over broadcasting.
    """
    shape, n = (1,) * (output.dim() - source.dim()) + tuple(source.shape), mode.n
    if not shape or shape[0] != 1 or len(output) % n:
        mode._give_up([source])
        return

    def contribute(B: Tensor) -> Contribution:
        gradients = gradient(at_least_single(B)).reshape(n, -1, *B.shape[1:])
        summed = [1, *(axis + 1 for axis, size in enumerate(shape) if axis and size == 1)]
        return Direct(gradients.sum(summed).reshape(n, *source.shape))

    mode.use(output, source, contribute)


def _where(mode: GhostMode, function, *arguments, **kwargs) -> Tensor:
    output = function(*arguments, **kwargs)
    sources = [tensor for tensor in (*arguments, *kwargs.values()) if isinstance(tensor, Tensor)]
    sources = [tensor for tensor in sources if mode._ancestors(tensor)]
    by_sample = [tensor for tensor in arguments if isinstance(tensor, Tensor) and mode.rows_by_sample(tensor)]
    picked = any(isinstance(t, Tensor) and mode._origin(t) == "rows picked by value" for t in arguments)
    if kwargs or len(arguments) != 3 or len(sources) != 1 or not by_sample or picked:
        mode._give_up(sources)
        return output
    condition, is_first = arguments[0].detach(), sources[0] is arguments[1]
    _use_broadcast(mode, output, sources[0], lambda B: B * (condition if is_first else ~condition))
    return output


_add = _arithmetic(lambda B, source, other, is_first: B)


_subtract = _arithmetic(lambda B, source, other, is_first: B if is_first else -B)


_multiply = _arithmetic(lambda B, source, other, is_first: B * other)


_divide = _arithmetic(lambda B, source, other, is_first: B / other if is_first else -B * other / source.square())


def _attention(mode: GhostMode, function, query, key, value, attn_mask=None, *args, **kwargs) -> Tensor:
    """A mask made of parameters (relative positions, as in T5) is one of every sample."""
    of_parameters = [t for t in (query, key, value, attn_mask) if t is not None and mode._ancestors(t)]
    if len(of_parameters) == 1 and of_parameters[0] is attn_mask and query.dim() == 4 and len(query) == mode.n:
        # (A copy: of a view, gradients would go to the maker of what is viewed.)
        attn_mask = attn_mask.expand(mode.n, query.shape[1], query.shape[2], key.shape[2]).clone()
        _use_broadcast(mode, attn_mask, *of_parameters, lambda B: B)
    else:
        mode._give_up(of_parameters)
    return function(query, key, value, attn_mask, *args, **kwargs)


def _multi_head_attention(mode: GhostMode, function, query: Tensor, key: Tensor, value: Tensor, *args, **kwargs):
    """nn.MultiheadAttention's function hides its projections from modes: its own code runs, with `linear` watched.

    Inside, the batch is the second dimension: (L, N, E), or (L·N, E).
    """
    parameters = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, Tensor)]
    if query.dim() != 3 or query.shape[1] != mode.n:
        mode._give_up(parameters)
        return function(query, key, value, *args, **kwargs)
    watched: set[frozenset[str]] = set()

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output = F.linear(input, weight, bias)
        for part in (weight, bias):
            if part is not None:
                if part._base is not None:  # a part of the packed projection
                    mode._mark(part, mode._ancestors(part._base))
                watched.add(mode._ancestors(part))
        x, n = _as_multiplied(input, output), mode.n

        def by_sample(tensor: Tensor) -> Tensor:
            return tensor.reshape(-1, n, tensor.shape[-1]).transpose(0, 1)

        mode.use(output, weight, lambda B: OuterProducts(by_sample(x), by_sample(B)), "second dimension")
        mode.use(output, bias, lambda B: Direct(by_sample(at_least_single(B)).sum(1)), "second dimension")
        return output

    output = _with_linear(linear)(query, key, value, *args, **kwargs)
    mode._give_up(p for p in parameters if mode._ancestors(p) not in watched)  # bias_k, bias_v
    return output


def _with_linear(linear: Callable[..., Tensor]) -> Callable:
    """torch's multi_head_attention_forward that calls this `linear`, and does not ask modes about itself."""
    names = F.multi_head_attention_forward.__globals__ | {"linear": linear, "has_torch_function": lambda tensors: False}
    names |= {name: _in(names, getattr(F, name)) for name in ("_in_projection", "_in_projection_packed")}
    return _in(names, F.multi_head_attention_forward)


def _in(names: dict, function: FunctionType) -> FunctionType:
    """The same code, with these global names."""
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


RULES: dict[Callable, Rule] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: _plain_embedding,
    F.multi_head_attention_forward: _multi_head_attention,
}
for _functions, _rule in (
    ((torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d), _convolution),
    ((F.layer_norm, torch.layer_norm), _layer_norm),
    ((F.group_norm, torch.group_norm), _group_norm),
    ((F.instance_norm,), _instance_norm),
    ((F.rms_norm, torch.rms_norm), _rms_norm),
    ((F.batch_norm,), _batch_norm),
    ((torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _matmul),
    ((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _add),
    ((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__), _subtract),
    # Not in place: these need the other factor as it was.
    ((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    ((torch.div, Tensor.div, Tensor.__truediv__), _divide),
    ((torch.addmm, Tensor.addmm), _addmm),
    ((torch.where,), _where),
    ((F.scaled_dot_product_attention,), _attention),
):
    RULES |= dict.fromkeys(_functions, _rule)

EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}
# What they give has the values of their first argument; others only lend dtype or shape.
OF_FIRST_ALONE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
# Properties that give a tensor back; all others (shape, dtype, …) need no tracking.
VIEWS = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__, Tensor.data.__get__}

# What they give has the number of samples as its first size only if it is for the samples.
FACTORIES = {torch.zeros, torch.ones, torch.full, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full}

# Calls that pick by values of the batch: along the first dimension, what they give is no longer in the samples' order.
# Where the dimension stands among the arguments, and which it is by default (None: they flatten).
PICKS: dict[Callable, tuple[int, int | None]] = {
    **dict.fromkeys((torch.masked_select, Tensor.masked_select, torch.take, Tensor.take), (99, None)),
    **dict.fromkeys((torch.index_select, Tensor.index_select, torch.gather, Tensor.gather), (1, None)),
    **dict.fromkeys((torch.sort, Tensor.sort), (1, -1)),
    **dict.fromkeys((torch.topk, Tensor.topk), (2, -1)),
}
