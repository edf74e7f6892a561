"""Exact per-sample gradient norms from one ordinary backward pass, without per-sample gradients ("ghost norms").

`GhostMode` watches the functions that a model calls, whatever modules it is made of; where one meets a parameter, a
rule says which input and output gradient decide its per-sample gradients. When the backward pass brings the output
gradient, the squared norms of the samples' gradients are added up (contributions.py has the formulas).

Rules: linear and matmul, convolutions (1d to 3d, stride, padding, dilation, groups), embedding, layer/group/instance
norm, multi-head attention, elementwise arithmetic with broadcasting, expansion over the batch. What is computed from
parameters alone (an indexed table, a normalised weight) is followed through and pulled back by autograd.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from contributions import (
    Contribution,
    Convolution,
    Direct,
    EmbeddingRows,
    OuterProducts,
    PulledBack,
    at_least_single,
    per_sample_norms_sq,
)

Rule = Callable[..., Tensor]


class GhostMode(TorchFunctionMode):
    """Inside, a forward and backward pass of n samples adds every sample's squared gradient norm to `norms_sq`.

    Args:
        parameters: name → parameter, those whose gradients count.
        inputs: the batch; whatever is computed from it belongs to samples, along the first dimension.
        expansions: which expansions of parameters are over the batch, from an earlier pass of the same model.
        keep: remember the layers' inputs and output gradients, for `inner_products`. Memory stays about the same:
            they come as the backward pass frees what else the forward pass has saved.

    Attributes:
        norms_sq: float64 (n,), of the gradients as the backward pass has them (a scaled loss gives scaled norms).
        is_complete: everything is kept that `inner_products` needs.
        uncovered: names of the parameters for which no rule was found; their share is missing.
        expansions: calls, by number, that expanded a parameter over the batch.
    """

    def __init__(
        self, parameters: dict[str, Tensor], inputs: Tensor, expansions: set[int] | None = None, keep: bool = False
    ):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.parameters, self.n = parameters, len(inputs)
        self.norms_sq = torch.zeros(self.n, dtype=torch.float64, device=inputs.device)
        self.uncovered: set[str] = set()
        self.expansions: set[int] = set()
        self._known_expansions, self._expansion_calls = expansions, 0
        self._keep, self._contributions, self.is_complete = keep, [], keep
        self._uses: Counter[str] = Counter()
        self._shared: dict[str, list[Tensor]] = defaultdict(list)
        self._mark(inputs, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "__get__" and function not in _VIEWS:
            return function(*args, **kwargs)
        content = args[:1] if function in _OF_FIRST_ALONE else args
        tensors = [argument for argument in _flatten(content, kwargs) if isinstance(argument, Tensor)]
        sources = [tensor for tensor in tensors if self._ancestors(tensor)] if torch.is_grad_enabled() else []
        if not any(self._is_batched(tensor) for tensor in tensors):
            return self._derive(function, args, kwargs, sources)
        rule = RULES.get(function) if sources else None
        if sources and rule is None:
            self._give_up(sources)
        result = rule(self, function, *args, **kwargs) if rule else function(*args, **kwargs)
        for tensor in _flatten((result if result is not None else args[0],), {}):
            self._mark(tensor, None)
        return result

    # What a tensor is made of is written on the tensor itself, so that nothing is kept alive for it:
    # None for the batch, the names of parameters where it is computed from them alone.

    def _mark(self, tensor, ancestors: frozenset[str] | None) -> None:
        if isinstance(tensor, Tensor):
            tensor._ghost_origin = (self.names, ancestors)  # `names` is this pass's own: old marks do not count

    def _origin(self, tensor: Tensor) -> frozenset[str] | None:
        if name := self.names.get(id(tensor)):
            return frozenset((name,))
        names, ancestors = getattr(tensor, "_ghost_origin", (None, None))
        return ancestors if names is self.names else frozenset()

    def _is_batched(self, tensor: Tensor) -> bool:
        return self._origin(tensor) is None

    def _ancestors(self, tensor: Tensor) -> frozenset[str]:
        """The parameters from which a tensor is computed; none where the batch has a part in it."""
        return self._origin(tensor) or frozenset()

    def _derive(self, function, args, kwargs, sources: list[Tensor]):
        """A function of parameters alone: remember of which. Expanding one over the batch is itself a use."""
        result = function(*args, **kwargs)
        if not sources:
            return result
        if function in _EXPANSIONS and self._expands_over_batch(sources[0], result):
            self.use(result, sources[0], lambda B: Direct(B.reshape(self.n, *sources[0].shape)))
            self._mark(result, None)
            return result
        ancestors = frozenset().union(*(self._ancestors(tensor) for tensor in sources))
        for tensor in _flatten((result,), {}):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                self._mark(tensor, ancestors)
        return result

    def _expands_over_batch(self, source: Tensor, result: Tensor) -> bool:
        """By the shape; where an earlier pass has shown which calls do, by their number, as shapes can coincide."""
        call, self._expansion_calls = self._expansion_calls, self._expansion_calls + 1
        if self._known_expansions is not None:
            return call in self._known_expansions
        expands = result.dim() == source.dim() > 0 and len(source) == 1 and len(result) == self.n
        if expands:
            self.expansions.add(call)
        return expands

    def _give_up(self, sources: Iterable[Tensor]) -> None:
        for source in sources:
            self.uncovered |= self._ancestors(source)

    def use(self, output: Tensor, source: Tensor | None, contribute: Callable[[Tensor], Contribution]) -> None:
        """When the gradient B of `output` is known, add what `contribute(B)` gives for `source`."""
        if source is None or not (ancestors := self._ancestors(source)):
            return
        self._uses.update(ancestors)

        def hook(B: Tensor) -> None:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._add(source, ancestors, contribute(at_least_single(B)))

        output.register_hook(hook)

    def _add(self, source: Tensor, ancestors: frozenset[str], contribution: Contribution) -> None:
        for name in ancestors:
            parameter = self.parameters[name]
            own = contribution if parameter is source else PulledBack(contribution, source, parameter)
            if self._keep:
                self._remember(name, own)
            if self._uses[name] == 1:
                self.norms_sq += own.norms_sq()
            else:  # the gradient is the sum over the uses: cross terms count
                gradients = own.instantiate(slice(0, self.n)).reshape(self.n, *parameter.shape)
                self._shared[name].append(gradients)

    def _remember(self, name: str, own: Contribution) -> None:
        if isinstance(own, PulledBack):  # what leads from the parameter to its use will be gone: now, or not at all
            if own.fits_at_once():
                own = Direct(own.instantiate(slice(0, self.n)))
            else:
                self.is_complete = False
        if self.is_complete:
            self._contributions.append((name, own))

    def inner_products(self, direction: dict[str, Tensor]) -> Tensor:
        """Of every sample's gradient with `direction` (by parameter), all parameters as one vector: float64 (n,)."""
        return sum(own.inner_products(at_least_single(direction[name])) for name, own in self._contributions)

    def __exit__(self, *exception):
        for gradients in self._shared.values():
            self.norms_sq += per_sample_norms_sq(sum(gradients))
        self._shared.clear()
        return super().__exit__(*exception)


def _by_sample(tensor: Tensor, n: int) -> Tensor:
    """(n·k, …, features) → (n, T, features): the rows of one sample stand together."""
    return tensor.reshape(n, -1, tensor.shape[-1])


def _flatten(args, kwargs):
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, (tuple, list)):
            yield from _flatten(argument, {})
        else:
            yield argument


# Rules: call the function, then say what its parameters' per-sample gradients are.


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

_EXPANSIONS = {Tensor.expand, Tensor.expand_as, Tensor.repeat, torch.broadcast_to, Tensor.broadcast_to}
# What they give has the values of their first argument; others only lend dtype or shape.
_OF_FIRST_ALONE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
# Properties that give a tensor back; all others (shape, dtype, …) need no tracking.
_VIEWS = {Tensor.T.__get__, Tensor.mT.__get__, Tensor.H.__get__, Tensor.mH.__get__, Tensor.data.__get__}
