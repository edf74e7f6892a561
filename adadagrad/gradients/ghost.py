"""Exact per-sample gradient norms from one ordinary backward pass, without per-sample gradients ("ghost norms").

`GhostMode` watches the functions that a model calls, whatever modules it is made of; where one meets a parameter, a
rule (ghost_rules.py) says which input and output gradient decide its per-sample gradients. When the backward pass
brings the output gradient, the squared norms of the samples' gradients are added up (contributions.py has the
formulas).

Rules: linear and matmul, convolutions (1d to 3d, stride, padding, dilation, groups), embedding, layer/group/instance/
RMS norm, batch norm by given statistics, multi-head attention, elementwise arithmetic with broadcasting, expansion over
the batch. What is computed from parameters alone (an indexed table, a normalised weight) is followed through and pulled
back by autograd.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from .contributions import (
    Contribution,
    Direct,
    Part,
    Parts,
    PulledBack,
    at_least_single,
    norms_sq_of_sum,
    total_norms_sq,
)
from .estimator import first_line, is_out_of_memory
from .ghost_rules import EXPANSIONS, FACTORIES, OF_FIRST_ALONE, PICKS, RULES, VIEWS
from .hooks import Hook, Hooked
from .samples import count, leaves

Origin = frozenset[str] | str
"""Of a tensor: the names of the parameters it is computed from, or that the batch has a part in it."""
BY_SAMPLE = "rows by sample"
PICKED = "rows picked by value"


@dataclass
class Seen:
    """What a pass has met, by which a later one tells samples from what has their number by chance.

    (Among the tensors of a pass that is compared with single samples no dimension but that of the samples has their
    number; among those of a training step others may: a sequence as long as the batch, or a multiple of it.)

    Args:
        uses: of parameters, in the words of `GhostMode.use`, that have got a gradient.
        expansions, others: calls of `EXPANSIONS` over the batch, and over something else.
    """

    uses: set[tuple] = field(default_factory=set)
    expansions: set[tuple] = field(default_factory=set)
    others: set[tuple] = field(default_factory=set)


class GhostMode(TorchFunctionMode):
    """Inside, a forward and backward pass of n samples adds every sample's squared gradient norm to `norms_sq`.

    Args:
        parameters: name → parameter, those whose gradients count.
        inputs: the batch (tensors, or a tree of them); what is computed from it belongs to samples, along the first
            dimension.
        known: what an earlier pass of the same model has seen; what it has not seen is not covered.
        uncovered: names of parameters that are left out.
        hooks: of parameters, those that change the samples' gradients.
        refresh: name → parameter as they are now. Under FSDP2 a module that runs has other, gathered parameters.
        keep: remember the layers' inputs and output gradients, for `inner_products`. Memory stays about the same:
            they come as the backward pass frees what else the forward pass has saved.

    Attributes:
        uncovered: names of the parameters for which no rule was found; they have no share in the norms.
        failure: what a rule has failed on that was found, in the backward pass.
        seen: of this pass.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        inputs: Any,
        known: Seen | None = None,
        keep: bool = False,
        refresh: Callable[[], dict[str, Tensor]] | None = None,
        uncovered: Collection[str] = (),
        hooks: dict[str, Hook] | None = None,
    ):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.parameters, self.n, self._refresh = parameters, count(inputs), refresh
        self.uncovered, self.failure, self.hooks = set(uncovered), "", hooks or {}
        self.seen, self._known, self._function = Seen(), known, ""
        self._keep, self._contributions, self._all_kept = keep, [], keep
        self._uses: Counter[str] = Counter()
        self._shared: dict[str, list[Contribution]] = defaultdict(list)
        self._parts: list[tuple[str, Parts]] = []
        for tensor in leaves(inputs):
            if tensor.dim():  # a single number belongs to every sample
                self._mark(tensor, BY_SAMPLE)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "__get__" and function not in VIEWS:
            return function(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:  # checkpointing runs a part of the forward pass again
            return function(*args, **kwargs)
        content = args[:1] if function in OF_FIRST_ALONE else args
        tensors = [argument for argument in _flatten(content, kwargs) if isinstance(argument, Tensor)]
        origins = [self._origin(tensor) for tensor in tensors]
        batch = [origin for origin in origins if isinstance(origin, str)]
        if not batch:
            return self._derive(function, args, kwargs, tensors, origins)
        sources = [tensor for tensor, origin in zip(tensors, origins) if origin and not isinstance(origin, str)]
        sources = [tensor for tensor in sources if tensor.requires_grad]
        rule = RULES.get(function) if sources and torch.is_grad_enabled() else None
        self._function = getattr(function, "__name__", "")
        if rule and any(tensor.is_complex() for tensor in sources):
            rule = None
        if rule is None:  # where no gradients are recorded, what is computed now may still get one (checkpointing)
            self._give_up(sources)
        result = rule(self, function, *args, **kwargs) if rule else function(*args, **kwargs)
        picked = PICKED in batch or self._picks(function, args, kwargs)
        for tensor in _flatten((result if result is not None else args[0],), {}):
            self._mark(tensor, PICKED if picked else BY_SAMPLE)
        return result

    # What a tensor is made of is written on the tensor itself, so that nothing is kept alive for it.

    def _mark(self, tensor, origin: Origin) -> None:
        if isinstance(tensor, Tensor):
            tensor._ghost_origin = (self.names, origin)  # `names` is this pass's own: old marks do not count

    def _origin(self, tensor: Tensor) -> Origin:
        if name := self.names.get(id(tensor)):
            return frozenset((name,))
        if self._refresh and isinstance(tensor, Parameter):
            return self._gathered(tensor)
        names, origin = getattr(tensor, "_ghost_origin", (None, None))
        if names is self.names:
            return origin
        if is_functorch_wrapped_tensor(tensor):
            return self._origin(get_unwrapped(tensor))
        if tensor.requires_grad and tensor.grad_fn is not None:
            return self._from_elsewhere(tensor)
        return frozenset()

    def _gathered(self, tensor: Parameter) -> Origin:
        """Of a parameter that has come since the pass began."""
        for name, parameter in self._refresh().items():
            if parameter is tensor:
                self.names[id(tensor)], self.parameters[name] = name, tensor
                return frozenset((name,))
        return frozenset()

    def _from_elsewhere(self, tensor: Tensor) -> Origin:
        """Of a tensor that no watched function has made (TorchScript, say): its parameters are beyond us."""
        nodes, found = [tensor.grad_fn], set()
        for node in nodes:
            if (name := self.names.get(id(getattr(node, "variable", None)))) is not None:
                self.uncovered.add(name)
            ahead = [other for other, _ in node.next_functions if other is not None and other not in found]
            found.update(ahead)
            nodes += ahead
        self._mark(tensor, BY_SAMPLE)
        return BY_SAMPLE

    def _ancestors(self, tensor: Tensor) -> frozenset[str]:
        """The parameters from which a tensor is computed; none where the batch has a part in it."""
        origin = self._origin(tensor) if tensor.requires_grad else frozenset()
        return frozenset() if isinstance(origin, str) else origin

    def rows_by_sample(self, tensor) -> bool:
        """Along its first dimension stand the samples in order, each with as many rows."""
        if not isinstance(tensor, Tensor) or self._origin(tensor) != BY_SAMPLE:
            return False
        return tensor.dim() > 0 and len(tensor) > 0 and len(tensor) % self.n == 0

    def _picks(self, function: Callable, args: tuple, kwargs: dict) -> bool:
        """Rows by values of the batch. (What picks them by other values picks the same ones of every batch.)"""
        if function in PICKS:
            position, default = PICKS[function]
            dim = kwargs.get("dim", args[position] if len(args) > position else default)
            return not isinstance(dim, int) or dim % max(args[0].dim(), 1) == 0
        if function is not Tensor.__getitem__:
            return False
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        return isinstance(first, Tensor) and isinstance(self._origin(first), str)

    def _derive(self, function, args, kwargs, tensors: list[Tensor], origins: list[Origin]):
        """A function of parameters alone: remember of which. Expanding one over the batch is itself a use."""
        result = function(*args, **kwargs)
        ancestors = frozenset().union(*origins)
        if not ancestors:
            # Positions, states, …: the same ones for every sample
            expanded = function in EXPANSIONS and _one_more_dimension(tensors[0], result, self.n)
            if expanded or (function in FACTORIES and result.dim() and len(result) == self.n):
                self._mark(result, BY_SAMPLE)
            return result
        source = next(tensor for tensor, origin in zip(tensors, origins) if origin)
        self._function = getattr(function, "__name__", "")
        if torch.is_grad_enabled() and function in EXPANSIONS and self._expands_over_batch(source, result, ancestors):
            self.use(result, source, lambda B: Direct(at_least_single(B).reshape(self.n, *source.shape)))
            self._mark(result, BY_SAMPLE)
            return result
        for tensor in _flatten((result if result is not None else args[0],), {}):
            self._mark(tensor, ancestors)
        return result

    def _expands_over_batch(self, source: Tensor, result: Tensor, ancestors: frozenset[str]) -> bool:
        """By the shape, if an earlier pass does not say that it can be something else, as shapes can coincide."""
        call = (self._function, ancestors, tuple(source.shape))
        expands = result.numel() == self.n * source.numel() and _one_more_dimension(source, result, self.n)
        (self.seen.expansions if expands else self.seen.others).add(call)
        if not expands or self._known is None:
            return expands
        over_batch, over_others = call in self._known.expansions, call in self._known.others
        if over_batch == over_others:
            self.uncovered |= ancestors
        return over_batch

    def _give_up(self, sources: Iterable[Tensor | None]) -> None:
        for source in sources:
            if source is not None:
                self.uncovered |= self._ancestors(source)

    def use(
        self,
        output: Tensor,
        source: Tensor | None,
        contribute: Callable[[Tensor], Contribution],
        layout: str | None = None,
    ) -> None:
        """When the gradient B of `output` is known, add what `contribute(B)` gives for `source`.

        Args:
            layout: where in `output` the samples are: by default one row each along the first dimension, or several.
        """
        if source is None or not (ancestors := self._ancestors(source)):
            return
        if layout is None:
            layout = "a row each" if len(output) == self.n else "rows"
        use = (self._function, ancestors, output.dim(), layout)
        made = _maker(output)
        if made is None or source.is_complex() or (self._known and use not in self._known.uses):
            self.uncovered |= ancestors
            return
        self._uses.update(ancestors)
        node, index = made
        # Emptied when the gradient comes: a graph outlives its backward pass, the layers' inputs need not.
        pending, shape = [(source, ancestors, contribute)], output.shape

        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            if pending and gradients[index] is not None:
                self.seen.uses.add(use)
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    self._receive(*pending.pop(), gradients[index].reshape(shape))

        node.register_prehook(hook)

    def _receive(self, source: Tensor, ancestors: frozenset[str], contribute: Callable, B: Tensor) -> None:
        try:
            self._add(source, ancestors, contribute(B))
        except (RuntimeError, NotImplementedError) as error:  # the training pass goes on
            if is_out_of_memory(error):
                raise
            self.uncovered |= ancestors
            self.failure = first_line(error)

    def _add(self, source: Tensor, ancestors: frozenset[str], contribution: Contribution) -> None:
        for name in ancestors - self.uncovered:
            parameter = self.parameters[name]
            own = contribution if parameter is source else PulledBack(contribution, source, parameter)
            if name in self.hooks:
                own = Hooked(own.at_hand() if isinstance(own, PulledBack) else own, self.hooks[name], parameter.shape)
            if self._keep:
                own = self._remember(name, own)
            if self._uses[name] == 1:
                self._parts.append((name, own.parts()))
                continue
            # The gradient is the sum over the uses: cross terms count. What leads to a use will be gone by then.
            self._shared[name].append(own.at_hand() if isinstance(own, PulledBack) else own)
            if len(self._shared[name]) == self._uses[name]:
                self._end_shared(name)

    def _remember(self, name: str, own: Contribution) -> Contribution:
        if isinstance(own, PulledBack):  # what leads from the parameter to its use will be gone: now, or not at all
            if own.fits_at_once():
                own = own.at_hand()
            else:
                self._all_kept = False
        if self._all_kept:
            self._contributions.append((name, own))
        return own

    def _end_shared(self, name: str) -> None:
        norms_sq = norms_sq_of_sum(self._shared.pop(name), self.parameters[name].shape)
        self._parts.append((name, (Part.TERMS, norms_sq.unsqueeze(1))))

    def norms_sq(self, name: str | None = None) -> Tensor:
        """Every sample's, float64 (n,), as the backward pass had the gradients (a scaled loss gives scaled norms).

        Of one parameter where it is named, else over all that are covered.
        """
        counts = (lambda own: own == name) if name else (lambda own: own not in self.uncovered)
        if parts := [parts for own, parts in self._parts if counts(own)]:
            return total_norms_sq(parts)
        return self._zeros()

    def _zeros(self) -> Tensor:
        device = next(iter(self.parameters.values())).device
        return torch.zeros(self.n, dtype=torch.float64, device=device)

    @property
    def is_complete(self) -> bool:
        """Everything is kept that `inner_products` needs."""
        return self._all_kept and not self.uncovered

    def unseen(self) -> set[str]:
        """Covered parameters of which no use was seen; they should have no gradient."""
        return {name for name in self.parameters if not self._uses[name]} - self.uncovered

    def inner_products(self, direction: dict[str, Tensor]) -> Tensor:
        """Of every sample's gradient with `direction` (by parameter), all parameters as one vector: float64 (n,)."""
        own = (own.inner_products(self._along(name, direction[name])) for name, own in self._contributions)
        return sum(own, start=self._zeros())

    def _along(self, name: str, direction: Tensor) -> Tensor:
        """Between parameters of several dtypes a direction may have come in the widest."""
        return at_least_single(direction.to(self.parameters[name].dtype))

    def inner_products_with(self, name: str, direction: Tensor) -> Tensor:
        """Of every sample's gradient by one parameter, with a direction of its shape: float64 (n,)."""
        direction = self._along(name, direction)
        own = (own.inner_products(direction) for kept, own in self._contributions if kept == name)
        return sum(own, start=self._zeros())

    def __exit__(self, *exception):
        for name in list(self._shared):  # some of the uses had no part in the loss
            self._end_shared(name)
        return super().__exit__(*exception)


def _maker(output: Tensor) -> tuple[Any, int] | None:
    """The node of the graph that has made these numbers, and which of its outputs they are.

    A view (of a linear layer's product, say) loses its own node when something works in place on it: then gradients go
    to the maker of what is viewed. None where only a part is viewed.
    """
    base = output._base
    if base is None or base.grad_fn is None:
        return output.grad_fn and (output.grad_fn, output.output_nr)
    whole = base.numel() == output.numel() and base.is_contiguous() and output.is_contiguous()
    return (base.grad_fn, base.output_nr) if whole else None


def _one_more_dimension(source: Tensor, result: Tensor, n: int) -> bool:
    """The first one, n times what the source is (or, of one row, n times that row)."""
    if not result.dim() or len(result) != n:
        return False
    return source.dim() < result.dim() or (source.dim() == result.dim() and len(source) == 1)


def _flatten(args, kwargs):
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, (tuple, list)):
            yield from _flatten(argument, {})
        else:
            yield argument
