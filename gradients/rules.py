"""What a function that meets a parameter does to it: call the function, then say what the per-sample gradients are.

`RULES` has every function that is covered; a model that calls another one with a parameter is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from gradients.contributions import Contribution, Convolution, Direct, EmbeddingRows, OuterProducts, at_least_single

if TYPE_CHECKING:
    from gradients.ghost import GhostMode


Rule = Callable[..., Tensor]
"""(mode, function, *arguments of the function) → what the function gives."""


def _by_sample(tensor: Tensor, n: int) -> Tensor:
    """(n·k, …, features) → (n, T, features): the rows of one sample stand together."""
    return tensor.reshape(n, -1, tensor.shape[-1])


def _linear(mode: GhostMode, function, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    output = function(input, weight, bias)
    _record_linear(mode, output, input, weight, bias)
    return output


def _record_linear(mode: GhostMode, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    n = mode.n
    if len(input) % n or mode._ancestors(input):
        mode._give_up([weight, *([bias] if bias is not None else [])])
        return
    x = input.detach()
    mode.use(output, weight, lambda B: OuterProducts(_by_sample(at_least_single(x), n), _by_sample(B, n)))
    mode.use(output, bias, lambda B: Direct(_by_sample(B, n).sum(1)))


def _matmul(mode: GhostMode, function, input: Tensor, other: Tensor) -> Tensor:
    output = function(input, other)
    if other.dim() != 2 or input.dim() < 2 or len(input) % mode.n or mode._ancestors(input):
        mode._give_up([tensor for tensor in (input, other) if mode._ancestors(tensor)])
        return output
    x, n = input.detach(), mode.n
    # x @ W: the gradient of W is that of a linear layer's weight, transposed.
    mode.use(output, other, lambda B: OuterProducts(_by_sample(B, n), _by_sample(at_least_single(x), n)))
    return output


def _convolution(mode: GhostMode, function, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    output = function(input, weight, bias, stride, padding, dilation, groups)
    dims = weight.dim() - 2
    if input.dim() != dims + 2 or len(input) % mode.n or mode._ancestors(input):
        mode._give_up([weight, *([bias] if bias is not None else [])])
        return output
    stride, dilation = (tuple(v) if isinstance(v, (tuple, list)) else (v,) * dims for v in (stride, dilation))
    if len(stride) != dims:
        stride, dilation = stride * dims, dilation * dims
    x, padding = _explicit_padding(input.detach(), weight, padding, dilation)
    k, n = len(input) // mode.n, mode.n

    def weight_gradient(B: Tensor) -> Contribution:
        inputs = at_least_single(x)
        pointwise = groups == 1 and math.prod(weight.shape[2:]) == 1 and not any(padding)
        if pointwise or k > 1:
            if k > 1:  # several maps a sample: unfold them into one
                return Direct(_sum_maps(Convolution(inputs, B, weight.shape, stride, padding, dilation, groups), n))
            inputs = inputs[(..., *(slice(None, None, s) for s in stride))]
            return OuterProducts(inputs.flatten(2).mT, B.flatten(2).mT)
        return Convolution(inputs, B, weight.shape, stride, padding, dilation, groups)

    mode.use(output, weight, weight_gradient)
    mode.use(output, bias, lambda B: Direct(B.flatten(2).sum(2).view(n, k, -1).sum(1)))
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
    if len(input) % mode.n or scaled_by_frequency:
        mode._give_up([weight])
        return output
    indices, n = input.detach().reshape(mode.n, -1), mode.n
    padding_index = None if padding_idx is None or padding_idx == -1 else padding_idx % len(weight)
    mode.use(output, weight, lambda B: EmbeddingRows(indices, _by_sample(B, n), len(weight), padding_index))
    return output


def _layer_norm(mode: GhostMode, function, input, normalized_shape, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
    output = function(input, normalized_shape, weight, bias, eps, *args)
    if len(input) % mode.n:
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return output
    x, n, shape = input.detach(), mode.n, tuple(normalized_shape)

    def rows(B: Tensor) -> Tensor:
        return B.reshape(n, -1, *shape)

    mode.use(
        output, weight, lambda B: Direct((rows(B) * rows(F.layer_norm(at_least_single(x), shape, eps=eps))).sum(1))
    )
    mode.use(output, bias, lambda B: Direct(rows(B).sum(1)))
    return output


def _group_norm(mode: GhostMode, function, input, num_groups, weight=None, bias=None, eps=1e-5, *args) -> Tensor:
    output = function(input, num_groups, weight, bias, eps, *args)
    if len(input) % mode.n:
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return output
    x, n = input.detach(), mode.n

    def weight_gradient(B: Tensor) -> Contribution:
        maps, B = (tensor.reshape(len(x), x.shape[1], -1) for tensor in (at_least_single(x), B))
        # The statistics by the kernel that the layer itself uses: many times as fast as torch.var_mean on CPU.
        _, mean, scale = torch.native_group_norm(maps, None, None, *maps.shape, num_groups, eps)
        mean, scale = (t.repeat_interleave(x.shape[1] // num_groups, 1) for t in (mean, scale))
        # Σ_t B_t (x_t − mean)·scale, without a normalised copy of x
        gradients = ((B * maps).sum(2) - mean * B.sum(2)) * scale
        return Direct(gradients.view(n, -1, x.shape[1]).sum(1))

    mode.use(output, weight, weight_gradient)
    mode.use(output, bias, lambda B: Direct(B.reshape(n, len(x) // n, x.shape[1], -1).sum((1, 3))))
    return output


def _instance_norm(mode: GhostMode, function, input, running_mean=None, running_var=None, weight=None, bias=None,
                   use_input_stats=True, *args, **kwargs) -> Tensor:  # fmt: skip
    if not use_input_stats:
        mode._give_up([tensor for tensor in (weight, bias) if tensor is not None])
        return function(input, running_mean, running_var, weight, bias, use_input_stats, *args, **kwargs)
    eps = kwargs.get("eps", args[1] if len(args) > 1 else 1e-5)

    def call(input, num_groups, weight, bias, eps):
        return function(input, running_mean, running_var, weight, bias, use_input_stats, *args, **kwargs)

    return _group_norm(mode, call, input, input.shape[1], weight, bias, eps)


def _arithmetic(gradient: Callable[[Tensor, Tensor, Tensor, bool], Tensor]) -> Rule:
    """A rule for out = first ∘ second, elementwise with broadcasting.

    Args:
        gradient: (B, source, other, source_is_first) → the source's gradient before it is summed over broadcasting.
    """

    def rule(mode: GhostMode, function, first, second, *args, **kwargs) -> Tensor:
        output = function(first, second, *args, **kwargs)
        source, other = (first, second) if isinstance(first, Tensor) and mode._ancestors(first) else (second, first)
        shape = (1,) * (output.dim() - source.dim()) + tuple(source.shape)
        both_derived = isinstance(other, Tensor) and mode._ancestors(other)
        if args or kwargs or both_derived or len(output) % mode.n or shape[0] != 1:
            mode._give_up([tensor for tensor in (source, other) if mode._ancestors(tensor)])
            return output
        value = other.detach() if isinstance(other, Tensor) else other
        weight, n, is_first = source.detach(), mode.n, source is first

        def contribute(B: Tensor) -> Contribution:
            gradients = gradient(B, weight, value, is_first).reshape(n, -1, *B.shape[1:])
            summed = [1, *(axis + 1 for axis, size in enumerate(shape) if axis and size == 1)]
            return Direct(gradients.sum(summed).reshape(n, *source.shape))

        mode.use(output, source, contribute)
        return output

    return rule


_add = _arithmetic(lambda B, source, other, is_first: B)


_subtract = _arithmetic(lambda B, source, other, is_first: B if is_first else -B)


_multiply = _arithmetic(lambda B, source, other, is_first: B * other)


_divide = _arithmetic(lambda B, source, other, is_first: B / other if is_first else -B * other / source.square())


def _attention(mode, function, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
               bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True,
               key_padding_mask=None, need_weights=True, attn_mask=None, use_separate_proj_weight=False,
               q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
               average_attn_weights=True, is_causal=False):  # fmt: skip
    """nn.MultiheadAttention's function hides its projections from modes: here it is spelled out, (L, N, E) inside."""
    given = (bias_k, bias_v, static_k, static_v, key_padding_mask, attn_mask)
    unusual = any(extra is not None for extra in given) or add_zero_attn or use_separate_proj_weight or is_causal
    parameters = (in_proj_weight, in_proj_bias, out_proj_weight, out_proj_bias)
    if unusual or query.dim() != 3 or query.shape[1] % mode.n or (need_weights and dropout_p and training):
        mode._give_up(
            [p for p in (*parameters, q_proj_weight, k_proj_weight, v_proj_weight, bias_k, bias_v) if p is not None]
        )
        return function(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
                        add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training, key_padding_mask,
                        need_weights, attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight,
                        static_k, static_v, average_attn_weights, is_causal)  # fmt: skip

    batch_first = [tensor.transpose(0, 1) for tensor in (query, key, value)]
    if key is query and value is key:
        projected = F.linear(batch_first[0], in_proj_weight, in_proj_bias)
        _record_linear(mode, projected, batch_first[0], in_proj_weight, in_proj_bias)
        parts = projected.chunk(3, -1)
    else:
        mode._give_up([p for p in (in_proj_weight, in_proj_bias) if p is not None])
        biases = in_proj_bias.chunk(3) if in_proj_bias is not None else (None,) * 3
        parts = [F.linear(x, w, b) for x, w, b in zip(batch_first, in_proj_weight.chunk(3), biases)]
    heads = [part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in parts]  # N, heads, L, E/heads
    weights = None
    if need_weights:
        weights = (heads[0] @ heads[1].mT / math.sqrt(heads[0].shape[-1])).softmax(-1)
        attended = weights @ heads[2]
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        attended = F.scaled_dot_product_attention(*heads, dropout_p=dropout_p if training else 0.0)
    merged = attended.transpose(1, 2).flatten(2)
    output = F.linear(merged, out_proj_weight, out_proj_bias)
    _record_linear(mode, output, merged, out_proj_weight, out_proj_bias)
    return output.transpose(0, 1), weights


RULES: dict[Callable, Rule] = {
    F.linear: _linear,
    F.embedding: _embedding,
    torch.embedding: lambda mode, function, weight, indices, padding_idx=-1, *args, **kwargs: _embedding(
        mode,
        lambda i, w, p, *a, **k: function(w, i, -1 if p is None else p, *a, **k),
        indices,
        weight,
        padding_idx,
        *args,
        **kwargs,
    ),
    F.multi_head_attention_forward: _attention,
}
for _functions, _rule in (
    ((torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d), _convolution),
    ((F.layer_norm, torch.layer_norm), _layer_norm),
    ((F.group_norm, torch.group_norm), _group_norm),
    ((F.instance_norm,), _instance_norm),
    ((torch.matmul, torch.mm, Tensor.matmul, Tensor.__matmul__, Tensor.mm), _matmul),
    ((torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__), _add),
    ((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__), _subtract),
    # Not in place: these need the other factor as it was.
    ((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    ((torch.div, Tensor.div, Tensor.__truediv__), _divide),
):
    RULES |= dict.fromkeys(_functions, _rule)

EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}
# What they give has the values of their first argument; others only lend dtype or shape.
OF_FIRST_ALONE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
# Properties that give a tensor back; all others (shape, dtype, …) need no tracking.
VIEWS = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__, Tensor.data.__get__}
