"""Exact per-sample gradient norms from one ordinary backward pass, without per-sample gradients ("ghost norms").

`GhostMode` watches the functions that a model calls, whatever modules it is made of; where one meets a parameter, a
rule (rules.py) says which input and output gradient decide its per-sample gradients. When the backward pass brings the
output gradient, the squared norms of the samples' gradients are added up (contributions.py has the formulas).

Rules: linear and matmul, convolutions (1d to 3d, stride, padding, dilation, groups), embedding, layer/group/instance
norm, multi-head attention, elementwise arithmetic with broadcasting, expansion over the batch. What is computed from
parameters alone (an indexed table, a normalised weight) is followed through and pulled back by autograd.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradients.contributions import Contribution, Direct, PulledBack, at_least_single, per_sample_norms_sq
from gradients.rules import EXPANSIONS, OF_FIRST_ALONE, RULES, VIEWS


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
        if getattr(function, "__name__", "") == "__get__" and function not in VIEWS:
            return function(*args, **kwargs)
        content = args[:1] if function in OF_FIRST_ALONE else args
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
        if function in EXPANSIONS and self._expands_over_batch(sources[0], result):
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


def _flatten(args, kwargs):
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, (tuple, list)):
            yield from _flatten(argument, {})
        else:
            yield argument
