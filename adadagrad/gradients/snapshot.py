"""What a model keeps beside parameters and buffers, noted and put back: attributes, counters, lists, generators."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn

OF_EVERY_MODULE = set(nn.Module().__dict__)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PLAIN = {int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype, torch.device}
CODE = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType)
FEW = 1000
"""Of longer lists the order is put back, but not what their elements keep."""


class Snapshot:
    """Of all that can be reached from modules and from hooks: `restore` puts it back, in place.

    Noted are attributes and the elements of lists, dicts, sets and deques; what objects have as attributes in turn;
    the states of random generators; the numbers of tensors that are not computed from parameters. Of hooks, the lists,
    dicts and sets that they name or have been given. (What is beyond, such as an open file, stays as it was left.)
    """

    def __init__(self, modules: Iterable[nn.Module], hooks: Iterable[Callable] = ()):
        self.undo: list[Callable[[], None]] = []
        self.met: dict[int, object] = {}  # alive, so that their numbers stay theirs
        modules = list(modules)
        self.met.update((id(module), module) for module in modules)
        for module in modules:
            self.undo.append(partial(_put_back, module.__dict__, dict(module.__dict__)))
            for name, value in module.__dict__.items():
                if name not in OF_EVERY_MODULE:
                    self._note(value)
            for name in HOOKS:
                for hook in module.__dict__.get(name, {}).values():
                    self._note_of_hook(hook)
        for hook in hooks:
            self._note_of_hook(hook)

    def restore(self) -> None:
        for undo in reversed(self.undo):
            undo()

    def _note(self, value) -> None:
        if type(value) in PLAIN or isinstance(value, CODE) or id(value) in self.met:
            return
        self.met[id(value)] = value
        if isinstance(value, Tensor):
            self._note_tensor(value)
        elif isinstance(value, tuple):
            self._note_each(value)
        elif isinstance(value, dict):
            self.undo.append(partial(_put_back, value, dict(value)))
            self._note_each(value.values())
        elif isinstance(value, (list, deque)):
            self.undo.append(partial(_refill, value, list(value), value.extend))
            self._note_each(value)
        elif isinstance(value, set):
            self.undo.append(partial(_refill, value, set(value), value.update))
        elif hasattr(value, "bit_generator"):  # NumPy's
            self.undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif hasattr(value, "get_state") and hasattr(value, "set_state"):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif hasattr(value, "getstate") and hasattr(value, "setstate"):
            self.undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(getattr(value, "__dict__", None), dict):
            self.undo.append(partial(_put_back, value.__dict__, dict(value.__dict__)))
            self._note_each(value.__dict__.values())

    def _note_each(self, values) -> None:
        if len(values) <= FEW:
            for value in values:
                self._note(value)

    def _note_tensor(self, tensor: Tensor) -> None:
        if tensor.requires_grad or tensor.is_inference():
            return
        version, before = tensor._version, tensor.clone()

        def undo() -> None:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(before)

        self.undo.append(undo)

    def _note_of_hook(self, hook: Callable) -> None:
        if isinstance(hook, partial):
            self._note_each([*hook.args, *hook.keywords.values()])
            hook = hook.func
        if isinstance(hook, MethodType):
            self._note(hook.__self__)
            hook = hook.__func__
        if isinstance(hook, FunctionType):
            cells = [cell.cell_contents for cell in hook.__closure__ or () if _is_filled(cell)]
            named = [hook.__globals__.get(name) for name in hook.__code__.co_names]
            self._note_each([kept for kept in (*cells, *named) if isinstance(kept, (list, dict, set, deque))])
        elif not isinstance(hook, CODE):
            self._note(hook)


def _put_back(there: dict, before: dict) -> None:
    """What is as it was is not touched."""
    for name in [name for name in there if name not in before]:
        del there[name]
    for name, value in before.items():
        if name not in there or there[name] is not value:
            there[name] = value


def _refill(there, before, fill: Callable) -> None:
    if len(there) != len(before) or any(a is not b for a, b in zip(there, before)):
        there.clear()
        fill(before)


def _is_filled(cell) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
