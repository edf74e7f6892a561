"""Hooks on parameters that change gradients: masks of what is trained, factors on some layers.

A training step has the changed gradient. Where the change is linear and symmetric (each number times a factor), the
samples' gradients are changed alike, and their mean is the step's.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import vmap

from .contributions import Contribution, real
from .snapshot import Snapshot

Hook = Callable[[Tensor], Tensor]
"""A gradient → what the step has of it."""


class Hooked(Contribution):
    """The gradients of a parameter behind its hook."""

    def __init__(self, contribution: Contribution, hook: Hook, shape: torch.Size):
        self.inner, self.hook, self.shape = contribution, hook, shape
        self.n, self.device = contribution.n, contribution.device
        self.numbers_per_sample = 2 * contribution.numbers_per_sample

    def instantiate(self, chunk: slice) -> Tensor:
        return of_each(self.hook, self.inner.instantiate(chunk).reshape(-1, *self.shape))


def of_each(hook: Hook, gradients: Tensor) -> Tensor:
    """Of every sample's gradient, (n, *shape)."""
    try:
        return vmap(hook)(gradients)
    except Exception:  # a user's hook does what it likes
        return torch.stack([hook(gradient) for gradient in gradients])


def changing(parameters: dict[str, nn.Parameter]) -> tuple[dict[str, Hook], set[str]]:
    """The hooks that are linear and symmetric, by parameter, and the names of parameters whose hooks are neither.

    They are tried on random gradients; what they note of these is put back. Hooks that change nothing are left out.
    Those that run after the accumulation may do anything, such as an optimizer's step: they are not tried.
    """
    linear, others = {}, after_accumulation(parameters)
    for name, parameter in parameters.items():
        if hooks := list((parameter._backward_hooks or {}).values()):
            snapshot = Snapshot((), hooks)
            try:
                if (kind := _kind(_one_after_the_other(hooks), parameter)) == "linear":
                    linear[name] = _one_after_the_other(hooks)
                elif kind:
                    others.add(name)
            finally:
                snapshot.restore()
    return linear, others


def after_accumulation(parameters: dict[str, nn.Parameter]) -> set[str]:
    """Names of parameters with hooks of `register_post_accumulate_grad_hook`: what they make of `.grad` nobody sees."""
    return {name for name, parameter in parameters.items() if getattr(parameter, "_post_accumulate_grad_hooks", None)}


def _one_after_the_other(hooks: list[Callable]) -> Hook:
    def hook(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()  # some work in place
        for own in hooks:
            changed = own(gradient)
            gradient = gradient if changed is None else changed
        return gradient

    return hook


@torch.no_grad()
def _kind(hook: Hook, parameter: nn.Parameter) -> str:
    """ "linear", "other", or "" of one that changes nothing."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = parameter.shape, parameter.dtype
    first, second = (torch.randn(shape, generator=generator, dtype=dtype).to(parameter.device) for _ in range(2))
    try:
        of_first, of_second, of_both = hook(first), hook(second), hook(2 * first - 3 * second)
    except Exception:  # a user's hook does what it likes
        return "other"
    if torch.equal(of_first, first) and torch.equal(of_second, second):
        return ""
    is_linear = _close(of_both, 2 * of_first - 3 * of_second)
    products = [(real(a) * real(b)).sum() for a, b in ((of_first, second), (first, of_second))]
    scale = torch.linalg.vector_norm(first) * torch.linalg.vector_norm(second)
    is_symmetric = float((products[0] - products[1]).abs()) <= _tolerance(first) * float(scale)
    return "linear" if is_linear and is_symmetric else "other"


def _tolerance(tensor: Tensor) -> float:
    return 100 * torch.finfo(tensor.dtype).eps


def _close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= _tolerance(expected) * max(float(expected.abs().max()), 1.0)
