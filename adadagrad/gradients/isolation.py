"""A model in passes of the test's own: every sample by itself, as a batch of one, and nothing left of the pass.

The model itself runs, not a copy: ties, parametrizations, hooks and the mode of every submodule are what they are.
What couples the samples of a batch is replaced while the pass lasts.
"""

import contextlib
import random
import sys
from collections.abc import Iterator
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .snapshot import Snapshot


def couples_samples(model: nn.Module) -> bool:
    """True where a layer makes the gradient of one sample depend on the others of its batch (BatchNorm in training)."""
    return any(isinstance(module, _BatchNorm) and _takes_batch_statistics(module) for module in model.modules())


def _takes_batch_statistics(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def is_compiled(model: nn.Module) -> bool:
    """A part of it is compiled, by torch.compile or in place."""
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules())


def _batch_norm(self: _BatchNorm, x: Tensor) -> Tensor:
    """Every sample by its own statistics over its positions, as the paper's code does.

    One group per channel is exactly this, also on 1×1 maps (the variance is then zero, the output the bias).
    (nn.functional's wrapper refuses single values.)
    """
    return torch.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


def _instance_norm(self: _InstanceNorm, x: Tensor) -> Tensor:
    """By the sample's statistics as ever, but these are not tracked."""
    return F.instance_norm(x, None, None, self.weight, self.bias, True, self.momentum or 0.0, self.eps)


def _is_stochastic_depth(module: nn.Module) -> bool:
    """torchvision's layer; a model that has one has imported it."""
    ops = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(module, ops.StochasticDepth)


def _stochastic_depth(self: nn.Module, x: Tensor) -> Tensor:
    """By samples, and its noise is drawn out of place, as vmap needs."""
    if not self.training or self.p == 0:
        return x
    survives = torch.rand_like(x[(slice(None), *[slice(0, 1)] * (x.dim() - 1))]) >= self.p
    return x * survives.to(x.dtype) / max(1 - self.p, 1e-12)


def _changes(module: nn.Module, under_vmap: bool) -> dict:
    """Attributes under which the module treats every sample by itself."""
    if isinstance(module, torch.jit.ScriptModule):
        return {}
    if isinstance(module, _BatchNorm) and _takes_batch_statistics(module):
        return {"forward": MethodType(_batch_norm, module)}
    if isinstance(module, _InstanceNorm) and module.training and module.running_mean is not None:
        return {"_apply_instance_norm": partial(_instance_norm, module)}
    if under_vmap and _is_stochastic_depth(module):
        return {"forward": MethodType(_stochastic_depth, module)}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and under_vmap:
        return {"sparse": False}
    return {}


@contextlib.contextmanager
def preserving_attributes(model: nn.Module) -> Iterator[None]:
    """Afterwards modes and attributes of all modules are as they were: counters, lists, generators (snapshot.py)."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    snapshot = Snapshot(modules, (hook for p in model.parameters() for hook in (p._backward_hooks or {}).values()))
    try:
        yield
    finally:
        snapshot.restore()


@contextlib.contextmanager
def preserving_state(model: nn.Module, buffers: dict[str, Tensor] | None = None) -> Iterator[None]:
    """`preserving_attributes`, and buffers are as they were, too.

    Args:
        buffers: by name, those that take the place of the present ones inside.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    scripted = [module for module in model.modules() if isinstance(module, torch.jit.ScriptModule)]
    # (Parameters, too: functional_call leaves its own behind in a module that has two names.)
    tensors = [(m, dict(m._buffers), dict(m._parameters)) for m in modules]
    values = [(buffer, buffer.clone()) for module in scripted for buffer in module.buffers(recurse=False)]
    copies: dict[int, Tensor] = {}
    try:
        with preserving_attributes(model):
            for prefix, module in model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        given = (buffers or {}).get(f"{prefix}.{name}" if prefix else name, buffer)
                        module._buffers[name] = copies.setdefault(id(buffer), given.clone())
            yield
    finally:
        for module, own_buffers, own_parameters in tensors:
            for there, before in ((module._buffers, own_buffers), (module._parameters, own_parameters)):
                there.clear()
                there.update(before)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def isolated(model: nn.Module, buffers: dict[str, Tensor] | None = None, under_vmap: bool = False) -> Iterator[None]:
    """`preserving_state`; inside, the model treats every sample by itself, and parameters' hooks do not run (hooks.py).

    Args:
        under_vmap: sparse gradients and draws in place would fail there.
    """
    with preserving_state(model, buffers), _uncompiled(), _without_fast_attention(), _without_parameter_hooks(model):
        for module in model.modules():
            if changes := _changes(module, under_vmap):
                module.__dict__.update(changes)
        yield


def _uncompiled() -> contextlib.AbstractContextManager:
    """Compiled parts run as they are written: what is compiled hides its functions."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _without_parameter_hooks(model: nn.Module) -> Iterator[None]:
    hooked = [parameter._backward_hooks for parameter in model.parameters() if parameter._backward_hooks]
    before = [dict(hooks) for hooks in hooked]
    try:
        for hooks in hooked:
            hooks.clear()
        yield
    finally:
        for hooks, own in zip(hooked, before):
            hooks.update(own)


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    """The fused attention of evaluation has no derivatives."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def random_states(device: torch.device) -> list:
    """Of all generators that a model may draw from, as plain values: torch's (host, device), Python's, NumPy's where it
    is loaded."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    states = [torch.get_rng_state(), on_device, random.getstate()]
    if (numpy := sys.modules.get("numpy")) is None:
        return [*states, None]
    name, key, *rest = numpy.random.get_state()
    return [*states, (name, key.tolist(), *rest)]


def set_random_states(states: list, device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)
    random.setstate(states[2])
    if states[3] is not None:
        sys.modules["numpy"].random.set_state(states[3])


@contextlib.contextmanager
def drawing_from(states: list, device: torch.device) -> Iterator[None]:
    """Draw from these random states inside, and leave the outer ones as they were."""
    outer = random_states(device)
    try:
        set_random_states(states, device)
        yield
    finally:
        set_random_states(outer, device)
